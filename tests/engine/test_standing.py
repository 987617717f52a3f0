"""Steps that stand: a simulation that works them out together tells the very same as one that does them one by one."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from neustream import (
    SLO,
    Engine,
    Graph,
    KVCache,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    VirtualClock,
    call,
    loop,
    par,
    seq,
    tool,
)
from neustream.by_name import make_policy
from neustream.core.learnt_steps import LearntSteps
from neustream.core.pools import Pools
from neustream.core.standing import Standing
from neustream.core.steps import StepProfile
from neustream.engine.events import Call, Cancel, Decided
from neustream.experiment.ends import Ends
from neustream.graphs import llm, llm_profiles

A, B = llm("a", max_batch=6), llm("b", max_batch=6)
SEARCH = tool("search")
DENOISE = Stage("denoise", max_batch=4)
GRAPHS = [
    Graph("chat", A),
    Graph("other", B),
    Graph("chain", seq(call(A, "plan"), SEARCH, call(B, "look"), call(A, "write"))),
    Graph("wide", seq(par(x=call(A, "x"), y=call(B, "y"), z=SEARCH), call(A, "sum"))),
    Graph("image", seq(loop(DENOISE, times="steps"), Stage("decode"))),
]
STEPS = StepProfile(
    "p",
    LinearProfile("p", base=0.02, per_size=1e-4, max_batch=64),
    LinearProfile("d", base=0.01, per_job=5e-4, per_size=1e-6, max_batch=64),
)
SLOS = [
    SLO(),
    SLO(total=2.0),
    SLO(first=0.3, step=0.02),
    SLO(total=6.0),
    SLO(total=1.0, finish=True),
    SLO(first=0.2, step=0.012, finish=True),
    SLO(total=60.0),
]


class Unforeseeing:
    """An executor that says nothing beforehand."""

    def __init__(self, executor: ProfiledExecutor) -> None:
        for name in ("start", "release", "put_aside", "forgets", "close", "here", "alone_s"):
            setattr(self, name, getattr(executor, name))


@dataclass(frozen=True)
class Case:
    """`requests`: gap before it, graph, SLO, prompt, most outputs, outputs; `cancels`: of which, and how long after it
    came; `looks`: when somebody looks at the jobs."""

    requests: list[tuple[float, int, int, int, int, int]]
    blocks: int
    noise: float
    scale: float
    correct: bool
    learns: bool
    cancels: list[tuple[int, float]]
    looks: list[float]


cases = st.builds(
    Case,
    st.lists(
        st.tuples(
            st.floats(0, 0.6),
            st.integers(0, len(GRAPHS) - 1),
            st.integers(0, len(SLOS) - 1),
            st.integers(1, 90),
            st.integers(1, 70),
            st.integers(1, 70),
        ),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from([12, 18, 60, 1000]),
    st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    st.sampled_from([1.0, 1.0, 0.8, 1.6]),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 13), st.floats(0, 1.5)), max_size=3),
    st.lists(st.floats(0, 6), max_size=3),
)


def told(case, policy, foreseeing):
    """All records of a run, and what the jobs looked like whenever somebody looked."""
    draw = np.random.default_rng(0)
    records, seen = [], []
    caches = {"a": KVCache(case.blocks, 16), "b": KVCache(case.blocks, 16, host_blocks=8)}
    pools = [
        Pool("gpu", ("a.prefill", "a.decode", "denoise", "decode"), kv_caches={"a": caches["a"]}),
        Pool("more", ("b.prefill", "b.decode"), kv_caches={"b": caches["b"]}),
        Pool("tools", ("search",), concurrency=8),
    ]
    profiles = {
        **{
            k: v
            for name in "ab"
            for k, v in llm_profiles(name, LearntSteps(STEPS) if case.learns else STEPS, 6).items()
        },
        "search": LinearProfile("search", base=0.2, max_batch=1),
        "denoise": LinearProfile("denoise", base=0.02, per_job=0.005, max_batch=4),
        "decode": LinearProfile("decode", base=0.03, max_batch=1),
    }
    scheduler = Scheduler(
        pools, {name: make_policy(policy) for name in ("gpu", "more")}, profiles, correct=case.correct
    )
    requests, now = [], 0.0
    for at, (gap, graph, slo, prompt, most, end) in enumerate(case.requests):
        now += gap
        params = {"prompt_tokens": prompt, "max_tokens": most, "ends": end, "steps": end}
        requests.append(Request(f"r{at}", GRAPHS[graph], now, SLOS[slo], params))
    ends = Ends({})
    executor = ProfiledExecutor(
        stretch=lambda batch: case.scale * float(np.exp(draw.normal(0, case.noise))), outcome=ends, quiet=ends.quiet
    )
    runs = executor if foreseeing else Unforeseeing(executor)
    clock = VirtualClock()
    for at, delay in case.cancels:
        if at < len(requests):
            clock.post(Cancel(f"r{at}", Future()), requests[at].arrival + delay)
    for at in case.looks:
        clock.post(
            Call(lambda now: seen.append([now, *map(state_of, scheduler.jobs.values()), scheduler.kv_blocks])), at
        )
    member = Member(scheduler, {"gpu": runs, "more": runs, "tools": ProfiledExecutor()})
    Engine(member, clock, [records.append]).run(requests)
    return [plain(record) for record in records], seen, scheduler


def plain(record):
    """A record without the real seconds that a decision took."""
    if type(record) is Decided:
        return record.pool, record.at, record.ahead, record.requests, record.new
    return record


def state_of(job):
    names = (
        "id status stage output outputs call_outputs late remaining_s next_output_s unit_s size due_next num_blocks "
        "host_blocks skipped ran_last worker started_at first_at computed"
    )
    return [getattr(job, name) for name in names.split()] + [
        dict(job.calls_left),
        job.cursor and job.cursor.save(job.request.graph),
    ]


@pytest.mark.parametrize("policy", ["priced", "fcfs", "edf", "neustream_llm"])
@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=cases)
def test_what_is_told_is_the_same(policy, case):
    one_by_one, together = told(case, policy, False), told(case, policy, True)
    assert together[0] == one_by_one[0]
    assert together[1] == one_by_one[1]
    assert not together[2].busy


def test_most_steps_of_a_long_generation_are_worked_out_together(monkeypatch):
    looked = []
    catch_up = Standing.catch_up
    monkeypatch.setattr(Standing, "catch_up", lambda self: (looked.append(self._ended), catch_up(self)))
    case = Case([(0.0, 0, 6, 20, 200, 200), (0.0, 0, 6, 20, 200, 200)], 1000, 0.0, 1.0, False, False, [], [])
    told(case, "priced", True)
    assert sum(looked) > 150 and len([steps for steps in looked if steps]) < 20


def test_pools_whose_steps_stand_no_more_are_each_caught_up_once():
    """An agent's tools are a pool each, and each of its steps may ask for it: it costs as many looks as pools."""

    class Counted:
        caught_up = 0

        def catch_up(self):
            self.caught_up += 1

    pools, many = Pools(), [SimpleNamespace(standing=Counted()) for _ in range(20)]
    standing = [state.standing for state in many]
    pools.update(zip(map(str, range(20)), many, strict=True))
    pools.none_stands()
    assert [one.caught_up for one in standing] == [1] * 20
    assert not any(state.standing for state in many)
