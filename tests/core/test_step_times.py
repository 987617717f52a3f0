"""What steps take: one owner of expectations, of corrections and of how much real steps spread."""

from __future__ import annotations

import numpy as np
import pytest
from hand import seen

from neustream import FCFS, Decision, Graph, Pool, ProfileError, Request, Scheduler, Stage, TableProfile, loop
from neustream.core.learnt_steps import LearntSteps
from neustream.core.observed import BLOCK, BLOCKS, ENOUGH, FEW, HIGH, LASTING, LATEST, STALL, Ratios
from neustream.core.step_times import StepTimes
from neustream.core.work import Walk
from neustream.graphs import llm, llm_profiles

DRAW = Stage("draw", max_batch=4)
GRAPH = Graph("g", loop(DRAW, times=500))
PROFILE = TableProfile("draw", [1, 4], [1.0, 2.0])


def ratios(*values):
    some = Ratios()
    for value in values:
        some.add(value)
    return some


def run(scheduler, *ratios, pool="gpu", now=0.0):
    """Steps that take so many times what is expected of them; when the last one ends."""
    for ratio in ratios:
        batch = scheduler.next_batch(pool, now)
        now += ratio * batch.expected
        scheduler.finish(batch, [{}] * len(batch), now)
    return now


def scheduler_of(correct=False):
    scheduler = Scheduler([Pool("gpu", ("draw",))], FCFS(drop_hopeless=False), {"draw": PROFILE}, correct=correct)
    scheduler.submit(Request("r", GRAPH), 0.0)
    return scheduler


# -- between steps ----------------------------------------------------------------------------------


def test_what_is_decided_and_handed_over_before_a_step_is_part_of_what_it_takes():
    scheduler, now = scheduler_of(), 0.0
    for _ in range(BLOCK * FEW):
        batch = scheduler.next_batch("gpu", now + 0.2)  # 0.2 s until it is asked, 0.3 s for the decision
        batch = scheduler.begin(batch, now + 0.5)
        now += 0.5 + batch.expected
        scheduler.finish(batch, [{}], now)
    assert scheduler.times.speed["draw"] == pytest.approx(1.5, rel=0.02)


def test_a_worker_that_had_nothing_to_do_took_no_time_for_its_next_step():
    once = Graph("once", DRAW)
    scheduler = Scheduler([Pool("gpu", ("draw",))], FCFS(drop_hopeless=False), {"draw": PROFILE})
    for number in range(BLOCK * FEW):
        at = 10.0 * number
        scheduler.submit(Request(f"r{number}", once), at)
        batch = scheduler.next_batch("gpu", at)
        scheduler.finish(batch, [{}], at + batch.expected)
    assert scheduler.times.speed["draw"] == pytest.approx(1.0)


def test_a_worker_that_was_left_idle_on_purpose_is_free_from_when_it_is_asked_again():
    scheduler = scheduler_of()
    scheduler.finish(scheduler.next_batch("gpu", 0.0), [{}], 1.0)
    waits = type("Waits", (), {"decide": lambda self, view: Decision(wake_at=view.now + 4)})()
    assert scheduler.next_batch("gpu", 1.0, instead=waits) is None
    assert scheduler.next_batch("gpu", 5.0).begun_at == 5.0


# -- the spread -------------------------------------------------------------------------------------


def test_before_enough_steps_were_seen_a_step_is_expected_to_take_what_it_should():
    some = ratios(*[3.0] * (ENOUGH - 1))
    assert (some.typical, some.high, some.stalls) == (1.0, 1.0, 0.0)
    some.add(3.0)
    assert (some.typical, some.high, some.stalls) == (3.0, 3.0, 0.0)


def test_the_spread_is_the_median_a_high_quantile_and_the_share_of_stalls():
    steps = [1.0] * 16 + [1.5] * 2 + [1.0 * STALL + 0.1] * 2
    some = ratios(*steps)
    assert HIGH == 0.9
    assert some.typical == 1.0
    assert 1.5 <= some.high <= STALL + 0.1
    assert some.stalls == pytest.approx(2 / 16, abs=0.03)  # of those that were seen when it was last computed


@pytest.mark.parametrize("count", [ENOUGH, 2 * ENOUGH, LATEST, 2 * LATEST])
def test_the_spread_is_numpys_of_the_latest_steps(count):
    steps = np.exp(np.random.RandomState(count).randn(count) * 0.5)
    some, latest = ratios(*steps), steps[-LATEST:]
    typical, high = np.quantile(latest, (0.5, HIGH))
    assert (some.typical, some.high, some.stalls) == (typical, high, (latest > STALL * typical).mean())
    assert some.error == pytest.approx(np.median(np.abs(latest / typical - 1)))
    some.rescale(2.0)
    assert some.typical == 2 * typical


def test_one_stall_moves_neither_the_typical_nor_the_high_step():
    some = ratios(*[1.0] * 39, 500.0)
    assert (some.typical, some.high, some.stalls) == (1.0, 1.0, 1 / 40)


def test_old_steps_are_forgotten():
    some = ratios(*[9.0] * LATEST, *[1.0] * LATEST)
    assert (some.typical, some.high, some.stalls, some.full) == (1.0, 1.0, 0.0, True)


