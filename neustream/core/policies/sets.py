"""What sets of a line's jobs are expected to bring, many sets at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Floats
from neustream.core.policies.feasibility import SPARE, Line
from neustream.core.types import TICK

Bools = NDArray[np.bool_]

EVEN = 1e-6
"""Share by which times are the same."""


def weight_on_time(
    line: Line, jobs: Sequence[int], ends: Sequence[tuple[float, float]], runs: Floats, entry: float
) -> float:
    """Weight of `jobs` expected on time, of which `ends` has deadlines and planned ends.

    `runs`: what runs of steps took lately, by what they usually take, rising.
    """
    start = line.start + entry
    deadlines, over = np.array(ends).T
    return float(_chance(deadlines - start, over - start, runs) @ _weight(line, jobs))


def _chance(time: Floats, need: Floats, runs: Floats) -> Floats:
    """The share of `runs` under which what needs so many seconds is over in `time`."""
    bearable = time / np.maximum(need, TICK)
    chance: Floats = runs.searchsorted(bearable + EVEN, side="right") / len(runs)
    return chance


def _weight(line: Line, jobs: Sequence[int]) -> Floats:
    return np.array([line.weight[index] for index in jobs], dtype=np.float64)


class Sets:
    """The weight expected on time of sets of some jobs.

    Args:
        jobs: by their places in the line, rising; a set says of each of these whether it has it.
        runs: see `weight_on_time`.
        entry: seconds before the loop that each costs everyone; none do without.

    Attributes:
        weight: of each job.
    """

    def __init__(
        self, line: Line, jobs: Sequence[int], runs: Floats, entry: Sequence[float] = ()
    ) -> None:
        self.weight = _weight(line, jobs)
        self._line = line
        self._jobs = np.array(jobs, dtype=np.int64)
        self._runs = runs
        self._left, self._due, self._behind = [column[self._jobs] for column in line.arrays]
        self._entry = np.array(entry or [0.0] * len(jobs))
        self._by_due = self._due.argsort(kind="stable")

    def expected(self, sets: Bools) -> Floats:
        """What `chances.expected` says of each of several sets [sets, jobs]: [sets]."""
        entry = np.where(sets, self._entry, 0.0).max(1, keepdims=True)
        start = self._line.start + entry
        ends = self._turn_ends(sets, start)
        chance = _chance(self._due + self._behind - start, ends - start, self._runs)
        weight: Floats = np.where(sets, chance, 0.0) @ self.weight
        late = (sets & (ends - self._behind > self._due + TICK)).any(1)
        more = weight < sets @ self.weight
        some = np.flatnonzero(late & more)
        if len(some):
            weight[some] = np.maximum(weight[some], self._on_seats(sets[some], entry[some]))
        return weight

    def _turn_ends(self, sets: Bools, start: Floats) -> Floats:
        """As `Line.turn_ends` [sets, jobs]; of those that are in a set."""
        line = self._line
        rank = sets.cumsum(1)
        left = np.maximum.accumulate(np.where(sets, self._left, 0.0), axis=1)
        turns = np.diff(left, axis=1, prepend=0.0)
        costs = line.speed * line.curve.turns(sets.shape[1])
        need = turns * costs[rank[:, -1:] - rank + 1]
        need += self._behind
        need *= sets
        need[:, :1] += start
        ends: Floats = need.cumsum(1)
        return ends

    # -- on seats ---------------------------------------------------------------------------------

    def _on_seats(self, sets: Bools, entry: Floats) -> Floats:
        """The weight of each set that is expected on time on seats; 0 where it does not fit."""
        line = self._line
        paces = (self._due - line.start - entry) / (self._left + SPARE)
        pace = np.where(sets, paces, np.inf).min(1).tolist()
        sizes = [
            line.affordable(time, count - 1) if count > 1 else 0
            for time, count in zip(pace, sets.sum(1).tolist(), strict=True)
        ]
        weight = np.zeros(len(sets))
        for size in set(sizes) - {0}:
            rows = np.flatnonzero(np.array(sizes) == size)
            rows = rows[self._fit(size, sets[rows], entry[rows])]
            worth = [line.worth(self._jobs[sets[at]], float(entry[at, 0]), size) for at in rows]
            rows = rows[np.array(worth, dtype=bool)]
            weight[rows] = self._seated(size, sets[rows], entry[rows])
        return weight

    def _fit(self, size: int, sets: Bools, entry: Floats) -> Bools:
        """As `seats.Taken.fit_on` for each set."""
        line = self._line
        step = line.curve.seconds[size] * line.speed
        work = self._left * step
        time = self._due - (line.start + SPARE * step)
        begin = time - work
        by_time, by_begin = self._by_due, begin.argsort()
        ends, begins = time[by_time], begin[by_begin]
        ending, beginning = sets[:, by_time], sets[:, by_begin]
        begun = begins.searchsorted(ends)
        must = (_sums(beginning)[:, begun] - _sums(ending)[:, :-1]) * ends
        must += _sums(ending * ends)[:, :-1] - _sums(beginning * begins)[:, begun]
        behind = (ending * self._behind[by_time]).cumsum(1)
        fits = must <= size * np.maximum(ends - entry - behind, 0.0) + TICK
        fits |= ~ending
        fit: Bools = fits.all(1) & ~(sets & (work > time - entry)).any(1)
        return fit

    def _seated(self, size: int, sets: Bools, entry: Floats) -> Floats:
        """The weight of each set that is expected on time on `size` seats; see `seat_ends`."""
        line, by_due = self._line, self._by_due
        sets, behind = sets[:, by_due], self._behind[by_due]
        alone = self._left[by_due] * (line.curve.seconds[size] * line.speed)
        start = line.start + entry
        together = (sets * (alone / size + behind)).cumsum(1)
        time = self._due[by_due] + behind - start
        chance = _chance(time, np.maximum(together, alone + behind), self._runs)
        weight: Floats = np.where(sets, chance, 0.0) @ self.weight[by_due]
        return weight


def _sums(rows: Floats | Bools) -> Floats:
    """The sums of the first 0, 1, ... of each row."""
    out = np.zeros((len(rows), rows.shape[1] + 1))
    np.cumsum(rows, axis=1, out=out[:, 1:])
    return out
