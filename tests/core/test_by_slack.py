"""Rules that go by slack: least laxity, Symphony's deferred batches, slack ranked."""

from __future__ import annotations

import math

import pytest
from hand import chosen, dropped, ids, seen
from images import (
    IMAGE,
    LOOP,
    PREVIEW,
    PROFILES,
    ask,
    run,
    units,
    waiting,
)
from toys import batches, engine

from neustream import (
    EDF,
    ConfigError,
    EventLog,
    LeastLaxity,
    SlackRanked,
    Symphony,
    TableProfile,
    View,
)

# -- least laxity -----------------------------------------------------------------------------------


def test_least_laxity_runs_who_can_idle_the_least():
    some = units((4, 20.0), (9, 22.0), (2, 16.0), (3, 20.0), (5, 30.0))  # slack 16, 13, 14, 17, 25
    assert chosen(LeastLaxity(), some) == ["r1", "r2", "r0", "r3"]
    assert chosen(EDF(), some) == ["r2", "r0", "r3", "r1"]


def test_least_laxity_changes_its_mind_as_slack_is_spent():
    some = units((4, 20.0), (4, 20.5), (4, 20.25), (4, 20.75), (4, 20.875))
    assert chosen(LeastLaxity(), some) == ["r0", "r2", "r1", "r3"]
    run(some, "r0", "r1", "r2", "r3", now=1.0)  # they have one step less to do, so one second more to idle
    assert chosen(LeastLaxity(), some, now=1.0) == ["r4", "r0", "r2", "r1"]


def test_least_laxity_counts_the_next_output_too():
    some = waiting(ask("r0", total=50.0), ask("r1", total=90.0, first=40.0), ask("r2", total=45.0))
    assert chosen(LeastLaxity(), some) == ["r1", "r2", "r0"]


def test_least_laxity_gives_up_the_hopeless_unless_told_not_to():
    some = waiting(ask("r0"), ask("r1", total=1.0))
    assert (chosen(LeastLaxity(), some), dropped(LeastLaxity(), some)) == (["r0"], ["r1"])
    patient = LeastLaxity(drop_hopeless=False)
    assert (chosen(patient, some), dropped(patient, some)) == (["r1", "r0"], [])


# -- symphony ---------------------------------------------------------------------------------------

DEFERRED = Symphony(defer_loops=True)
EAGER = Symphony(margin_s=1e6)  # as if nothing could wait


def waits_until(policy, some, now=0.0):
    decision = policy.decide(seen(some, now))
    assert not decision.jobs
    return decision.wake_at


def test_symphony_waits_while_one_more_could_still_join_in_time():
    some = waiting(ask("r0", steps=4, total=20.0))
    assert waits_until(DEFERRED, some) == 20.0 - (0.5 + 4 * 1.25 + 0.25)  # in batches of two
    assert chosen(DEFERRED, some, now=14.25) == ["r0"]  # a second of slack is left: alone it takes 4.75
    some.submit(ask("r1", steps=4, arrival=3.0, total=30.0), 3.0)
    assert waits_until(DEFERRED, some, now=3.0) == 20.0 - (0.5 + 4 * 1.5 + 0.25)  # in batches of three
    assert chosen(DEFERRED, some, now=13.25) == ["r0", "r1"]


def test_symphony_waits_for_its_most_urgent_member():
    some = waiting(ask("r0", steps=4, total=20.0), ask("r1", steps=1, total=12.0))
    assert waits_until(DEFERRED, some) == 12.0 - (0.5 + 1.5 + 0.25)
    assert waits_until(Symphony(defer_loops=True, margin_s=0.5), some) == 12.0 - (0.5 + 1.5 + 0.25) - 0.5


def test_symphony_waits_no_longer_than_its_batch_as_it_is_can_where_a_larger_one_is_faster():
    view = seen(units((4, 20.0)))
    bumpy = {"unet": TableProfile("unet", [1, 2], [3.0, 1.0])}
    decision = DEFERRED.decide(View(view.now, view.pool, view.worker, view.queues, bumpy))
    assert decision.wake_at == 20.0 - 4 * 3.0


def test_symphony_starts_a_full_batch_at_once():
    some = units(*[(4, 100.0)] * 3)
    assert waits_until(DEFERRED, some) == 100.0 - 4 * 4.0
    some.submit(ask("r3", 4, total=100.0, graph=LOOP), 0.0)
    assert chosen(DEFERRED, some) == ["r0", "r1", "r2", "r3"]


