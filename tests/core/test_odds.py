"""The chance of a generation to end before its time is used up."""

from __future__ import annotations

import numpy as np
import pytest

from neustream.core.policies.horizon import Limits
from neustream.core.policies.on_time import Odds, chances

LINEAR = 1 - np.arange(101) / 100
"""A hundredth ends at each output."""
AT_FIFTY = np.where(np.arange(101) < 50, 1.0, 0.0)


def rows_of(time, points, made=0, most=1000, curve=LINEAR):
    time = np.array(time, dtype=float)
    jobs = len(time)
    each = [np.full(jobs, given, dtype=float) for given in (made, most)]
    return Limits(time, *each, curve, np.array(points, dtype=float))


def test_a_chance_is_that_of_ending_before_the_time_is_used_up():
    rows = rows_of([[1, 2, 3], [9, 9, 9], [0.5, 9, 9]], [0, 10, 20])
    spent = np.array([1.0, 2.0, 4.0])
    # the first runs out of time at 10 steps: it has 0 to spare there, at 20 it lacks 1
    assert chances(rows, spent) == pytest.approx([0.1, 1.0, 0.0])
    assert chances(rows, spent + np.array([0.0, 0.0, 9.0]))[0] == pytest.approx(0.1)
    halfway = np.array([0.5, 1.0, 4.0])  # spare 0.5, 1, -1: it runs out between the last two
    assert chances(rows, halfway)[0] == pytest.approx(0.15)


def test_a_chance_is_of_those_that_came_as_far_and_sure_well_beyond_the_maximum():
    halfway = np.array([0.5, 1.0, 4.0])  # 15 steps
    time = [[1, 2, 3]]
    assert chances(rows_of(time, [0, 10, 20], made=50), halfway) == pytest.approx([1 - 0.35 / 0.5])
    assert chances(rows_of(time, [0, 10, 20], most=17), halfway) == pytest.approx([0.15])
    assert chances(rows_of(time, [0, 10, 20], most=15), halfway) == pytest.approx([1 - 0.85 / 2])
    assert chances(rows_of(time, [0, 10, 20], most=13), halfway) == pytest.approx([1.0])


@pytest.mark.parametrize(("time", "chance"), [(4.0, 0.0), (6.0, 1.0)])
def test_a_length_between_two_points_is_not_smeared_over_them(time, chance):
    """All get fifty outputs; between the points 10 and 100 a tenth of a second is an output."""
    rows = rows_of([[time, time]], [10, 100], curve=AT_FIFTY)
    assert chances(rows, np.array([1.0, 10.0])) == pytest.approx([chance])


@pytest.mark.parametrize("seed", range(20))
def test_chances_of_several_cases_are_those_of_each(seed):
    """Some jobs are late at the first point, some at none, and some of the cases make nobody late."""
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.exponential(rng.choice([0.2, 1.0, 9.0], (30, 1)), (30, 9)), axis=1)
    made, most = rng.integers(0, 60, 30), rng.integers(1, 40, 30)
    rows = rows_of(time, [0, 2, 4, 8, 12, 20, 28, 44, 60], made, most)
    spent = np.cumsum(rng.exponential(rng.choice([0.001, 0.5, 2.0], (6, 1)), (6, 9)), axis=1)
    together = Odds(rows).by_case(spent)
    assert together == pytest.approx(np.array([chances(rows, case) for case in spent]), abs=1e-12)


def test_who_came_further_than_all_but_one_of_a_million_million_ends_no_sooner_for_that():
    """Nearly all end at fifty outputs, after which hardly anything is left to be divided by."""
    rare = np.where(np.arange(101) < 50, 1.0, 1e-12)
    rows = rows_of([[-1, -1], [1, 1]], [0, 10], made=60, curve=rare)
    spent = np.array([0.5, 2.0])
    assert rows.left(np.array([0, 1]), np.array([0.0, 5.0])) == pytest.approx([1.0, 1.0])
    assert chances(rows, spent) == pytest.approx([0.0, 0.0])
    assert Odds(rows).by_case(spent[None]) == pytest.approx(np.zeros((1, 2)))
