"""Language models under every policy, with too little memory, cancels and failures: nothing is lost, no token twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import (
    POLICIES,
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    StageFailed,
    VirtualClock,
    loop,
    seq,
)
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.kv_cache import KVCache
from neustream.core.steps import StepProfile
from neustream.engine.events import Cancel, Decided
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "llm",
    LinearProfile("prefill", base=0.5, per_size=0.0625, max_batch=999),
    LinearProfile("decode", base=0.5, per_job=0.03125, per_size=0.0078125, max_batch=999),
)
BLOCK = 4


@dataclass(frozen=True)
class Case:
    """Requests: gap, prompt, most outputs, outputs after which the model ends, promise."""

    requests: tuple[tuple[float, int, int, int, SLO], ...]
    blocks: int
    seats: int
    step_tokens: int
    turns: int  # calls of the model in one request
    cancels: tuple[tuple[int, float], ...]
    errors: frozenset[tuple[int, int]]  # request, output: an error in its place


slos = st.builds(
    lambda total, first, step: SLO(total, first, step if first < inf else inf),
    st.sampled_from([inf, inf, 20.0]),
    st.sampled_from([inf, 2.0, 8.0]),
    st.sampled_from([inf, 0.75, 2.0]),
)
cases = st.builds(
    Case,
    requests=st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 2.0]), st.integers(1, 20), st.integers(1, 12), st.integers(1, 14), slos),
        max_size=9,
    ).map(tuple),
    blocks=st.integers(5, 16),
    seats=st.integers(1, 6),
    step_tokens=st.sampled_from([4, 16, 64]),
    turns=st.sampled_from([1, 1, 2]),
    cancels=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([0.0, 0.75, 3.0])), max_size=3).map(tuple),
    errors=st.frozensets(st.tuples(st.integers(0, 8), st.integers(0, 6)), max_size=2),
)


class Watch:
    """An observer that checks memory, tokens and ends against what came before."""

    def __init__(self, case: Case, scheduler: Scheduler) -> None:
        self.case, self.scheduler = case, scheduler
        self.ended: Counter[str] = Counter()
        self.outputs: Counter[str] = Counter()
        self.computed: defaultdict[str, float] = defaultdict(float)  # tokens whose keys and values exist
        self.submitted = 0

    def __call__(self, record):
        match record:
            case Submitted():
                self.submitted += 1
            case Decided(batch=batch) if batch is not None:
                self.began(batch)
            case Emitted(job=job, index=index):
                assert index == self.outputs[job.id], "an output was lost or came twice"
                self.outputs[job.id] += 1
            case Ended(job=job):
                self.ended[job.id] += 1
                assert job.num_blocks == 0
                assert job.reason or job.status == "done"

    def began(self, batch):
        assert len(batch.jobs) <= self.case.seats
        for job in batch.preempted:
            assert job not in batch.jobs and self.computed[job.id] > 0
            self.computed[job.id] = 0
        for job, size in zip(batch.jobs, batch.sizes, strict=True):
            if job.stage.name == "tool":
                continue
            if job.stage.phase == "decode":
                assert size == self.computed[job.id] + 1, "a decode that does not have its context"
                self.computed[job.id] = size
            else:
                if job.computed == 0:
                    self.computed[job.id] = 0
                assert job.computed == self.computed[job.id]
                assert 0 < size <= job.params["prompt_tokens"] + job.call_outputs - job.computed
                self.computed[job.id] += size
        held = sum(job.num_blocks for job in self.scheduler.jobs.values())
        assert held <= self.case.blocks, "more memory than there is"
        assert held == self.scheduler._used["gpu"]


def graph(turns):
    call = llm("llm", max_batch=6)
    if turns == 1:
        return Graph("chat", call), ("llm.prefill", "llm.decode")
    tool = Stage("tool", max_batch=2)
    return Graph("agent", loop(seq(call, tool), times=turns)), ("llm.prefill", "llm.decode", "tool")


def expected(case, at):
    """Outputs of a request that nothing befalls."""
    _, _, most, end, _ = case.requests[at]
    return min(most, end) * case.turns


def run(policy, case):
    model, stages = graph(case.turns)
    profiles = {**llm_profiles("llm", STEPS, 999), "tool": LinearProfile("tool", base=0.25, max_batch=2)}
    pool = Pool("gpu", stages, kv_cache=KVCache(case.blocks, BLOCK), step_tokens=case.step_tokens)
    scheduler = Scheduler([pool], policy, profiles)
    requests, now = [], 0.0
    for at, (gap, prompt, most, _, slo) in enumerate(case.requests):
        now += gap
        requests.append(Request(f"r{at}", model, now, slo, {"prompt_tokens": prompt, "max_tokens": most}))

    def outcome(batch):
        updates = []
        for job in batch.jobs:
            at = int(job.id[1:])
            if (at, job.outputs) in case.errors:
                updates.append(StageFailed("bad token"))
            elif job.stage.name == "tool":
                updates.append({})
            else:
                updates.append({"ended": job.call_outputs + 1 >= case.requests[at][3]})
        return updates

    watch = Watch(case, scheduler)
    clock = VirtualClock()
    for at, delay in case.cancels:
        if at < len(requests):
            clock.post(Cancel(f"r{at}", Future()), requests[at].arrival + delay)
    report = Engine(scheduler, {"gpu": ProfiledExecutor(outcome=outcome)}, clock, [watch]).run(requests)
    return report, watch, scheduler


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases)
def test_nothing_is_lost(name, case):
    case = Case(case.requests, case.blocks, 6, case.step_tokens, case.turns, case.cancels, case.errors)
    report, watch, scheduler = run(POLICIES[name](), case)
    assert report.submitted == len(case.requests) == sum(report.counts.values())
    assert not scheduler.jobs and scheduler._used["gpu"] == 0
    assert all(count == 1 for count in watch.ended.values())
    if not case.cancels and not case.errors:
        units = case.blocks * BLOCK
        for at, (_, prompt, most, end, slo) in enumerate(case.requests):
            fits = prompt + min(most, end) - 1 <= units
            if fits and slo == SLO() and f"r{at}" in watch.ended:
                assert watch.outputs[f"r{at}"] == expected(case, at)


def test_without_memory_pressure_everyone_gets_every_token():
    case = Case(tuple((0.25, 5, 8, 3 + at, SLO()) for at in range(6)), 100, 6, 16, 2, (), frozenset())
    for name in POLICIES:
        report, watch, _ = run(POLICIES[name](), case)
        assert report.counts["on_time"] == 6, name
        assert [watch.outputs[f"r{at}"] for at in range(6)] == [expected(case, at) for at in range(6)], name
        assert report.evictions == 0


def test_who_loses_its_memory_computes_it_again_and_repeats_no_token():
    requests = tuple((0.0, 6, 12, 14, SLO()) for _ in range(4))  # 18 tokens each in the end, room for 32
    case = Case(requests, 8, 6, 64, 1, (), frozenset())
    report, watch, _ = run(POLICIES["fcfs"](drop_hopeless=False), case)
    assert report.evictions > 0
    assert report.counts["on_time"] == 4
    assert set(watch.outputs.values()) == {12}
    assert report.to_dict()["evictions"] == report.evictions
