"""Chances of requests that go through several calls whose lengths are not known."""

import numpy as np
import pytest
from hand import Hand, seen

from neustream import (
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
    VirtualClock,
    call,
    loop,
    par,
    seq,
)
from neustream.core.lengths import Lengths
from neustream.core.policies import EDF, Priced
from neustream.core.policies.way_ahead import SHARES, legs_of_job, likely
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "steps",
    LinearProfile("prefill", base=0.02, per_size=1e-4, max_batch=64),
    LinearProfile("decode", base=0.02, per_job=1e-3, per_size=1e-6, max_batch=64),
)
MODELS = ("one", "two", "three")
MOST = 300


def drawn(count, seed):
    """How many outputs each call of each request makes: log-normal, far below their maximum."""
    lengths = np.random.default_rng(seed).lognormal(np.log(60), 0.6, (count, len(MODELS)))
    return np.clip(lengths, 8, MOST).astype(int).tolist()


def chain(policy, *, rate, seed, count=40, total=7.0):
    """A chain of a call of each model, each on a device of its own; what came of the requests."""
    calls = drawn(count, seed)
    arrivals = np.random.default_rng(seed + 1).exponential(1 / rate, count).cumsum().tolist()
    graph = Graph("chain", seq(*[llm(name, prompt=lambda job: 100, max_tokens=lambda job: MOST) for name in MODELS]))
    profiles = {stage: one for name in MODELS for stage, one in llm_profiles(name, STEPS).items()}
    pools = [Pool(name, (f"{name}.prefill", f"{name}.decode")) for name in MODELS]

    def outcome(batch):
        return [
            {"ended": job.call_outputs + 1 >= job.params["calls"][MODELS.index(job.stage.model)]} for job in batch.jobs
        ]

    executors = {pool.name: ProfiledExecutor(outcome=outcome) for pool in pools}
    requests = [Request(f"r{at}", graph, arrivals[at], SLO(total=total), {"calls": calls[at]}) for at in range(count)]
    return Engine(Member(Scheduler(pools, policy, profiles), executors), VirtualClock()).run(requests).counts


@pytest.mark.parametrize(("rate", "seed"), [(2.0, 5), (2.0, 6)])
def test_where_there_is_time_for_all_nobody_is_given_up_by_a_guess_at_its_length(rate, seed):
    """Medians of what calls took once decided as if they were certain."""
    ours, edf = (chain(policy, rate=rate, seed=seed)["on_time"] for policy in (Priced(), EDF()))
    assert ours >= 0.95 * edf > 0


def test_who_can_be_in_time_no_more_is_given_up_also_where_nobody_waits():
    counts = chain(Priced(), rate=0.1, seed=7, count=12, total=4.5)
    assert counts["late"] == 0 and counts["on_time"] > 0 and counts["dropped"] > 0


def test_a_generation_may_get_as_long_as_any_before_it():
    lengths = Lengths()
    for outputs in (16, 32, 64, 128) * 8:
        for made in range(1, outputs + 1):
            lengths.reached(made)
        lengths.ended(outputs, MOST)
    fresh = likely(lengths, 0, MOST)
    assert len(fresh) == len(SHARES) and fresh[0] <= 24 and 120 <= fresh[-1] <= 136
    assert (np.diff(fresh) > 0).all()
    assert likely(lengths, 40, MOST)[0] >= 16, "it is of the longer ones by now"
    assert likely(lengths, 0, 20).max() == 20 and likely(None, 0, 1).tolist() == [1.0] * len(SHARES)


def test_short_answers_that_fill_their_maximum_do_not_make_long_ones_fill_theirs():
    """Chats of 18 outputs fill 18; plans of at most 440 end by themselves."""
    lengths, plans = Lengths(), Lengths()
    for known, chats in ((lengths, 80), (plans, 0)):
        for outputs, most, times in ((18, 18, chats), (88, 440, 5)):
            for _ in range(times):
                for made in range(1, outputs + 1):
                    known.reached(made)
                known.full(most) if outputs == most else known.ended(outputs, most)
    assert (lengths.ends, lengths.filled) == (5, 80)
    assert np.median(likely(plans, 96, 344)) <= np.median(likely(lengths, 96, 344)) < 300
    assert likely(lengths, 8, 10).min() == 10, "of their own kind all fill it"


def test_chances_at_points_of_each_are_those_at_common_points():
    lengths = Lengths()
    for outputs in (16, 32, 64, 128) * 8:
        for made in range(1, outputs + 1):
            lengths.reached(made)
        lengths.ended(outputs, MOST)
    made, horizon = np.array([0.0, 40.0, 500.0]), np.array([0.0, 20.0, 90.0, 900.0])
    each = np.broadcast_to(horizon, (3, 4))
    assert (lengths.lasts(made, each, MOST) == lengths.ahead(made, horizon, MOST)).all()


def test_rounds_of_a_loop_are_calls_of_their_own():
    turn = seq(llm("one", prompt=lambda job: 100, max_tokens=lambda job: 30), Stage("tool"))
    graph = Graph("loop", loop(turn, times=3))
    profiles = llm_profiles("one", STEPS) | {"tool": LinearProfile("tool", base=0.5, max_batch=1)}
    pools = [Pool("gpu", ("one.prefill", "one.decode")), Pool("tools", ("tool",), concurrency=8)]
    scheduler = Scheduler(pools, {"gpu": Hand()}, profiles)
    job = scheduler.submit(Request("r", graph, 0.0, SLO(total=60.0)), 0.0)
    view = seen(scheduler)
    here, *behind = legs_of_job(view, job)
    assert here.outputs == tuple(likely(None, 0, 29)) and here.pool == "gpu"
    rest = next(leg for leg in behind if leg.outputs)
    assert rest.outputs == tuple(2 * outputs for outputs in here.outputs)
    assert rest.once == pytest.approx(2 * here.once)
    assert sum(leg.alone for leg in behind if not leg.outputs) == pytest.approx(3 * 0.5)


def test_a_branch_is_not_hopeless_by_the_maximum_of_what_follows_its_join():
    one, two = (llm(name, prompt=lambda job: 100, max_tokens=lambda job: MOST) for name in MODELS[:2])
    graph = Graph("wide", seq(par(a=call(one, "a"), b=call(one, "b")), call(two, "sum")))
    profiles = {stage: profile for name in MODELS[:2] for stage, profile in llm_profiles(name, STEPS).items()}
    pools = [Pool("gpu", ("one.prefill", "one.decode")), Pool("other", ("two.prefill", "two.decode"))]
    scheduler = Scheduler(pools, {"gpu": Hand(), "other": Hand()}, profiles)
    scheduler.submit(Request("r", graph, 0.0, SLO(total=5.0)), 0.0)
    branches = seen(scheduler).jobs
    assert len(branches) == 2 and all(job.remaining_s > 5.0 for job in branches)
    assert seen(scheduler).hopeless() == {}
    assert set(seen(scheduler, 4.99).hopeless()) == set(branches)
