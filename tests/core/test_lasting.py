"""A newcomer begins if it is in time also though others come in place of those who end."""

from __future__ import annotations

import pytest
from hand import ids, seen
from priced_images import ask, run, waiting

from neustream import Priced
from neustream.core.demand import Calls, Demand


def beside_three(*, gap=None, weight=1.0, began=0.0, due=14.0):
    """Who is in the next step: three with two of eight steps left, and one who would have its eight.

    The three, of eight steps, came at 0. All four fit: after two turns of 2 s each the newcomer is
    alone. A step of three takes 1.5 s. Requests that took 2 s of the device came every `gap` seconds.
    """
    some = waiting(*[ask(f"r{at}", 8, due) for at in range(3)])
    now = began
    for _ in range(6):
        now = run(some, "r0", "r1", "r2", now=now)
    some.submit(ask("new", 8, now + 12.0, arrival=now, weight=weight), now)
    view = seen(some, now)
    if gap is not None:
        calls = {"unet": Calls(4, True, 4)}
        view.recent = tuple(Demand(at * gap, 6.0, calls=calls) for at in range(100))
    return set(ids(Priced(price=0.0).decide(view).jobs))


THREE = {"r0", "r1", "r2"}


def test_under_load_a_plan_does_not_count_on_who_ends():
    assert beside_three(gap=2.0) == THREE
    assert beside_three(gap=1.0) == THREE  # no more than all of the time is filled


@pytest.mark.parametrize("gap", [None, 4.0])
def test_where_few_come_it_does(gap):
    assert "new" in beside_three(gap=gap)


def test_those_who_have_little_time_left_need_a_seat_though_they_came_with_much():
    assert beside_three(gap=2.0, began=27.0, due=40.0) == THREE
    assert "new" in beside_three(gap=2.0, began=22.0, due=40.0)


def test_a_heavier_one_takes_seats_of_lighter_ones():
    assert beside_three(gap=2.0, weight=1.1) == THREE
    assert "new" in beside_three(gap=2.0, weight=1.5)


def test_the_first_of_several_newcomers_take_the_seats_that_are_left():
    some = waiting(ask("r0", 8, 14.0), ask("r1", 8, 14.0))
    now = 0.0
    for _ in range(6):
        now = run(some, "r0", "r1", now=now)
    for name in ("n0", "n1"):
        some.submit(ask(name, 8, now + 12.0, arrival=now), now)
    view = seen(some, now)
    calls = {"unet": Calls(4, True, 4)}
    view.recent = tuple(Demand(at * 2.0, 6.0, calls=calls) for at in range(100))
    assert len({"n0", "n1"} & set(ids(Priced(price=0.0).decide(view).jobs))) == 1
