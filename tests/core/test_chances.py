"""How many are expected on time where steps vary, and who is kept and rides by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from neustream import TableProfile
from neustream.core.observed import BLOCK, Ratios
from neustream.core.policies.chances import AT_ONCE, EVEN, LOOKS, expected, most_expected, with_riders
from neustream.core.policies.curve import Curve
from neustream.core.policies.feasibility import Line
from neustream.core.policies.fitting import fitting, kept
from neustream.core.policies.sets import Sets

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


@pytest.mark.parametrize(("others", "keeps"), [(3, [0, 1]), (4, [1, 2, 3, 4])])
def test_one_with_hardly_any_time_left_is_not_kept_in_place_of_far_more(others, keeps):
    """The first has the most weight per charge, and time for two in a batch: it leaves room for one beside it."""
    some = Some(line([2, *[4] * others], [2.3, *[6.0] * others]))
    assert kept(some, list(range(1 + others))) == keeps


def test_of_hundreds_that_do_not_fit_few_are_asked_for_one_by_one(monkeypatch):
    some = drawn(0, most=1000)
    ranked = list(range(len(some.plan.left)))
    asked = []
    monkeypatch.setattr(some.plan, "fits", lambda jobs, entry=0.0: asked.append(1) or Line.fits(some.plan, jobs, entry))
    chosen = fitting(some, ranked)
    assert some.plan.fits(sorted(chosen))
    assert len(ranked) - len(chosen) > 500
    assert len(asked) < 500


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


# -- many sets at once -------------------------------------------------------------------------------


def drawn(seed, most=40):
    """A line of jobs of which not all fit: some have time for steps alone, some in large batches only."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, most))
    left = np.sort(rng.integers(1, 30, count))
    pace = np.where(rng.random(count) < rng.choice([0.1, 0.3]), rng.uniform(1.1, 1.5, count), rng.uniform(2, 20, count))
    due = left * pace + rng.random(count) * left.sum() / rng.choice([3.0, 8.0, 20.0])
    order = np.lexsort((due, left))
    spread = ratios(*np.exp(rng.normal(0, 0.2, 20)))
    curve = Curve(TableProfile("s", [1, 2, 4, 8], [1.0, 1.1, 1.4, 2.2]), 8, 0.0)
    behind, entry = rng.choice([0.0, 0.5]), rng.choice([0.0, 1.0], count)
    value = float(rng.choice([0.0, 0.5]))
    weight = rng.choice([1.0, 1.0, 3.0], count).tolist()
    rows = [left.tolist(), due[order].tolist(), [behind] * count, entry.tolist(), weight]
    return Some(Line(0.0, curve, 1.0, *rows, lambda: value, spread=spread))


def each_left_out(some, promised, fit):
    """As `most_expected`, one set after another."""
    line = some.plan
    runs = line.spread.runs(max(line.left[index] for index in promised))
    best, most = fit, expected(line, fit, runs)
    for key in (some.density.__getitem__, lambda index: (line.due[index] - line.start) / line.left[index]):
        left_out = sorted(promised, key=key)
        for count in range(len(promised)):
            chosen = sorted(left_out[count:])
            found = expected(line, chosen, runs)
            if found > most + EVEN:
                best, most = chosen, found
    return best, most


def each_rider(some, promised):
    """As `with_riders`, one after another."""
    line = some.plan
    riders = [index for index in range(len(line.left)) if index not in promised]
    runs = line.spread.runs(max(line.left))
    together, most = promised, expected(line, promised, runs)
    for index in sorted(riders, key=lambda index: line.due[index] / line.left[index], reverse=True):
        found = expected(line, sorted([*together, index]), runs)
        if found >= most - EVEN:
            together, most = sorted([*together, index]), found
    return together


@pytest.mark.parametrize("seed", range(15))
def test_sets_that_are_weighed_at_once_bring_what_each_does(seed):
    some, rng = drawn(seed), np.random.default_rng(seed)
    line, count = some.plan, len(some.plan.left)
    runs = line.spread.runs(max(line.left))
    sets = rng.random((12, count)) < rng.choice([0.1, 0.3, 0.6, 1.0], (12, 1))
    places = [np.flatnonzero(one).tolist() for one in sets]
    entries = [max((line.entry[index] for index in jobs), default=0.0) for jobs in places]
    each = [expected(line, jobs, runs, entry) for jobs, entry in zip(places, entries, strict=True)]
    assert Sets(line, range(count), runs, line.entry).expected(sets) == pytest.approx(each)


def test_some_of_those_sets_are_on_seats():
    seated = 0
    for seed in range(15):
        line, rng = drawn(seed).plan, np.random.default_rng(seed)
        for share in (0.2, 0.4, 0.7):
            jobs = np.flatnonzero(rng.random(len(line.left)) < share).tolist()
            seated += not line.in_turns(jobs) and line.seats(jobs) > 0
    assert seated > 3


@pytest.mark.parametrize("seed", range(15))
def test_the_search_finds_what_leaving_out_one_after_another_finds(seed):
    some = drawn(seed)
    everyone = list(range(len(some.plan.left)))
    best, _ = each_left_out(some, everyone, [])
    assert most_expected(some, everyone, []) == best


@pytest.mark.parametrize("seed", range(15))
def test_those_ride_who_would_one_after_another(seed):
    some = drawn(seed)
    promised = list(range(0, len(some.plan.left), 3))
    assert with_riders(some, promised) == each_rider(some, promised)


def test_with_many_jobs_a_search_looks_so_often_at_most_and_takes_the_best_by_then(monkeypatch):
    looks = []
    weigh = Sets.expected

    def counted(self, sets):
        looks.append(len(sets))
        return weigh(self, sets)

    monkeypatch.setattr(Sets, "expected", counted)
    some = drawn(3, most=1000)
    everyone = list(range(len(some.plan.left)))
    assert len(everyone) > 500
    kept = most_expected(some, everyone, [])
    assert 0 < len(looks) <= 2 * LOOKS and max(looks) <= AT_ONCE
    looks.clear()
    riding = with_riders(some, kept)
    assert 0 < len(looks) <= 1 + LOOKS and max(looks) <= AT_ONCE
    runs = some.plan.spread.runs(max(some.plan.left))
    assert expected(some.plan, riding, runs) >= expected(some.plan, kept, runs) - EVEN
    assert expected(some.plan, kept, runs) > expected(some.plan, everyone, runs)
