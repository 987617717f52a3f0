"""The core scheduler's picture of vLLM's requests: who is where, and how long steps take.

vLLM owns its requests, their memory and the order of things; what it does is told to the core here,
in the core's own words. This file imports nothing of vLLM: a request is anything with its attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from neustream.core.batch import Batch
from neustream.core.events import Ended
from neustream.core.graph import Graph
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.mirror import Mirror
from neustream.core.policy import Policy, Pool
from neustream.core.step_times import step_of
from neustream.core.steps import LearntSteps, Step
from neustream.core.types import SLO, Request
from neustream.engine.clock import epoch
from neustream.errors import NeustreamError
from neustream.graphs import llm, llm_profiles

_NOTHING = SLO()
LABEL, POOL = "llm", "vllm"
SURE, SPARSE = 64, 8
"""After so many observed steps, one in so many decodes is observed: a fit costs a tenth of a millisecond."""
OLDEST = 86400.0
"""Seconds beyond which a request's age is taken for another clock's reading."""


class Learner(LearntSteps):
    """Learns from whole turns of vLLM's loop, which only the loop can time.

    `observe` does nothing: with async scheduling the core is told predicted ends of steps. Real
    durations come through `learn`.
    """

    _skipped = 0

    def observe(self, step: Step, seconds: float) -> None:
        pass

    def learn(self, step: Step, seconds: float) -> bool:
        """Take in one step that ran; of many decodes alike, only some. Whether it did."""
        if self.observed >= SURE and not step.prefills:
            self._skipped += 1
            if self._skipped % SPARSE:
                return False
        super().observe(step, seconds)
        return True


@dataclass(slots=True)
class Flight:
    """A step that vLLM has scheduled and not yet reported on.

    `batch` is the core's name for it while the core takes it to be running, `step` what it computes
    and `at` when its turn began, for the learner (None: not timed).
    """

    output: Any
    batch: Batch | None
    step: Step | None
    at: float


class Books:
    """A core scheduler with one pool: a language model on one vLLM engine.

    Args:
        policy: who decides.
        learner: step latencies.
        blocks, block: vLLM's KV cache: its blocks, and the tokens of each.
        max_batch, step_tokens: the most requests, and tokens, in one step.
        longest: tokens that a request may have in all.
    """

    def __init__(
        self,
        policy: Policy,
        learner: Learner,
        *,
        blocks: int,
        block: int,
        max_batch: int,
        step_tokens: int,
        longest: int,
    ) -> None:
        self.learner = learner
        self.policy = policy
        self.graph = Graph(LABEL, llm(LABEL, max_batch=max_batch))
        cache = KVCache(blocks, block, external=True)
        pool = Pool(POOL, tuple(self.graph.stages), kv_cache=cache, step_tokens=step_tokens)
        self.core = Mirror([pool], policy, llm_profiles(LABEL, learner, max_batch))
        self._longest = longest

    def enter(self, requests: Iterable[Any], slos: Mapping[str, SLO], now: float) -> dict[str, str]:
        """Take in `requests` that the core does not know, in whatever state they are.

        Returns those that can never run, with the reason.
        """
        refused = {}
        for request in requests:
            try:
                self._enter(request, slos.get(request.request_id, _NOTHING), now)
            except NeustreamError as error:
                refused[request.request_id] = str(error)
        return refused

    def _enter(self, request: Any, slo: SLO, now: float) -> None:
        """A request whose tokens are computed but for the last one is a prefill that lacks one token."""
        ahead = request.num_output_placeholders  # tokens of steps in flight
        most = min(request.max_tokens, self._longest - request.num_prompt_tokens)
        left = most - request.num_output_tokens - ahead
        if left <= 0:
            return  # it ends with what is in flight
        age = epoch() - request.arrival_time
        arrival = max(now - age, 0.0) if 0 < age < OLDEST else now
        tokens, had = request.num_tokens + ahead, request.num_output_tokens + ahead
        if had:  # its next token is not its first
            first = slo.first + had * slo.step if slo.step < math.inf else math.inf
            slo = replace(slo, first=first)
        params = {"prompt_tokens": tokens, "max_tokens": left}
        job = self.core.submit(Request(request.request_id, self.graph, arrival, slo, params), now)
        self.reach(job, min(request.num_computed_tokens, tokens - 1))

    def reach(self, job: Job, tokens: float) -> None:
        """So much of a job's prefill is done without the core having seen it (a prefix cache, earlier steps)."""
        self.core.mark_computed(job.id, tokens)

    def taken(self, request: Any, stale: int, now: float) -> None:
        """vLLM holds nothing of a request's computation any more; `stale` tokens of it are still to come."""
        job = self.core.jobs.get(request.request_id)
        if job is None or job.stage is None or not (job.stage.phase == "decode" or job.computed):
            return
        if job.params["prompt_tokens"] + job.call_outputs == request.num_tokens + stale:
            self.core.preempt(job.id, now)
        else:  # some of what was in flight is lost; it comes in anew, as it is
            self.core.cancel(job.id, now)

    def runs(self, batch: Batch, requests: Mapping[str, Any], tokens: Mapping[str, int], now: float) -> Batch | None:
        """Tell the core who really runs in this step: `tokens` by request id."""
        decodes = all(job.stage is not None and job.stage.phase == "decode" for job in batch.jobs)
        if decodes and len(tokens) == len(batch) and all(job.id in tokens for job in batch.jobs):
            return batch  # the common case: decodes, all of them
        sizes: dict[Job, float] = {}
        for id, count in tokens.items():
            job = self.core.jobs.get(id)
            if job is None or job.stage is None:
                continue
            if job.stage.phase != "decode":
                self.reach(job, min(requests[id].num_computed_tokens - count, job.computed + job.size - 1))
                # Whether the prompt is done is vLLM's to say; by tokens the two may be one apart.
                partial = requests[id].is_prefill_chunk and job.size > 1
                sizes[job] = min(float(count), job.size - 1) if partial else job.size
            else:
                sizes[job] = job.size
        return self.core.run_instead(batch, sizes, now)

    def done(self, flight: Flight, alive: Mapping[str, Any], now: float) -> None:
        """A step is over; requests that are not `alive` any more have ended with it."""
        batch, flight.batch = flight.batch, None
        if batch is not None:
            self.core.finish(batch, [{"ended": job.id not in alive} for job in batch.jobs], now)

    def predicted(self, flight: Flight, now: float) -> float:
        """Take a step in flight for done, when it should be; returns that instant."""
        batch, flight.batch = flight.batch, None
        if batch is None:
            return now
        now = max(now, batch.started_at + batch.expected)
        self.core.finish(batch, [{"ended": False}] * len(batch), now)
        return now

    def lost(self, flight: Flight, now: float) -> None:
        """A step will never be reported on (the engine failed in it)."""
        if flight.batch is not None:
            self.core.admit(flight.batch, [], now)
            flight.batch = None

    def over(self, ids: Iterable[str], now: float) -> None:
        """Requests that ended as they should, where the core still thinks that they go on."""
        for id in ids:
            self.core.complete(id, now)

    def leave(self, now: float) -> None:
        """Forget all requests; what was learnt stays."""
        for id in list(self.core.jobs):
            self.core.cancel(id, now)
        self.core.pop_events()

    def given_up(self) -> dict[str, str]:
        """Requests that the core ended by itself since the last call, with the reason."""
        return {
            event.id: event.reason
            for event in self.core.pop_events()
            if isinstance(event, Ended) and event.status in ("dropped", "failed")
        }


def step_of_batch(batch: Batch) -> Step:
    """What a step of the core's computes; to be asked before it is over."""
    return step_of(batch.jobs, batch.sizes)


def step_of_tokens(requests: Mapping[str, Any], tokens: Mapping[str, int]) -> Step:
    """The same for a step that vLLM scheduled without us; to be asked right after that."""
    prefills = new = square = decodes = context = 0
    for id, count in tokens.items():
        request = requests[id]
        past = request.num_computed_tokens - count
        if count == 1 and past >= request.num_prompt_tokens:
            decodes += 1
            context += past + 1
        else:
            prefills += 1
            new += count
            square += (2 * past + count) * count
    return Step(prefills, new, square, decodes, context)
