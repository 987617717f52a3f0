"""How many of a line's jobs are expected to be on time, as steps go on to vary as they did lately.

A plan says when each job ends if steps take their usual time. Lately so many steps in a row as the
longest job has left took other times (`Ratios.runs`): the chance of a job is the share of those
under which it is still on time. A device that does what its profile says has one such time, and
chances are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from neustream.core.policies.curve import Floats
from neustream.core.policies.feasibility import Line
from neustream.core.policies.line_up import LineUp
from neustream.core.types import TICK

EVEN = 1e-6
"""Weight by which expectations are the same, and share by which times are."""

ALIKE = 0.02
"""Share by which runs of steps differ at least on a device whose steps vary."""


def expected(line: Line, jobs: Sequence[int], runs: Floats, entry: float = 0.0) -> float:
    """Weight of `jobs` expected on time: on seats if they fit on these and not in turns."""
    if not jobs:
        return 0.0
    weight = _weight_on_time(line, jobs, line.turn_ends(jobs, entry), runs, entry)
    seats = 0 if line.in_turns(jobs, entry) else line.seats(jobs, entry)
    if not seats:
        return weight
    by_due = sorted(jobs, key=line.due.__getitem__)
    seated = _weight_on_time(line, by_due, line.seat_ends(jobs, entry, seats), runs, entry)
    return max(weight, seated)


def _weight_on_time(
    line: Line, jobs: Sequence[int], ends: Sequence[tuple[float, float]], runs: Floats, entry: float
) -> float:
    """Weight of `jobs` expected on time, of which `ends` has deadlines and planned ends."""
    start = line.start + entry
    deadlines, over = np.array(ends).T
    bearable = (deadlines - start) / np.maximum(over - start, TICK)
    chance = runs.searchsorted(bearable + EVEN, side="right") / len(runs)
    return float(chance @ np.array([line.weight[index] for index in jobs]))


def most_expected(jobs: LineUp, promised: Sequence[int], fit: list[int]) -> list[int]:
    """Of the promised jobs, which do not all fit, those with the most weight expected on time.

    `fit` has some that fit. Others come of leaving out one after the other: those of the least
    weight per charge first, or those with the least time per step first.
    """
    line = jobs.plan
    if not isinstance(line, Line):
        return fit
    runs = _runs(line, promised)
    if _alike(runs):
        return fit
    best, most = fit, expected(line, fit, runs, jobs.entries(fit))
    for key in (jobs.density.__getitem__, _pace(line)):
        left_out = sorted(promised, key=key)
        weight = sum([line.weight[index] for index in promised])
        for count, next_out in enumerate(left_out):
            if weight <= most + EVEN:  # no more can be expected
                break
            chosen = sorted(left_out[count:])
            found = expected(line, chosen, runs, jobs.entries(chosen))
            if found > most + EVEN:
                best, most = chosen, found
            weight -= line.weight[next_out]
    return best


def with_riders(jobs: LineUp, promised: list[int]) -> list[int]:
    """The promised jobs, with those that have begun and run along in the loop at nobody's cost.

    At nobody's cost: no less weight is expected on time. Those with the most time per step first.
    """
    line = jobs.plan
    if not isinstance(line, Line):
        return promised
    taken = set(promised)
    riders = [
        index
        for index, began in enumerate(jobs.committed)
        if began and index not in taken and not jobs.in_front(index)
    ]
    if not riders:
        return promised
    runs = _runs(line, [*promised, *riders])
    if _alike(runs):
        return promised
    together, most = promised, expected(line, promised, runs)
    for index in sorted(riders, key=_pace(line), reverse=True):
        joint = sorted([*together, index])
        found = expected(line, joint, runs)
        if found >= most - EVEN:
            together, most = joint, found
    return together


def _runs(line: Line, jobs: Sequence[int]) -> Floats:
    """What as many steps in a row took lately as the longest of `jobs` has left."""
    return line.spread.runs(max([line.left[index] for index in jobs]))


def _alike(runs: Floats) -> bool:
    """Whether steps do not vary, so that what does not fit by the plan is not on time."""
    return bool(runs[-1] < runs[0] * (1 + ALIKE))


def _pace(line: Line) -> Callable[[int], float]:
    """Time that a job has for each of its steps."""
    return lambda index: float((line.due[index] - line.start) / line.left[index])
