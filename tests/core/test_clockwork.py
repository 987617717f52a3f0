"""Clockwork: whole-request batches by their latest start."""

from __future__ import annotations

import pytest
from hand import chosen, dropped, seen
from images import (
    LOOP,
    ask,
    run,
    steps_run,
    units,
)

from neustream import (
    Clockwork,
    TableProfile,
)

# -- clockwork --------------------------------------------------------------------------------------


def test_clockwork_batches_equal_step_counts_only():
    some = units((4, 100.0), (5, 110.0), (4, 100.0))
    assert chosen(Clockwork(), some) == ["r0", "r2"]


def test_clockwork_takes_the_earliest_latest_start():
    some = units((4, 100.0), (5, 50.0), (4, 100.0))
    assert chosen(Clockwork(), some) == ["r1"]


def test_clockwork_counts_the_longer_batches_of_a_group_as_offers_too():
    # alone, r0 must start by 16 and r3 by 14.5; but the batch of r0 to r2 takes 6 s, so by 14
    some = units((4, 20.0), (4, 20.0), (4, 20.0), (5, 19.5))
    assert chosen(Clockwork(), some) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_clockwork_runs_the_largest_batch_whose_members_all_make_it(total, most):
    some = units(*[(4, total)] * 4)
    assert len(chosen(Clockwork(), some)) == most


def test_clockwork_grows_a_batch_up_to_the_first_size_that_fails():
    bumpy = {"unet": TableProfile("unet", [1, 2, 3], [1.0, 3.0, 2.0])}
    some = units(*[(4, 10.0)] * 3)
    assert chosen(Clockwork(plan=bumpy), some) == ["r0"]  # 2 would take 12 s, 3 only 8 s


def test_clockwork_leaves_out_of_a_batch_who_would_not_make_it_there():
    some = units((4, 4.5), (4, 90.0), (4, 90.0))
    assert chosen(Clockwork(), some) == ["r1", "r2"]
    assert dropped(Clockwork(), some) == []


def test_clockwork_batches_no_larger_than_the_artifact_did():
    some = units(*[(4, 100.0)] * 4)
    assert chosen(Clockwork(max_batch=2), some) == ["r0", "r1"]


def test_clockwork_drops_who_cannot_be_on_time_alone():
    some = units((4, 3.0), (4, 90.0))
    assert chosen(Clockwork(), some) == ["r1"]
    (reason,) = Clockwork().decide(seen(some)).drop.values()
    assert reason == "expired: needs 4.000 s, due in 3.000 s"


def test_clockwork_plans_a_little_ahead():
    some = units((4, 4.0005))
    assert dropped(Clockwork(), some) == ["r0"]
    assert chosen(Clockwork(lead_s=0.0), some) == ["r0"]


def test_clockwork_lets_nobody_join_a_running_batch():
    some = units((4, 90.0), (4, 90.0))
    run(some, "r0", "r1")
    some.submit(ask("new", 3, total=4.0, graph=LOOP), 0.0)  # urgent, and with as many steps left
    assert chosen(Clockwork(), some) == ["r0", "r1"]
    assert dropped(Clockwork(), some, now=3.0) == []  # between its batches it looks at nobody


def test_clockwork_never_takes_over_another_worker_s_batch():
    some = units((4, 90.0), (4, 90.0), (4, 95.0), workers=2)
    run(some, "r0", "r1", worker=1)
    assert chosen(Clockwork(), some, worker=0) == ["r2"]
    assert chosen(Clockwork(), some, worker=1) == ["r0", "r1"]


def test_clockwork_may_plan_with_other_profiles():
    slow = {"unet": TableProfile("unet", [1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])}
    some = units((4, 7.0), (4, 12.5), (4, 12.5))
    assert chosen(Clockwork(), some) == ["r0", "r1", "r2"]
    assert (chosen(Clockwork(plan=slow), some), dropped(Clockwork(plan=slow), some)) == (["r1", "r2"], ["r0"])


def test_clockwork_keeps_to_a_plan_that_is_slower_than_the_device():
    slow = {"unet": TableProfile("unet", [1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])}
    some = units((4, 90.0), (4, 90.0))
    run(some, "r0", "r1", now=1.0)
    decision = Clockwork(plan=slow).decide(seen(some, now=2.25))
    assert (list(decision.jobs), decision.wake_at) == ([], 1.0 + 3.0)
    assert chosen(Clockwork(plan=slow), some, now=4.0) == ["r0", "r1"]
    assert chosen(Clockwork(), some, now=2.25) == ["r0", "r1"]
    fast = {"unet": TableProfile("unet", [1, 2, 3, 4], [0.5, 0.5, 0.5, 0.5])}
    assert chosen(Clockwork(plan=fast), some, now=2.25) == ["r0", "r1"]


def test_clockwork_runs_a_batch_to_completion_through_all_stages():
    steps = steps_run(Clockwork(), ask("r0", 2), ask("r1", 1), ask("r2", 2))
    assert steps[:4] == [("text", ["r0", "r2"]), ("unet", ["r0", "r2"]), ("unet", ["r0", "r2"]), ("vae", ["r0", "r2"])]
    assert steps[4] == ("text", ["r1"])
