"""What a curve says of batches, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from curves import TABLES, shape, turn

from neustream import LinearProfile
from neustream.core.policies.curve import Curve
from neustream.core.types import TICK


@pytest.mark.parametrize("seconds", TABLES.values(), ids=TABLES)
def test_the_best_batch_is_the_largest_of_the_most_efficient(seconds):
    some = shape(seconds)
    assert some.latency.tolist() == [0.0, *seconds]
    assert some.best[0] == 0
    for n in range(1, len(seconds) + 1):
        assert some.best[n] == min(range(1, n + 1), key=lambda b: (seconds[b - 1] / b, -b))


@pytest.mark.parametrize("seconds", TABLES.values(), ids=TABLES)
def test_reach_is_the_least_latency_of_so_many_or_more(seconds):
    some = shape(seconds)
    assert some.reach.tolist() == some.fast == [min(seconds[b:]) for b in range(len(seconds))]


@pytest.mark.parametrize("seconds", TABLES.values(), ids=TABLES)
def test_a_turn_gives_each_a_step_in_the_most_efficient_batches(seconds):
    some = shape(seconds)
    for count in (0, 1, 3, 40):  # the array grows
        assert some.turns(count)[: count + 1] == pytest.approx([turn(seconds, n) for n in range(count + 1)])


@pytest.mark.parametrize("seconds", TABLES.values(), ids=TABLES)
def test_a_charge_is_the_cheapest_mixture_of_batches_at_a_pace(seconds):
    some = shape(seconds)
    points = [(x, x / b) for b, x in enumerate(some.fast, 1)]

    def cheapest(pace):
        """By trying all pairs of batches that are `pace` on average."""
        best = min((y for x, y in points if x <= pace), default=math.inf)
        for x1, y1 in points:
            for x2, y2 in points:
                if x1 < pace < x2:
                    best = min(best, y1 + (y2 - y1) * (pace - x1) / (x2 - x1))
        return best

    paces = np.linspace(min(seconds), max(seconds) * 1.5, 60)
    charges = some.charge(paces)
    assert charges == pytest.approx([cheapest(pace) for pace in paces.tolist()])
    assert (np.diff(charges) <= TICK).all()  # falling
    assert (np.diff(charges, 2) >= -TICK).all()  # convex
    assert all(some.charge(np.array([x]))[0] <= y + TICK for x, y in points)
    assert all(some.charge_of(x) <= s / b + TICK for b, s in enumerate(seconds, 1) for x in (s, s + 1.0))


@pytest.mark.parametrize("seconds", TABLES.values(), ids=TABLES)
def test_the_charge_of_one_is_the_charge_of_many(seconds):
    some = shape(seconds)
    paces = [0.0, 0.5, *some.fast, *np.linspace(0.1, 6.0, 50).tolist(), 1e9]
    assert [some.charge_of(pace) for pace in paces] == pytest.approx(some.charge(np.array(paces)).tolist())
    assert some.charge_of(0.0) == some.charge_of(some.fast[0])  # faster than possible: as fast as possible


def test_a_curve_goes_as_far_as_its_limit_and_has_the_sizes_of_its_jobs():
    assert shape(TABLES["rising"], limit=2).latency.tolist() == [0.0, 1.0, 1.25]
    read = LinearProfile("read", base=1.0, per_job=0.5, per_size=0.25, per_square=0.125, max_batch=3)
    sized = Curve(read, 2, 2.0)
    assert sized.latency.tolist() == [0.0, 1.0 + 0.5 + 0.5 + 0.5, 1.0 + 1.0 + 1.0 + 1.0]