def test_a_mean_that_starts_anew_takes_the_spread_with_it():
    some = ratios(*[3.0] * 40)
    assert some.typical == 3.0
    some.reset_mean()
    assert (some.mean, some.median, some.typical, some.high, some.stalls) == (1.0, 1.0, 1.0, 1.0, 0.0)
    for _ in range(ENOUGH):
        some.add(2.0)
    assert (some.typical, some.high) == (2.0, 2.0)


def test_the_usual_speed_ignores_a_phase_that_takes_less_than_half_of_the_blocks():
    some = ratios(*[1.0] * (BLOCK * 11), *[2.0] * (BLOCK * 9))
    assert some.usual == 1.0 and some.mean > 1.9
    for _ in range(BLOCK * 2):
        some.add(2.0)
    assert some.usual == 2.0 and BLOCKS == 20


def test_the_usual_speed_is_that_of_blocks_not_of_single_steps():
    some = ratios(*[0.75, 0.75, 1.5] * (BLOCK * 2))
    assert some.usual == pytest.approx(1.0, abs=0.08)  # what steps take on average; their median is 0.75


# -- one owner --------------------------------------------------------------------------------------


def test_a_slow_phase_at_the_start_is_not_the_usual_speed():
    some = ratios(*[3.0] * (BLOCK * 2))
    assert some.usual == 1.0
    for _ in range(BLOCK):
        some.add(3.0)
    assert some.usual > 2.5, "it lasts"
    assert FEW == 5


def test_views_and_the_scheduler_tell_the_same_spread():
    scheduler = scheduler_of()
    run(scheduler, *[1.25] * ENOUGH)
    view = seen(scheduler, 99.0)
    assert view.spread is scheduler.times.spread and view.profiles is scheduler.times.profiles
    assert view.spread["draw"].typical == 1.25
    assert view.speed == {"draw": view.spread["draw"].usual}


def test_a_correction_moves_what_was_off_into_the_profile_and_out_of_the_speed():
    scheduler = scheduler_of(correct=True)
    now = run(scheduler, *[1.5] * (BLOCK * LASTING - 1))
    times, before = scheduler.times, scheduler.times.profiles
    assert times.speed["draw"] == 1.5 and times.corrections == {}
    run(scheduler, 1.5, now=now)
    assert times.corrections == {"draw": {0: 1.5}}
    ratios = times.spread["draw"]
    assert times.speed["draw"] == pytest.approx(1.0) and ratios.typical == pytest.approx(1.0)
    assert ratios.mean == pytest.approx(1.0, abs=0.01)
    assert times.profiles["draw"].latency(1) == times.alone(DRAW, 0.0) == 1.5
    assert before["draw"] is PROFILE, "views that were handed out keep what they showed"
    batch = scheduler.next_batch("gpu", 99.0)
    assert batch.expected == 1.5 and batch.profiled == 1.0, "the profile as it was given"


def test_a_slow_phase_corrects_no_profile_and_is_not_the_usual_speed():
    scheduler = scheduler_of(correct=True)
    now = run(scheduler, *[1.0] * (BLOCK * 6))
    run(scheduler, *[2.0] * (BLOCK * 5), now=now)
    assert scheduler.times.corrections == {}
    assert scheduler.times.speed["draw"] == pytest.approx(1.0)


def test_what_learns_has_no_speed_beside_it():
    learnt = LearntSteps()
    profiles = llm_profiles("llm", learnt, 8)
    scheduler = Scheduler([Pool("gpu", tuple(profiles))], FCFS(drop_hopeless=False), profiles)
    params = {"prompt_tokens": 4, "max_tokens": 50}
    scheduler.submit(Request("r", Graph("chat", llm("llm", max_batch=8)), params=params), 0.0)
    run(scheduler, *[3.0] * 20)
    assert learnt.observed == 20
    assert scheduler.times.speed == {}
    assert scheduler.times.spread["llm.decode"].count == 19


def test_without_a_base_the_profiled_seconds_are_the_learnt_ones():
    learnt = LearntSteps(guess_s=0.5)
    times = StepTimes(llm_profiles("llm", learnt, 8))
    job = Walk(Request("r", Graph("chat", llm("llm", max_batch=8)), params={"prompt_tokens": 4, "max_tokens": 5})).job
    expected = times.expect([job], [4.0])
    assert (expected.seconds, expected.profiled) == (0.5, 0.5)


def test_a_step_of_no_expected_time_says_nothing():
    class Free:
        name, device, max_batch = "free", "", 4

        def latency(self, batch, total=0.0, square=0.0):
            return 0.0

    scheduler = Scheduler([Pool("gpu", ("draw",))], FCFS(drop_hopeless=False), {"draw": Free()})
    scheduler.submit(Request("r", GRAPH), 0.0)
    scheduler.finish(scheduler.next_batch("gpu", 0.0), [{}], 1.0)
    assert scheduler.times.spread == scheduler.times.speed == {}


def test_a_stage_without_a_profile_is_named():
    with pytest.raises(ProfileError, match="stage 'draw' has no profile"):
        StepTimes({}).alone(DRAW, 0.0)


def test_the_most_jobs_of_a_step_are_those_that_stage_and_profile_allow():
    assert StepTimes({"draw": PROFILE}).limit(DRAW) == 4
    assert StepTimes({"draw": TableProfile("draw", [1], [1.0])}).limit(DRAW) == 1
    assert StepTimes({"draw": PROFILE}).limit(Stage("draw", max_batch=2)) == 2
