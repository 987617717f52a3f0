"""Language models under every policy, with too little memory, cancels and failures: nothing is lost, no token twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf

import pytest
from hand import free_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import (
    POLICIES,
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Member,
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
from neustream.core.events import Emitted, Ended
from neustream.core.kv_cache import KVCache
from neustream.core.steps import StepProfile
from neustream.engine.decision_time import DecisionTime
from neustream.engine.events import Cancel, Started
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
    decision_s: float = 0.0  # what a decision takes; above 0 steps are planned


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
    decision_s=st.sampled_from([0.0, 0.01, 0.2]),
)


class Watch(Scheduler):
    """A scheduler whose steps are checked, KV blocks and tokens, when they begin."""

    def __init__(self, pool, policy, profiles, case: Case) -> None:
        super().__init__([pool], policy, profiles)
        self.case = case
        self.computed: defaultdict[str, float] = defaultdict(float)  # tokens whose keys and values exist

    def next_batch(self, pool, now, worker=0):
        batch = super().next_batch(pool, now, worker)
        if batch is not None:
            self.began(batch)
        return batch

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
        held = sum(job.num_blocks for job in self.jobs.values())
        assert held <= self.case.blocks, "more blocks than there are"
        assert held == self.case.blocks - free_blocks(self)


class Told:
    """An observer that counts tokens and ends."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.outputs: Counter[str] = Counter()
        self.preempted = 0

    def __call__(self, record):
        match record:
            case Started(step=step):
                self.preempted += len(step.preempted)
            case Emitted(id=id, index=index):
                assert index == self.outputs[id], "an output was lost or came twice"
                self.outputs[id] += 1
            case Ended(id=id):
                self.ended[id] += 1
                assert record.reason or record.status == "done"


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
    pool = Pool("gpu", stages, kv_caches={"llm": KVCache(case.blocks, BLOCK)}, step_tokens=case.step_tokens)
    scheduler, watch = Watch(pool, policy, profiles, case), Told()
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

    clock = VirtualClock(DecisionTime(case.decision_s))
    for at, delay in case.cancels:
        if at < len(requests):
            clock.post(Cancel(f"r{at}", Future()), requests[at].arrival + delay)
    report = Engine(Member(scheduler, {"gpu": ProfiledExecutor(outcome=outcome)}), clock, [watch]).run(requests)
    return report, watch, scheduler


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases)
def test_nothing_is_lost(name, case):
    case = Case(case.requests, case.blocks, 6, case.step_tokens, case.turns, case.cancels, case.errors, case.decision_s)
    report, watch, scheduler = run(POLICIES[name](), case)
    assert report.submitted == len(case.requests) == sum(report.counts.values())
    assert not scheduler.jobs and free_blocks(scheduler) == case.blocks
    assert all(count == 1 for count in watch.ended.values())
    if not case.cancels and not case.errors:
        units = case.blocks * BLOCK
        for at, (_, prompt, most, end, slo) in enumerate(case.requests):
            fits = prompt + min(most, end) - 1 <= units
            if fits and slo == SLO() and f"r{at}" in watch.ended:
                assert watch.outputs[f"r{at}"] == expected(case, at)


def test_with_blocks_for_all_everyone_gets_every_token():
    case = Case(tuple((0.25, 5, 8, 3 + at, SLO()) for at in range(6)), 100, 6, 16, 2, (), frozenset())
    for name in POLICIES:
        report, watch, _ = run(POLICIES[name](), case)
        assert report.counts["on_time"] == 6, name
        assert [watch.outputs[f"r{at}"] for at in range(6)] == [expected(case, at) for at in range(6)], name
        assert report.preemptions == 0


def test_who_is_preempted_computes_its_cache_again_and_repeats_no_token():
    requests = tuple((0.0, 6, 12, 14, SLO()) for _ in range(4))  # 18 tokens each in the end, room for 32
    case = Case(requests, 8, 6, 64, 1, (), frozenset())
    report, watch, _ = run(POLICIES["fcfs"](drop_hopeless=False), case)
    assert report.preemptions == watch.preempted > 0
    assert report.counts["on_time"] == 4
    assert set(watch.outputs.values()) == {12}
    assert report.to_dict()["preemptions"] == report.preemptions
