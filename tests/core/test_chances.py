"""How many are expected on time where steps vary, and who is kept and rides by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from neustream import TableProfile
from neustream.core.observed import BLOCK, Ratios
from neustream.core.policies.chances import expected, most_expected, with_riders
from neustream.core.policies.curve import Curve
from neustream.core.policies.feasibility import Line

ALWAYS = np.ones(1)
CURVE = Curve(TableProfile("s", [1, 2, 3, 4], [1.0, 1.1, 1.2, 1.3]), 4, 0.0)


def line(left, due, spread=None, curve=CURVE):
    nothing = [0.0] * len(left)
    return Line(0.0, curve, 1.0, left, due, nothing, nothing, [1.0] * len(left), spread=spread or Ratios())


def ratios(*blocks):
    """Steps of which each block took so many times what was expected."""
    seen = Ratios()
    for times in blocks:
        for _ in range(BLOCK):
            seen.add(times)
    return seen


VARIED = ratios(*[1.0] * 8, 1.05, 1.05)


@dataclass
class Some:
    """What `chances` asks of a `LineUp`."""

    plan: Line
    committed: list = field(default_factory=list)
    entering: bool = False

    def __post_init__(self):
        self.committed = self.committed or [True] * len(self.plan.left)
        self.density = [1.0 / left for left in self.plan.left]
        self.jobs = [SimpleNamespace(weight=1.0)] * len(self.plan.left)

    def entries(self, jobs):
        return 0.0

    def in_front(self, place):
        return self.entering


def test_where_nothing_varies_a_job_is_on_time_or_not():
    jobs = line([2, 4], [2.2, 4.1])  # together 2.2 s, then 2 s alone
    assert expected(jobs, [0], ALWAYS) == expected(jobs, [1], ALWAYS) == 1.0
    assert expected(jobs, [0, 1], ALWAYS) == 1.0
    assert expected(line([2, 4], [2.2, 4.2]), [0, 1], ALWAYS) == 2.0
    assert expected(jobs, [], ALWAYS) == 0.0


def test_the_chance_is_the_share_of_runs_under_which_a_job_is_on_time():
    runs = np.array([0.9, 1.0, 1.5, 3.0])
    assert expected(line([2], [3.0]), [0], runs) == 0.75
    assert expected(line([2], [1.9]), [0], runs) == 0.25
    assert expected(line([2, 2], [3.3, 2.2]), [0, 1], runs) == 0.75 + 0.5
    assert expected(line([2], [3.0]), [0], runs, entry=1.0) == 0.5


def test_jobs_that_fit_only_on_seats_are_expected_on_time_there():
    curve = Curve(TableProfile("s", [1, 2, 3, 4], [1.0, 1.2, 2.0, 2.1]), 4, 0.0)
    jobs = line([10, 10, 20], [200.0, 200.0, 27.0], curve=curve)
    assert not jobs.in_turns([0, 1, 2]) and jobs.seats([0, 1, 2]) == 2
    assert expected(jobs, [0, 1, 2], ALWAYS) == 3.0


def test_runs_of_steps_are_as_long_as_what_is_left():
    seen = ratios(1, 1, 1, 1, 1, 1, 1, 2, 2, 1)
    assert seen.usual == 1.0
    assert seen.runs(10).tolist() == [1.0] * 8 + [2.0, 2.0]
    assert seen.runs(20).tolist() == [1.0] * 6 + [1.5, 1.5, 2.0]
    assert seen.runs(1000).tolist() == [pytest.approx(1.2)]
    assert Ratios().runs(25).tolist() == [1.0] * 4


def test_a_slow_step_is_measured_by_the_usual_one():
    assert Ratios().slow == 1.0
    assert ratios(*[2.0] * 10).slow == pytest.approx(1.0)
    assert ratios(*[1.0] * 7, *[3.0] * 3).slow > 1.5


def test_of_jobs_that_do_not_fit_the_most_are_kept():
    """By weight per charge the longest goes first; here the one with no time left is in the way of all."""
    some = Some(line([3, 3, 6], [3.1, 3.4, 7.0], VARIED))
    assert not some.plan.fits([0, 1, 2])
    assert most_expected(some, [0, 1, 2], [0]) == [1, 2]


def test_where_nothing_varies_those_that_fit_are_kept():
    some = Some(line([3, 3, 6], [3.1, 3.4, 7.0]))
    assert most_expected(some, [0, 1, 2], [0]) == [0]


def test_no_job_is_kept_in_place_of_as_many_that_fit():
    some = Some(line([3, 3], [3.1, 3.2], VARIED))
    assert not some.plan.fits([0, 1])
    assert most_expected(some, [0, 1], [1]) == [1]


def test_a_job_that_may_be_on_time_after_a_slow_phase_is_kept():
    """At the usual speed of a slow start nobody would be in time; at the profile's all are."""
    spread = ratios(2.0, 2.0, 2.0)
    assert spread.usual == 2.0
    jobs = line([3, 3], [4.0, 4.0], spread)
    jobs.speed = spread.usual
    assert not jobs.fits([0]) and not jobs.fits([1])
    assert most_expected(Some(jobs), [0, 1], []) == [0, 1]


def test_a_started_job_rides_while_nobody_pays_for_it():
    spread = ratios(*[1.0] * 8, 2.0, 2.0)
    some = Some(line([2, 9], [6.0, 9.0], spread))
    assert not some.plan.fits([0, 1])
    assert with_riders(some, [0]) == [0, 1]
    tight = Some(line([2, 9], [2.0, 9.0], spread))
    assert with_riders(tight, [0]) == [0]  # a larger batch makes the promised job late


def test_nobody_rides_who_has_not_begun_or_is_in_front_of_the_loop_or_where_nothing_varies():
    spread = ratios(*[1.0] * 8, 2.0, 2.0)
    assert with_riders(Some(line([2, 9], [6.0, 9.0], spread), [True, False]), [0]) == [0]
    assert with_riders(Some(line([2, 9], [6.0, 9.0], spread), entering=True), [0]) == [0]
    assert with_riders(Some(line([2, 9], [6.0, 9.0])), [0]) == [0]
