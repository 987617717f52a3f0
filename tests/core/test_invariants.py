"""Whatever the graph, the load, the policy and the misfortunes: nothing is lost, nothing happens twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf

import pytest
from hand import live_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import free, step, walk

from neustream import (
    POLICIES,
    SLO,
    Engine,
    Graph,
    Job,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    StageFailed,
    TableProfile,
    VirtualClock,
    loop,
    seq,
)
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.graph import Node
from neustream.engine.decision_time import DecisionTime
from neustream.engine.events import Cancel, Finished, Started

STAGES = [
    Stage("encode", max_batch=2),
    Stage("denoise", max_batch=8),
    Stage("decode", max_batch=3, emits=True),
    Stage("read", max_batch=2, emits=True, size=lambda job: job.params["size"]),
]
PROFILES = {
    "encode": LinearProfile("encode", base=0.25, max_batch=2),
    "denoise": TableProfile("denoise", [1, 2, 4], [1.0, 1.125, 1.5]),  # covers less than the stage allows
    "decode": LinearProfile("decode", base=0.25, per_job=0.25, max_batch=4),
    "read": LinearProfile("read", base=0.5, per_size=0.125, max_batch=4),
}
NOTHING = loop(STAGES[0], times=0)  # a graph needs a stage, even one in which nothing runs
TOGETHER = (("encode", "denoise", "decode", "read"),)
APART = (("encode", "decode"), ("denoise", "read"))


@dataclass(frozen=True)
class Case:
    """A run: who comes when and wants what, on which workers, and what goes wrong."""

    graphs: tuple[Node, ...]
    requests: tuple[tuple[float, int, SLO, int], ...]  # gap, graph, promise, size
    pools: tuple[tuple[str, ...], ...]
    workers: int
    sticky: bool
    slowdown: float  # of every step, beyond its profile
    decision_s: float  # what a decision takes; above 0 steps are planned
    cancels: tuple[tuple[int, float], ...]  # request, how long after its arrival
    errors: frozenset[tuple[int, int]]  # (request, step): an error in place of its update
    losses: frozenset[int]  # batches that return too few results


gaps = st.sampled_from([0.0, 0.25, 0.5, 1.0, 5.0])
delays = st.sampled_from([0.0, 0.25, 1.0, 2.0, 7.0])
longer = st.builds(
    lambda some, n, node: seq(*some, loop(STAGES[1], times=n), node),
    st.lists(free(STAGES), min_size=1, max_size=3),
    st.integers(1, 6),
    free(STAGES),
)
slos = st.builds(
    lambda total, first, step: SLO(total, first, step if first < inf else inf),
    st.sampled_from([inf, 5.0, 10.0, 20.0, 40.0]),
    st.sampled_from([inf, inf, 5.0, 15.0]),
    st.sampled_from([inf, 0.5, 3.0]),
)
cases = st.builds(
    Case,
    graphs=st.tuples(longer, free(STAGES)),
    requests=st.lists(st.tuples(gaps, st.integers(0, 3), slos, st.integers(1, 8)), max_size=12).map(tuple),
    pools=st.sampled_from([TOGETHER, APART]),
    workers=st.integers(1, 3),
    sticky=st.booleans(),
    slowdown=st.sampled_from([1.0, 1.5]),
    decision_s=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    cancels=st.lists(st.tuples(st.integers(0, 11), delays), max_size=6).map(tuple),
    errors=st.frozensets(st.tuples(st.integers(0, 11), st.integers(0, 6)), max_size=3),
    losses=st.frozensets(st.integers(1, 20), max_size=1),
)


@dataclass
class Watch:
    """An observer that checks each record against all before it."""

    slowdown: float
    decision_s: float
    now: float = 0.0
    submitted: list[str] = field(default_factory=list)
    ended: dict[str, Ended] = field(default_factory=dict)
    outputs: Counter[str] = field(default_factory=Counter)
    steps: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    live: dict[str, int] = field(default_factory=dict)  # to the step that it runs in
    busy: set[tuple[str, int]] = field(default_factory=set)

    def __call__(self, record):
        assert record.at >= self.now, "time went back"
        assert live_parts(record) == []
        self.now = record.at
        match record:
            case Submitted():
                self.submitted.append(record.id)
            case Started(step=step):
                self.began(step)
            case Finished(step=step):
                self.busy.remove((step.pool, step.worker))
                seconds = step.expected_s * self.slowdown
                assert record.at >= step.started_at + seconds
                assert self.decision_s or record.at == step.started_at + seconds
                for id in step.ids:
                    assert self.live.pop(id) == step.id
            case Emitted(id=id, index=index):
                assert index == self.outputs[id], "an output was lost or came twice"
                self.outputs[id] += 1
            case Ended(id=id, status=status):
                assert id not in self.ended, "it ended twice"
                self.ended[id] = record
                assert id not in self.live, "it ended while it ran"
                assert status in ("done", "dropped", "failed", "cancelled")
                assert record.reason or status == "done"

    def began(self, step):
        assert (step.pool, step.worker) not in self.busy, "a worker got two steps"
        self.busy.add((step.pool, step.worker))
        stage = next(stage for stage in STAGES if stage.name == step.stage)
        assert 1 <= len(step) <= min(stage.max_batch, PROFILES[stage.name].max_batch)
        for id in step.ids:
            assert id not in self.live, "in two live steps"
            assert id not in self.ended, "ran after its end"
            self.live[id] = step.id
            self.steps[id].append(stage.name)


class Kept(Scheduler):
    """A scheduler that keeps the jobs of all requests, for the test to look at when they are over."""

    def __init__(self, *args):
        super().__init__(*args)
        self.taken: list[Job] = []

    def submit(self, request, now):
        job = super().submit(request, now)
        self.taken.append(job)
        return job


def expected_steps(job):
    """The steps of an undisturbed walk, by the plain generator."""
    twin, stages = Job(job.request), []
    for stage in walk(job.request.graph.root, twin):
        stages.append(stage.name)
        twin.state.update(step(twin))
    return stages


def misfortunes(case):
    def outcome(batch):
        if batch.id in case.losses:
            return [{}] * (len(batch) - 1)
        return [
            StageFailed("unlucky") if (int(job.id), job.state.get("steps", 0)) in case.errors else step(job)
            for job in batch.jobs
        ]

    return outcome


def run(case, name):
    pools = [Pool(f"pool{i}", stages, case.workers, case.sticky) for i, stages in enumerate(case.pools)]
    scheduler = Kept(pools, POLICIES[name](), PROFILES)
    clock, watch = VirtualClock(DecisionTime(case.decision_s)), Watch(case.slowdown, case.decision_s)
    executor = ProfiledExecutor(stretch=lambda batch: case.slowdown, outcome=misfortunes(case))
    graphs = [Graph(f"g{i}", seq(node, NOTHING)) for i, node in enumerate(case.graphs)]
    requests, now = [], 0.0
    for i, (gap, graph, slo, size) in enumerate(case.requests):
        now += gap
        requests.append(Request(str(i), graphs[graph == 0], now, slo, {"size": size}))
    answers = []
    for i, delay in case.cancels:
        if i < len(requests):
            answers.append((str(i), Future()))
            clock.post(Cancel(*answers[-1]), requests[i].arrival + delay)
    report = Engine(Member(scheduler, dict.fromkeys(scheduler.pools, executor)), clock, [watch]).run(requests)
    cancelled = {id for id, answer in answers if answer.done() and answer.result()}
    return scheduler, watch, report, requests, cancelled


@pytest.mark.parametrize("name", POLICIES)
@given(case=cases)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_every_request_ends_exactly_once(name, case):
    scheduler, watch, report, requests, cancelled = run(case, name)

    assert watch.submitted == [job.id for job in scheduler.taken] == [request.id for request in requests]
    assert set(watch.ended) == set(watch.submitted)
    assert report.submitted == len(requests) == sum(report.counts.values())
    assert report.counts["cancelled"] == len(cancelled)
    for job in scheduler.taken:
        steps, whole = watch.steps[job.id], expected_steps(job)
        assert steps == whole if job.status == "done" else steps == whole[: len(steps)]
        assert watch.outputs[job.id] == job.outputs
        assert (job.status == "cancelled") == (job.id in cancelled)
        end = watch.ended[job.id]
        assert (end.status, end.reason, end.on_time) == (job.status, job.reason, job.on_time)
        assert (end.output, end.at) == (job.output if job.status == "done" else None, job.ended_at)
        assert job.started_at is None or job.arrival <= job.started_at <= job.ended_at
        assert not (job.state or job.calls_left or job.stage)

    assert scheduler.jobs == {}
    assert not watch.live
    assert not watch.busy
    asked = scheduler.asked.decisions
    assert all(scheduler.next_batch(pool, watch.now, 0) is None for pool in scheduler.pools)
    assert scheduler.asked.decisions == asked  # no queue holds anybody
    assert scheduler.pop_events() == []


@pytest.mark.parametrize("name", POLICIES)
@given(case=cases)
@settings(max_examples=15, derandomize=True, deadline=None)
def test_the_same_run_comes_out_the_same(name, case):
    def log():
        _, watch, report, _, _ = run(case, name)
        return watch.steps, watch.ended, report.counts, report.duration

    assert log() == log()
