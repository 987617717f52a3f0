"""`priced` says until when a step of texts stands, and decides as if it were asked before each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from counted import Counted
from hand import seen
from texts_by_hand import CHAT, STAGES, STEPS, ask, scheduler_with

from neustream import SLO, Engine, Member, Pool, Priced, ProfiledExecutor, Request, Scheduler, VirtualClock
from neustream.core.policies.token_again import AGAIN, FULL_AGAIN, LATE_AGAIN, LONGER
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.engine.events import Started
from neustream.graphs import llm_profiles

LAX = {"first": 1.0, "step": 0.05}


def made(some, now=0.0, **tokens):
    return Priced(tokens=TokenDeadlines(**tokens)).decide(seen(some, now))


def test_decodes_in_time_run_again_for_some_steps():
    decision = made(scheduler_with([ask("r0", **LAX), ask("r1", **LAX)]))
    assert decision.within == pytest.approx(LONGER * 0.012)
    assert decision.until == pytest.approx(AGAIN * decision.within)


def test_late_ones_beside_them_are_looked_at_sooner():
    some = scheduler_with([ask("r0", **LAX), ask("r1", **LAX)])
    some.jobs["r1"].late = True
    decision = made(some)
    assert len(decision.jobs) == 2
    assert decision.until == pytest.approx(LATE_AGAIN * decision.within)


def test_where_there_is_no_room_for_a_prompt_it_is_looked_for_again_after_a_few_steps():
    """The five blocks are those of the one that decodes, and of its next output."""
    some = scheduler_with([ask("r0", prompt=78, **LAX)], [ask("w0", **LAX)], blocks=5)
    decision = made(some)
    assert len(decision.jobs) == 1
    assert decision.until == pytest.approx(FULL_AGAIN * decision.within)
    hurried = scheduler_with([ask("r0", prompt=78, **LAX)], [ask("w0", first=0.05, step=0.05)], blocks=5)
    assert made(hurried).until == -math.inf


@pytest.mark.parametrize(
    ("waiting", "tokens"),
    [([ask("w0", first=0.001, step=0.05)], {}), ([ask("w0", **LAX)], {}), ([], {"steady": True})],
    ids=["one is given up", "a prompt runs", "outputs are to come at their pace"],
)
def test_it_does_not_stand_where_the_next_step_is_another_one(waiting, tokens):
    assert made(scheduler_with([ask("r0", **LAX)], waiting), **tokens).until == -math.inf


def test_it_does_not_stand_where_they_may_soon_leave_the_device_free():
    """Requests that can wait for 3 ms, less than a decode takes, come now and then."""
    some = scheduler_with([ask("r0", prompt=1, first=0.013, step=0.05)])
    assert made(some, pause=0).until > 0
    assert made(some).until == -math.inf


def test_a_step_that_makes_somebody_late_has_it_asked():
    """It takes 95 ms in place of 12: r0 had 68, r1 more."""
    some = scheduler_with([ask("r0", first=0.02, step=0.03), ask("r1", **LAX)])
    rule = Counted()
    some._pools["gpu"].policy = rule
    now = 0.0
    for seconds in (0.012, 0.095, 0.012):
        batch = some.next_batch("gpu", now)
        now += seconds
        some.finish(batch, [{"ended": False}] * len(batch.jobs), now)
    assert rule.asked == 2


def served(seed, rule, noise):
    """The steps of a run, with when each began."""
    draw = np.random.default_rng(seed)
    slos = [SLO(first=0.4, step=0.03), SLO(first=1.0, step=0.06), SLO(total=6.0), SLO(first=1.0)]
    arrivals = np.cumsum(draw.exponential(0.15, 60)).tolist()
    requests = [
        Request(f"r{at}", CHAT, arrival, slos[draw.integers(4)], {"prompt_tokens": int(draw.integers(5, 90))})
        for at, arrival in enumerate(arrivals)
    ]
    requests = [replace(r, params={**r.params, "max_tokens": 60}) for r in requests]
    ends = {request.id: int(draw.integers(1, 60)) for request in requests}
    steps = []

    def see(record):
        if isinstance(record, Started):
            steps.append((sorted(record.step.ids), round(record.at, 9)))

    executor = ProfiledExecutor(
        stretch=lambda batch: float(np.exp(draw.normal(0, noise))),
        outcome=lambda batch: [{"ended": job.call_outputs + 1 >= ends[job.id]} for job in batch.jobs],
    )
    scheduler = Scheduler([Pool("gpu", STAGES)], rule, llm_profiles("llm", STEPS, 64))
    Engine(Member(scheduler, {"gpu": executor}), VirtualClock(), [see]).run(requests)
    return steps


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steps_are_those_of_a_rule_that_is_asked_each_time(seed, noise):
    seldom, often = Counted(), Counted(always=True)
    assert served(seed, seldom, noise) == served(seed, often, noise)
    assert seldom.asked < 0.5 * often.asked
