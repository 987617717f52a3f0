"""A loop that is not ours, shaped like vLLM's, drives the scheduler: it owns the requests and the memory."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from neustream import (
    Batch,
    Decision,
    Graph,
    Job,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
    Stage,
    View,
    loop,
    seq,
    switch,
)
from neustream.core.events import Emitted, Ended

PREFILL = Stage("prefill", max_batch=8, emits=True, size=lambda job: job.params["prompt"], model="llm")
DECODE = Stage("decode", max_batch=32, emits=True, size=lambda job: job.params["prompt"] + job.outputs, model="llm")
ANSWER = loop(DECODE, until=lambda job: job.state["eos"], expect=lambda job: job.params["max_tokens"])
CHAT = Graph("chat", seq(PREFILL, switch(lambda job: job.state["eos"], {True: seq(), False: ANSWER}, likely=False)))
PROFILES = {
    "prefill": LinearProfile("prefill", base=0.01, per_size=2e-4, max_batch=8),
    "decode": LinearProfile("decode", base=0.02, per_size=1e-6, max_batch=32),
}
BLOCK = 16  # tokens


@dataclass(frozen=True)
class Chunked:
    """Chunked prefill (Sarathi-Serve, OSDI'24): all decodes, and prompts up to a budget of tokens."""

    budget: int

    def decide(self, view: View) -> Decision:
        jobs = list(view.queues.get("decode", ()))[: DECODE.max_batch]
        room, sizes = self.budget - len(jobs), {}
        for job in list(view.queues.get("prefill", ()))[: PREFILL.max_batch]:
            if room > 0:
                sizes[job] = min(room, job.size)
                room -= sizes[job]
        return Decision([*jobs, *sizes], sizes=sizes)


@dataclass
class Loop:
    """Waiting and running requests, KV blocks by request, and one step after the other.

    Where no running request can go on, the youngest is pre-empted as vLLM does it: its blocks are
    freed and it waits again with what it has written so far as part of its prompt.
    """

    free: int
    lengths: dict[str, int]  # how many tokens each request will write; the scheduler cannot know
    scheduler: Scheduler = field(
        default_factory=lambda: Scheduler([Pool("engine", ("prefill", "decode"))], Chunked(64), PROFILES)
    )
    now: float = 0.0
    waiting: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)  # those that hold blocks, the youngest last
    held: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    asked: dict[str, dict[str, int]] = field(default_factory=dict)  # what each was submitted with last
    told: Counter[str] = field(default_factory=Counter)  # tokens that were part of its prompt then
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    preempted: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    leaving: set[str] = field(default_factory=set)  # pre-empted, and not back in the queue yet
    gone: list[str] = field(default_factory=list)  # given up by their callers

    def add(self, id: str, params: dict[str, int]) -> None:
        self.scheduler.submit(Request(id, CHAT, params=params), self.now)
        self.waiting.append(id)
        self.asked[id], self.told[id] = params, self.tokens[id]

    def step(self) -> None:
        if batch := self.scheduler.next_batch("engine", self.now):
            self.run(batch)
        for event in self.scheduler.pop_events():
            if isinstance(event, Emitted):
                self.tokens[event.id] += 1
            else:
                assert isinstance(event, Ended)
                self.end(event)

    def run(self, batch: Batch) -> None:
        offers = zip(batch.jobs, batch.sizes, strict=True)
        fits = {job: share for job, size in offers if (share := self.allocate(job, size)) > 0}
        batch = self.scheduler.admit(batch, fits, self.now)
        if batch is None:
            self.preempt(self.running[-1])
            return
        self.labels[batch.stage] += 1
        self.now += batch.expected
        results = [{"eos": self.tokens[job.id] + 1 >= self.lengths[job.id]} for job in batch.jobs]
        self.scheduler.finish(batch, results, self.now)

    def allocate(self, job: Job, size: float) -> float:
        """Take the blocks for this step; a prompt may get fewer tokens than offered, a decode all or nothing."""
        room = (self.held[job.id] + self.free) * BLOCK
        share = min(size, room - job.computed)
        if share <= 0 or (job.stage is DECODE and share < size):
            return 0
        more = -int(-(job.computed + share) // BLOCK) - self.held[job.id]
        self.free -= more
        self.held[job.id] += more
        if job.id in self.waiting:
            self.waiting.remove(job.id)
            self.running.append(job.id)
        return share

    def preempt(self, id: str) -> None:
        self.preempted[id] += 1
        self.leaving.add(id)
        self.scheduler.cancel(id, self.now)

    def end(self, event: Ended) -> None:
        id = event.id
        self.free += self.held.pop(id, 0)
        (self.running if id in self.running else self.waiting).remove(id)
        if id in self.leaving:
            self.leaving.remove(id)
            params = self.asked[id]
            self.add(id, {**params, "prompt": params["prompt"] + self.tokens[id] - self.told[id]})
        else:
            self.ended[id, event.status] += 1

    def check(self, blocks: int) -> None:
        assert self.free >= 0
        assert self.free + sum(self.held.values()) == blocks
        assert sorted(self.waiting + self.running) == sorted(self.scheduler.jobs)
        assert all(job.status == "waiting" for job in self.scheduler.jobs.values())


def serve(blocks, requests=40, seed=0, cancels=0):
    """Requests that come while others run; the callers of some give up in the middle."""
    dice = random.Random(seed)
    lengths = {f"r{i}": 1 if i == 7 else dice.randint(1, 60) for i in range(requests)}
    coming = [(id, {"prompt": dice.randint(1, 200), "max_tokens": lengths[id]}) for id in lengths]
    some, steps = Loop(blocks, lengths), 0
    while coming or some.scheduler.jobs:
        if coming and steps % 3 == 0:
            some.add(*coming.pop(0))
        if steps == 60 and cancels:
            some.gone = (some.running + some.waiting)[-cancels:]
            assert all(some.scheduler.cancel(id, some.now) for id in some.gone)
        some.step()
        some.check(blocks)
        steps += 1
        assert steps < 20_000
    return some


@pytest.mark.parametrize("blocks", [1000, 60, 20])
def test_every_request_writes_all_its_tokens_and_ends_once(blocks):
    some = serve(blocks)
    assert some.ended == Counter((id, "done") for id in some.lengths)
    assert some.tokens == some.lengths
    assert some.free == blocks
    assert not some.held
    assert not some.waiting
    assert not some.running


def test_prompts_and_tokens_share_steps():
    some = serve(1000)
    assert some.labels["llm"] > 20
    assert not some.preempted


def test_short_memory_pre_empts_and_loses_nobody():
    some = serve(20)
    assert sum(some.preempted.values()) > 3
    assert some.now > serve(1000).now


def test_callers_may_leave_in_the_middle():
    some = serve(20, cancels=4)
    assert len(some.gone) == 4
    assert some.ended == Counter((id, "cancelled" if id in some.gone else "done") for id in some.lengths)
    assert all(some.tokens[id] < some.lengths[id] for id in some.gone)
    assert some.free == 20
