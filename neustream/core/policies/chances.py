"""How many of a line's jobs are expected to be on time, as steps go on to vary as they did lately.

A plan says when each job ends if steps take their usual time. Lately so many steps in a row as the
longest job has left took other times (`Ratios.runs`): the chance of a job is the share of those
under which it is still on time. A device that does what its profile says has one such time, and
chances are 0 or 1.

Which set is best is found with a bounded number of looks, each at several sets at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Floats
from neustream.core.policies.feasibility import Line
from neustream.core.policies.line_up import LineUp
from neustream.core.policies.sets import Sets, weight_on_time

EVEN = 1e-6
"""Weight by which expectations are the same."""
ALIKE = 0.02
"""Share by which runs of steps differ at least on a device whose steps vary."""
AT_ONCE = 16
"""Sets that are weighed at once."""
LOOKS = 16
"""How often that is done at most in one search: what is best by then stands."""

Bools = NDArray[np.bool_]


def expected(line: Line, jobs: Sequence[int], runs: Floats, entry: float = 0.0) -> float:
    """Weight of `jobs` expected on time: on seats if they fit on these and not in turns."""
    if not jobs:
        return 0.0
    weight = weight_on_time(line, jobs, line.turn_ends(jobs, entry), runs, entry)
    seats = 0 if line.in_turns(jobs, entry) else line.seats(jobs, entry)
    if not seats:
        return weight
    by_due = sorted(jobs, key=line.due.__getitem__)
    seated = weight_on_time(line, by_due, line.seat_ends(jobs, entry, seats), runs, entry)
    return max(weight, seated)


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
    sets = Sets(line, promised, runs, [jobs.entries([index]) for index in promised])
    best, most = fit, expected(line, fit, runs, jobs.entries(fit))
    for key in (jobs.density.__getitem__, _pace(line)):
        left_out = _Search(sets, [key(index) for index in promised], most)
        left_out.run()
        if left_out.chosen is not None:
            best = [index for index, taken in zip(promised, left_out.chosen, strict=True) if taken]
            most = left_out.most
    return best


class _Search:
    """How many jobs to leave out, in the order of some keys, for the most weight on time.

    With fewer left out each of the others is on time no sooner, if they take turns. So a set has at
    most what a smaller one is expected to bring, and the weight of those whom it has beyond that.
    Where that is less than the most that was found nobody looks. A larger set may fit on seats of
    which a smaller one has none: such a set can be missed.

    Attributes:
        most: the most weight found; chosen: whether each job is in that set. None as long as there
            is no more than at the start.
    """

    def __init__(self, sets: Sets, keys: Sequence[float], most: float) -> None:
        self.most = most
        self.chosen: Bools | None = None
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._sets = sets
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        self._all = np.cumsum(sets.weight[order][::-1])[::-1]  # weight, by the number left out
        self._found = np.full(len(order), np.inf)
        self._best = 0

    def run(self) -> None:
        """Look for it."""
        for _ in range(LOOKS):
            asked = self._open()
            if not len(asked):
                return
            if len(asked) > AT_ONCE:
                asked = asked[np.linspace(0, len(asked) - 1, AT_ONCE).astype(np.int64)]
            self._found[asked] = self._sets.expected(self._rank >= asked[:, None])
            self._note()

    def _open(self) -> NDArray[np.int64]:
        """Numbers left out that may bring more; as much, if fewer are left out."""
        unknown = np.isinf(self._found)
        count = len(self._found)
        asked = np.where(unknown, count, np.arange(count))
        smaller = np.minimum.accumulate(asked[::-1])[::-1]  # the next set that was asked for
        lost = np.append(np.where(unknown, 0.0, self._found - self._all), 0.0)[smaller]
        most = self._all + lost
        more = most > self.most + EVEN
        more[: self._best] |= most[: self._best] > self.most - EVEN
        return np.flatnonzero(more & unknown)

    def _note(self) -> None:
        found = np.where(np.isinf(self._found), -np.inf, self._found)
        most = float(found.max())
        if most <= self.most + EVEN and self.chosen is None:
            return
        self.most = max(most, self.most)
        self._best = int(np.argmax(found >= self.most - EVEN))
        self.chosen = self._rank >= self._best


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
    everyone = sorted([*promised, *riders])
    runs = _runs(line, everyone)
    if _alike(runs):
        return promised
    place = {index: at for at, index in enumerate(everyone)}
    together = np.zeros(len(everyone), dtype=bool)
    together[[place[index] for index in promised]] = True
    riders.sort(key=_pace(line), reverse=True)
    found = _riding(Sets(line, everyone, runs), together, [place[index] for index in riders])
    return [index for index, rides in zip(everyone, found, strict=True) if rides]


def _riding(sets: Sets, together: Bools, riders: Sequence[int]) -> Bools:
    """Those who run `together` with each of the riders that costs nobody anything beside those
    before it.

    As long as nobody costs anything, those behind are weighed as if each before them rode; behind
    one that does, as if nobody did.
    """
    most = float(sets.expected(together[None])[0])
    refused = False
    for _ in range(LOOKS):
        if not riders:
            break
        some = list(riders[:AT_ONCE])
        new = np.zeros((len(some), len(together)), dtype=bool)
        new[np.arange(len(some)), some] = True
        cases = together | (new if refused else np.logical_or.accumulate(new))
        found = sets.expected(cases).tolist()
        before = -1  # the case that stands
        for at, weight in enumerate(found):
            free = weight >= most - EVEN
            if free:
                before, most = at, weight
            if free == refused:  # it is not as was thought: the others have to be weighed anew
                refused, some = not refused, some[: at + 1]
                break
        if before >= 0:
            together = cases[before]
        riders = riders[len(some) :]
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
