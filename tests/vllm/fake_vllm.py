"""vLLM's loop without vLLM: requests, two queues, KV blocks, and steps in flight."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from neustream.backends.vllm.choice import Room, arrange, ask, put_back
from neustream.backends.vllm.view import ViewBuilder
from neustream.core.profile import LinearProfile
from neustream.core.steps import StepProfile

STEPS = StepProfile(
    "llm",
    LinearProfile("p", base=0.01, per_size=1e-4, max_batch=99),
    LinearProfile("d", base=0.01, per_size=1e-6, max_batch=99),
)
BLOCK = 16
READY = ("waiting", "preempted")


@dataclass(eq=False)
class FakeRequest:
    """What is read of one of vLLM's requests; `end`: outputs after which it says EOS."""

    request_id: str
    num_prompt_tokens: int = 20
    max_tokens: int = 10
    end: int = 10**9
    arrival_time: float = field(default_factory=time.time)
    status: str = "waiting"
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_output_tokens: int = 0
    num_stale_output_tokens: int = 0
    drop_stale_output: bool = False

    @property
    def total(self):
        return self.num_prompt_tokens + self.num_output_tokens + self.num_output_placeholders

    @property
    def last(self):
        """The number of its last output."""
        return min(self.max_tokens, self.end)


def builder(**more):
    given = {"num_blocks": 100, "block_size": BLOCK, "max_batch": 8, "step_tokens": 64, "max_len": 4096}
    return ViewBuilder(STEPS, ("running", *READY), **(given | more))


class FakeVllm:
    """An engine that asks `policy`, with so many steps in flight as `depth`; `now` is virtual."""

    def __init__(self, policy, *, blocks=100, depth=1, seats=8, step_tokens=64):
        self.policy, self.depth, self.seats, self.step_tokens = policy, depth, seats, step_tokens
        self.views = builder(num_blocks=blocks, max_batch=seats, step_tokens=step_tokens)
        self.requests, self.slos = {}, {}
        self.waiting, self.running = [], []
        self.in_flight = deque()
        self.blocks, self.now, self.stuck = blocks, 0.0, False
        self.ended, self.dropped, self.preemptions = {}, {}, 0

    @property
    def free(self):
        return self.blocks - sum(-(-r.num_computed_tokens // BLOCK) for r in self.requests.values())

    def add(self, request, slo=None):
        self.requests[request.request_id] = request
        self.waiting.append(request)
        if slo is not None:
            self.slos[request.request_id] = slo

    def turn(self):
        """Schedule a step, and take the oldest one in when as many are under way as may be."""
        self.in_flight.append(self.schedule())
        if len(self.in_flight) == self.depth:
            self.land(*self.in_flight.popleft())

    def schedule(self):
        view = self.views.build(self.requests, self.slos, self.free, self.now)
        choice = ask(self.policy, view, in_flight=bool(self.in_flight))
        for id, reason in choice.drop.items():
            self.dropped[id] = reason
            self.leave(self.requests[id])
        room = Room(self.seats - len(self.running), self.free, BLOCK, self.step_tokens)
        plan = None if self.stuck else arrange(choice, self.running, self.waiting, [], room)
        if plan is None:
            tokens, self.stuck = self.fill(self.step_tokens, self.seats), False
        else:
            before = list(self.waiting)
            self.running, self.waiting = list(plan.running), list(plan.waiting)
            tokens = self.fill(plan.tokens, self.seats - len(plan.apart))
            self.stuck = plan.chosen and not tokens
            self.running += plan.apart
            self.waiting = put_back(before, plan.waiting, self.waiting)
        assert len(self.running) <= self.seats and self.free >= 0
        self.views.scheduled(tokens, self.now)
        requests = [self.requests[id] for id in tokens]
        return tokens, [r for r in requests if r.num_computed_tokens == r.total - 1]  # an output is on its way

    def fill(self, budget, seats):
        """vLLM's own order of things: the running ones, the last preempted for the first; then those that wait."""
        tokens, preempted = {}, False
        for request in list(self.running):
            count = min(request.total - request.num_computed_tokens, budget)
            over = request.num_output_tokens + request.num_output_placeholders >= request.max_tokens
            while request in self.running and count > 0 and not over:
                if self.grant(request, count, tokens):
                    budget -= count
                    break
                preempted = True
                self.preempt(self.running.pop())
        for request in [] if preempted else list(self.waiting):
            count = min(request.total - request.num_computed_tokens, budget)
            stale = request.num_stale_output_tokens
            if stale or count <= 0 or len(self.running) >= seats or not self.grant(request, count, tokens):
                break
            budget -= count
            self.waiting.remove(request)
            self.running.append(request)
            request.status = "running"
        return tokens

    def grant(self, request, count, tokens):
        past = request.num_computed_tokens
        if -(-(past + count) // BLOCK) - -(-past // BLOCK) > self.free:
            return False
        request.num_computed_tokens += count
        tokens[request.request_id] = count
        request.num_output_placeholders += request.num_computed_tokens == request.total
        return True

    def preempt(self, request):
        self.preemptions += 1
        request.status, request.num_computed_tokens = "preempted", 0
        request.num_stale_output_tokens, request.num_output_placeholders = request.num_output_placeholders, 0
        self.waiting.insert(0, request)

    def land(self, tokens, sampled):
        self.now += 0.02
        for request in sampled:
            if self.requests.get(request.request_id) is not request:
                continue
            if request.num_stale_output_tokens:
                request.num_stale_output_tokens -= 1
            else:
                request.num_output_placeholders -= 1
            request.num_output_tokens += 1
            if request.num_output_tokens >= request.last:
                self.ended[request.request_id] = request
                self.leave(request)
        self.views.landed(tokens, self.requests, self.now)

    def leave(self, request):
        del self.requests[request.request_id]
        (self.running if request in self.running else self.waiting).remove(request)