def test_symphony_starts_at_once_what_was_promised_nothing():
    assert chosen(DEFERRED, waiting(ask("r0"), ask("r1"))) == ["r0", "r1"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_symphony_runs_the_largest_batch_whose_members_all_make_it(total, most):
    some = units(*[(4, total)] * 4)
    assert len(chosen(EAGER, some)) == most
    assert len(chosen(DEFERRED, some)) == most  # none of these may wait: who is left out has to


def test_symphony_leaves_out_of_a_batch_who_would_not_make_it_there():
    some = units((4, 4.5), (4, 90.0), (4, 80.0))
    assert (chosen(DEFERRED, some), dropped(DEFERRED, some)) == (["r2", "r1"], [])
    assert dropped(DEFERRED, some, now=1.0) == ["r0"]


def test_symphony_joins_a_running_loop_at_its_next_step():
    some = units((9, 90.0))
    assert waits_until(DEFERRED, some) == 90.0 - 9 * 1.25
    assert chosen(Symphony(defer_loops=False), some) == ["r0"]
    run(some, "r0", now=1.0)
    some.submit(ask("r1", 9, arrival=1.0, total=90.0, graph=LOOP), 1.0)
    assert chosen(DEFERRED, some, now=1.0) == ["r0", "r1"]


def test_symphony_runs_other_stages_while_one_waits():
    some = waiting(ask("r0", 9), ask("r1", 4, total=20.0))
    run(some, "r0")
    # r1 would share its steps with r0 and one more, 0.5 + 4 * 1.5 + 0.25; a step of r0 goes first
    assert chosen(DEFERRED, some, now=0.0) == ["r0"]
    assert chosen(DEFERRED, some, now=12.0) == ["r0"]
    assert chosen(DEFERRED, some, now=12.25) == ["r1"]


def test_symphony_fills_the_batches_of_a_decoder_while_the_loop_goes_on():
    some = waiting(ask("r0", 1, total=50.0), ask("r1", 3, total=50.0))
    run(some, "r0", "r1")
    run(some, "r0", "r1", now=1.25)
    assert {stage: ids(jobs) for stage, jobs in seen(some).queues.items()} == {"vae": ["r0"], "unet": ["r1"]}
    for now in (1.25, 2.25):
        assert chosen(DEFERRED, some, now=now) == ["r1"]
        run(some, "r1", now=now)
    assert chosen(DEFERRED, some, now=3.25) == ["r0", "r1"]  # full


def test_symphony_wakes_in_time_for_everyone():
    arrivals, log = (0.0, 3.0, 13.5, 16.0), EventLog()
    work = [ask(f"r{at}", 4, arrival, 20.0) for at, arrival in enumerate(arrivals)]
    report = engine(IMAGE, {name: PROFILES[name] for name in IMAGE.stages}, DEFERRED, observers=[log]).run(work)
    assert report.counts["on_time"] == 4
    assert [stage for stage, _ in batches(log)[:5]] == ["text", "unet", "unet", "text", "unet"]
    assert batches(log)[0] == ("text", ["r0", "r1"])
    assert log.steps[0]["start"] == 20.0 - (0.5 + 4 * 1.5 + 0.25)
    assert batches(log)[3] == ("text", ["r2", "r3"])


@pytest.mark.parametrize("margin", [-1.0, math.inf, math.nan])
def test_symphony_refuses_a_margin_that_is_no_time(margin):
    with pytest.raises(ConfigError, match="margin_s must be a time >= 0"):
        Symphony(margin_s=margin)


# -- slack ranked -----------------------------------------------------------------------------------


def test_slack_ranked_runs_the_least_slack_first():
    some = units((4, 90.0), (9, 92.0), (2, 86.0), (3, 90.0), (5, 99.0))  # slack 86, 83, 84, 87, 94
    assert chosen(SlackRanked(), some) == ["r1", "r2", "r0", "r3"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_slack_ranked_runs_the_largest_batch_that_keeps_its_deadlines(total, most):
    assert len(chosen(SlackRanked(), units(*[(4, total)] * 4))) == most


def test_slack_ranked_lets_wait_who_would_not_make_it_in_a_larger_batch():
    some = units((4, 4.5), (4, 90.0), (4, 80.0))
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == (["r2", "r1"], [])


def test_slack_ranked_counts_the_next_output_as_slowed_down_like_the_whole():
    some = waiting(*[ask(f"r{at}", 4, total=90.0, first=4.0, graph=PREVIEW) for at in range(2)])
    assert chosen(SlackRanked(), some) == ["r0", "r1"]
    loops = [ask(f"r{at}", 4, total=90.0, first=first, graph=LOOP) for at, first in enumerate((5.5, 5.5, 6.0))]
    assert chosen(SlackRanked(), waiting(*loops)) == ["r0", "r1"]  # 1.25 times 4 s by 5.5 s, not 1.5 times


def newcomer(steps_and_totals):
    """r0 and r1 have run a step until 1.25 and have four left; r2 comes then, as urgent as can be for two."""
    some = units(*[(5, 1.25 + total) for total in steps_and_totals])
    run(some, "r0", "r1", now=1.25)
    some.submit(ask("r2", 4, arrival=1.25, total=5.25, graph=LOOP), 1.25)
    return some


def test_slack_ranked_preempts_who_can_afford_it():
    # two to a step, four steps take 5 s; a step without r0 1.25 s more, which it has and r1 has not
    assert chosen(SlackRanked(), newcomer([6.5, 5.5]), now=1.25) == ["r1", "r2"]


def test_slack_ranked_preempts_nobody_who_cannot():
    assert chosen(SlackRanked(), newcomer([5.75, 5.5]), now=1.25) == ["r1", "r0"]  # r2 has less slack, and waits
    assert dropped(SlackRanked(), newcomer([5.75, 5.5]), now=1.25) == []


def test_slack_ranked_takes_no_size_that_makes_late_who_cannot_be_preempted():
    some = units((5, 1.25 + 5.5))
    run(some, "r0", now=1.25)
    for name in ("r1", "r2", "r3"):
        some.submit(ask(name, 4, arrival=1.25, total=90.0, graph=LOOP), 1.25)
    assert chosen(SlackRanked(), some, now=1.25) == ["r0", "r1"]  # three take 6 s
    some.cancel("r0", 1.25)
    some.submit(ask("r4", 4, arrival=1.25, total=5.5, graph=LOOP), 1.25)  # as urgent, but not running
    assert chosen(SlackRanked(), some, now=1.25) == ["r1", "r2", "r3"]


def test_slack_ranked_serves_the_hopeless_last_or_never():
    some = units((4, 3.0), (4, 90.0), (4, 2.0))
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == (["r1"], ["r0", "r2"])
    patient = SlackRanked(drop_hopeless=False)
    assert (chosen(patient, some), dropped(patient, some)) == (["r1"], [])
    some.cancel("r1", 0.0)
    assert (chosen(patient, some), dropped(patient, some)) == (["r0", "r2"], [])
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == ([], ["r0", "r2"])
