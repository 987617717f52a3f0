"""What `priced` promises: to whom, at which price, in exchange for whom."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hand import ids, seen
from priced_images import (
    IMAGE,
    LOOP,
    PROFILES,
    SIZED,
    ask,
    chosen,
    dropped,
    outcomes,
    run,
    waiting,
)

from neustream import (
    Priced,
    TableProfile,
)
from neustream.core.demand import Calls, Demand
from neustream.core.policies import priced_steps

# -- 1. promises are kept ---------------------------------------------------------------------------


def with_newcomer(total):
    """r0 has run one of its four steps, and has three left in `total` seconds; r1 comes with four, due in 6 s."""
    some = waiting(ask("r0", 4, 1.0 + total))
    now = run(some, "r0")
    some.submit(ask("r1", 4, 7.0, arrival=now), now)
    return some


def test_a_newcomer_that_would_make_a_promised_job_late_waits():
    some = with_newcomer(3.7)  # three steps with it take 3.75 s
    assert (chosen(some, 1.0), dropped(some, 1.0)) == (["r0"], [])
    assert chosen(with_newcomer(3.75), 1.0) == ["r0", "r1"]


def test_a_newcomer_that_would_be_late_itself_waits():
    some = with_newcomer(3.75)
    some.submit(ask("r2", 5, 1.0 + 6.5, arrival=1.0), 1.0)  # as tight as r1, and one more step
    assert chosen(some, 1.0) == ["r0", "r1"]


def running_pair(weight=1.0, **other):
    """Two that ran a step together until 1.25, three steps left of each; then the device stood still until 1.5."""
    some = waiting(ask("r0", 4, 5.0, weight=weight), ask("r1", 4, 5.2))
    assert run(some, "r0", "r1") == 1.25
    return some


def test_of_promises_that_cannot_all_be_kept_those_of_the_most_weight_per_charge_are():
    # together they would end at 1.5 + 3 * 1.25 = 5.25; r0 has less time, so its charge is larger
    some = running_pair()
    assert chosen(some, 1.25) == ["r0", "r1"]
    assert (chosen(some, 1.5), dropped(some, 1.5)) == (["r1"], [])
    assert chosen(running_pair(weight=2.0), 1.5) == ["r0"]


def test_who_lost_its_promise_waits_for_room():
    some = running_pair()
    some.cancel("r1", 1.75)
    assert chosen(some, 1.75) == ["r0"]
    assert (chosen(some, 2.25), dropped(some, 2.25)) == ([], ["r0"])


def test_promises_are_to_the_next_output_too():
    some = waiting(ask("r0", 4, first=4.7))  # no deadline but that of its first output
    now = run(some, "r0")
    some.submit(ask("r1", 4, 7.0, arrival=now), now)
    assert chosen(some, 1.0) == ["r0"]


def test_latencies_are_those_of_late():
    some = with_newcomer(3.75)
    view = seen(some, 1.0)
    view.speed = {"unet": 1.01}
    assert ids(Priced().decide(view).jobs) == ["r0"]
    view.speed = {"unet": 0.99}
    assert ids(Priced().decide(view).jobs) == ["r0", "r1"]


# -- 2. what fits is promised -----------------------------------------------------------------------


def test_what_fits_is_admitted_at_once_with_the_most_time_per_step_first():
    # four of four steps end at 8, three at 6: one of those with the least time has to wait
    some = waiting(*[ask(f"r{at}", 4, total) for at, total in enumerate([6.0, 6.0, 6.1, 6.2])])
    assert chosen(some) == ["r0", "r2", "r3"]
    some = waiting(*[ask(f"r{at}", 4, total) for at, total in enumerate([8.0, 8.0, 8.0, 8.0])])
    assert chosen(some) == ["r0", "r1", "r2"]  # all promised, three to a step
    assert chosen(some, 0.01) == ["r0", "r1", "r2"]  # r3 is not, by now


def test_who_does_not_fit_keeps_out_nobody_who_does():
    some = waiting(ask("r0", 4, 4.25), ask("r1", 2, 2.2), ask("r2", 1, 9.0))
    assert chosen(some) == ["r0", "r2"]  # r0 shares one step


# -- 3. the price -----------------------------------------------------------------------------------


def late_one(gap, asked=100, *, total=5.2, budget=6.0, weight=1.0, graph=LOOP, policy=None):
    """Who runs: a started job with all the time in the world, or also one that could share its steps.

    Before, `asked` requests for four steps within `budget` came, one every `gap` seconds: 2 s of the
    device each if it is 6 s, in batches of three.
    """
    some = waiting(ask("r0", 9, 1e3))
    now = run(some, "r0")
    some.submit(ask("r1", 4, now + total, arrival=0.5, weight=weight), now)
    view = seen(some, now)
    calls = {name: Calls(4, name in graph.looped, stage.max_batch) for name, stage in graph.stages.items()}
    view.recent = tuple(Demand(at * gap, budget, calls=calls) for at in range(asked))
    return ids((policy or Priced()).decide(view).jobs)


def test_at_twice_capacity_who_waited_too_long_is_not_admitted_though_it_fits():
    # at 5.2 s for four steps it needs batches of two for most of them: 0.6 s a step where others bring 0.5
    assert late_one(gap=1.0) == ["r0"]
    assert late_one(gap=2.1) == ["r1", "r0"]  # no overload


def test_at_twice_capacity_who_brings_enough_is_admitted():
    assert late_one(gap=1.0, total=6.0) == ["r1", "r0"]
    assert late_one(gap=1.0, weight=1.25) == ["r1", "r0"]
    assert late_one(gap=1.0, policy=Priced(price=0.8)) == ["r1", "r0"]


def test_a_price_needs_some_requests_that_pay():
    assert late_one(gap=1.0, asked=9) == ["r1", "r0"]
    assert late_one(gap=1.0, asked=10) == ["r0"]
    assert late_one(gap=1.0, budget=math.inf) == ["r1", "r0"]
    assert late_one(gap=1.0, graph=SIZED) == ["r1", "r0"]


def test_the_price_follows_the_requests_that_came():
    def after(gap):
        some = waiting(ask("r0", 9, 1e3))
        now = run(some, "r0")
        for at in range(100):
            now = 1.0 + gap * at
            some.submit(ask(f"x{at}", 4, now + 6.0, arrival=now), now)
            some.cancel(f"x{at}", now)
        some.submit(ask("r1", 4, now + 5.2, arrival=now - 0.8), now)
        return chosen(some, now)

    assert after(1.0) == ["r0"]
    assert after(2.1) == ["r1", "r0"]


def test_a_burst_that_fits_is_served():
    for count in (8, 9, 10, 12):
        asked = [ask(f"r{at}", 4 + at % 2 * 4, 40.0) for at in range(count)]
        assert all(outcomes(*asked, policy=Priced(price=0.0)).values())  # a step of each is 0.5 s: 36 s at most
        assert all(outcomes(*asked).values())


# -- 4. exchange ------------------------------------------------------------------------------------


def long_and_short(*, weight=1.0, total=9.3, other=2.4, **short):
    """r0 has nine steps left in 9.3 s, about 8.5 s of the device; r1, 1.4 s, comes and does not fit."""
    some = waiting(ask("r0", 10, 1.0 + total, weight=weight))
    now = run(some, "r0")
    some.submit(ask("r1", 2, now + other, arrival=now, **short), now)
    return some


def test_a_cheaper_job_takes_the_place_of_a_promised_one():
    assert chosen(long_and_short(), 1.0) == ["r1"]
    assert chosen(long_and_short(total=9.5, other=2.5), 1.0) == ["r0", "r1"]  # both fit


def test_nothing_is_exchanged_for_a_small_gain():
    assert chosen(long_and_short(), 1.0, policy=Priced(gain=4.0)) == ["r1"]
    assert chosen(long_and_short(), 1.0, policy=Priced(gain=6.0)) == ["r0"]


def test_a_charge_counts_by_weight_in_an_exchange():
    assert chosen(long_and_short(weight=10.0), 1.0) == ["r0"]


def test_no_job_takes_the_place_of_a_heavier_one_for_being_short():
    some = waiting(ask("r0", 20, 20.1, weight=10.0))
    now = run(some, "r0")
    some.submit(ask("r1", 1, 9.0, arrival=now), now)
    assert chosen(some, now) == ["r0"]


@pytest.mark.parametrize(("weight", "step"), [(1.0, "abc"), (1.5, "abx")])
def test_who_would_not_run_next_makes_room_later_but_for_more_weight(weight, step):
    """v fits beside the three that run, or x in its place, which would run next. w does not fit."""
    some = waiting(*[ask(name, 3, 6.36) for name in "abc"])
    now = run(some, "a", "b", "c")
    for name, steps, total, weighs in (
        ("v", 17, 55.5, 1.0),
        ("w", 13, 36.0, 1.0),
        ("x", 4, 6.0, weight),
    ):
        some.submit(ask(name, steps, now + total, arrival=now, weight=weighs), now)
    assert sorted(chosen(some, now)) == list(step)


def in_a_hurry(*, weight=1.0, count=3, patience=4.0, since=0.0):
    """r0 can only run alone; r1, r2, ... (as light as 0.9) fit together, but not beside it."""
    some = waiting(ask("old", 1, 3.0))
    now = run(some, "old") + since
    some.submit(ask("r0", 8, now + 8.2, arrival=now, weight=weight), now)
    now = run(some, "r0", now=now)
    for at in range(1, count + 1):
        some.submit(ask(f"r{at}", 1, now + patience, arrival=now, weight=0.9), now)
    return chosen(some, now)


def test_who_keeps_the_batch_small_makes_room_for_all_that_fit_in_its_place():
    assert in_a_hurry() == ["r1", "r2", "r3"]


@pytest.mark.parametrize(
    "load",
    [
        pytest.param({"count": 2}, id="fewer than two of its weight"),
        pytest.param({"weight": 1.5}, id="they weigh less than two of it"),
        pytest.param({"patience": 8.6}, id="they have time until it ends"),
        pytest.param({"since": 30.0}, id="small batches cost little where few come"),
    ],
)
def test_who_keeps_the_batch_small_stays_where_that_costs_less_than_it_brings(load):
    assert in_a_hurry(**load) == ["r0"]


def test_who_has_the_least_time_stays_where_the_batch_would_be_smaller_without_it():
    """r0 and r1 run in twos. r2 in the place of r0 could only run alone."""
    profiles = {**PROFILES, "unet": TableProfile("unet", [1, 2, 3, 4], [1.0, 1.5, 1.75, 2.0])}
    some = waiting(ask("r0", 13, 20.0), ask("r1", 17, 29.5), profiles=profiles)
    now = run(some, "r0", "r1")
    for at, (steps, due) in enumerate([(3, 5.5), (4, 15.5), (3, 8.0)], 2):
        some.submit(ask(f"r{at}", steps, now + due, arrival=now, weight=0.9), now)
    assert chosen(some, now) == ["r0", "r1"]


def test_a_job_of_more_weight_than_all_others_finds_room():
    # beside two of the others four steps take 6 s, beside one 5 s
    light = [ask(f"r{at}", 9, 14.0) for at in range(3)]
    assert outcomes(*light, ask("h", 4, 7.3, arrival=1.5, weight=100.0))["h"]


# -- nobody promised, no deadline -------------------------------------------------------------------


def test_jobs_without_a_deadline_fill_what_is_left():
    # r0 needs 4 s, and 0.25 s more for a step with r1: that leaves it half of its time
    some = waiting(ask("r0", 4, 8.51), ask("r1", 4))
    assert chosen(some) == ["r0", "r1"]
    assert chosen(waiting(ask("r0", 4, 8.49), ask("r1", 9))) == ["r0"]
    assert chosen(waiting(ask("r0", 1), ask("r1", 9))) == ["r0", "r1"]


def test_a_job_without_a_deadline_is_no_promise_even_if_it_has_run():
    some = waiting(ask("r0", 9))
    now = run(some, "r0")
    some.submit(ask("r1", 4, now + 4.1, arrival=now), now)
    assert chosen(some, now) == ["r1"]


def test_a_job_without_a_deadline_never_takes_the_place_of_a_promised_one():
    some = waiting(ask("r0", 4, 4.2))
    now = run(some, "r0")
    some.submit(ask("r1", 1, arrival=now), now)
    assert chosen(some, now) == ["r0"]


def test_jobs_without_deadlines_end_as_well():
    draw = random.Random(0)
    asked = [ask(f"r{at}", draw.randint(1, 9), graph=draw.choice([LOOP, IMAGE]), arrival=at / 4) for at in range(40)]
    assert all(outcomes(*asked).values())


def test_the_device_does_not_idle_while_there_is_hope():
    assert late_one(gap=1.0) == ["r0"]
    some = waiting(ask("r0", 4, 4.2))
    view = seen(some)
    view.recent = tuple(Demand(float(at), 6.0, calls={"unet": Calls(4, True, 4)}) for at in range(100))
    assert ids(Priced().decide(view).jobs) == ["r0"]  # brings far less than the price
    some.submit(ask("r1", 4, 4.1), 0.0)
    some.submit(ask("r2", 4, 4.3), 0.0)
    view = dataclasses.replace(seen(some), recent=view.recent)
    assert ids(Priced().decide(view).jobs) == ["r2"]  # the most weight per charge


def test_who_would_be_in_the_way_of_those_that_come_runs_once_they_come_no_more():
    """One step a request, each with hardly any slack; then one of four steps, and nobody behind it."""
    tight = [ask(f"t{at}", 1, 1.1 * at + 1.02, arrival=1.1 * at) for at in range(20)]
    assert all(outcomes(*tight, ask("behind", 4, 500.0, arrival=23.0)).values())


def test_hopeless_jobs_are_dropped():
    some = waiting(ask("r0", 4, 3.9), ask("r1", 4, 4.0))
    assert (chosen(some), dropped(some)) == (["r1"], ["r0"])
    assert (chosen(some, 0.2), dropped(some, 0.2)) == ([], ["r0", "r1"])


@pytest.mark.parametrize(("looks", "runs"), [(priced_steps.LOOKS, ["h"]), (4, ["a", "b", "c"])])
def test_a_search_for_whom_to_exchange_that_is_cut_off_leaves_promises_as_they_are(monkeypatch, looks, runs):
    """All four have to go for one of more weight, which is found after each of them, and two and three of them."""
    monkeypatch.setattr(priced_steps, "LOOKS", looks)
    some = waiting(*[ask(name, due=10.0) for name in "abcd"])
    now = run(some, "d", now=run(some, "a", "b", "c"))
    some.submit(ask("h", arrival=now, due=now + 4.2, weight=100.0), now)
    assert sorted(chosen(some, now)) == runs
