"""Seats that jobs take, and whether all of their work is done by when it must be.

With b seats, up to each instant x the work that must be done by then has to fit: see
`feasibility.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Floats
from neustream.core.types import TICK


class Columns(NamedTuple):
    """Jobs of a line as arrays: steps left, due in seconds, seconds behind the loop."""

    left: Floats
    due: Floats
    behind: Floats


class Taken:
    """Seats taken by jobs that need `work` seconds, are due in `time`, and go on for `behind`.

    `points`: where what must be done by an instant can exceed what can be.
    """

    def __init__(self, time: Floats, work: Floats, behind: Floats) -> None:
        begin = time - work
        order = time.argsort()
        self.points = np.concatenate([time, begin])
        begin.sort()
        self._time = time[order]
        self._begin = begin
        self._times = sums(self._time)
        self._begins = sums(begin)
        self._behind = sums(behind[order])

    def work_by(self, points: Floats) -> Floats:
        """Seconds of work that must be done by each of `points`.

        That is sum_i clip(x - (time_i - work_i), 0, work_i) at each x.
        """
        begun = self._begin.searchsorted(points)
        over = self._time.searchsorted(points)
        return (begun - over) * points - self._begins[begun] + self._times[over]

    def behind_by(self, points: Floats) -> Floats:
        """Seconds behind the loops of the jobs that are due by each of `points`."""
        return self._behind[self._time.searchsorted(points, side="right")]

    def fit_on(self, size: int) -> bool:
        """Whether `size` seats suffice."""
        room = size * np.maximum(0.0, self.points - self.behind_by(self.points))
        return bool((self.work_by(self.points) <= room + TICK).all())

    def fit_with(self, size: int, time: Floats, work: Floats, behind: Floats) -> NDArray[np.bool_]:
        """For each of other jobs whether `size` seats suffice with it."""
        begin = time - work
        at_end = size * np.maximum(0.0, time - self.behind_by(time) - behind)
        at_begin = size * np.maximum(0.0, begin - self.behind_by(begin))
        fit = np.asarray(begin >= 0, dtype=np.bool_)
        fit[self.work_by(begin) > at_begin + TICK] = False
        fit[self.work_by(time) + work > at_end + TICK] = False
        asked = np.flatnonzero(fit)
        if len(asked):
            fit[asked] = self._at_points(size, time[asked], work[asked], behind[asked])
        return fit

    def _at_points(
        self, size: int, time: Floats, work: Floats, behind: Floats
    ) -> NDArray[np.bool_]:
        """`fit_with` at the points of those that have seats."""
        points = self.points
        time, work, behind = time[:, None], work[:, None], behind[:, None]
        left = points - self.behind_by(points) - behind * (time <= points)
        must = self.work_by(points) + np.minimum(np.maximum(points - (time - work), 0.0), work)
        in_time = must <= size * np.maximum(0.0, left) + TICK
        return np.asarray(in_time.all(axis=1), dtype=np.bool_)


def may_fit(
    jobs: Columns, new: Columns, sizes: NDArray[np.int64], steps: Floats, early: Floats
) -> NDArray[np.bool_]:
    """For each of `new` whether `sizes` seats can do for `jobs` with it.

    It is refused if there is no room for all of the work until the last is due, or none at its own
    end or begin: what is left may still not fit at another instant. `due` counts from the start of
    the steps, and jobs are to end `early` before it.
    """
    last = np.maximum(jobs.due.max(), new.due) - early - (jobs.behind.sum() + new.behind)
    may: NDArray[np.bool_]
    may = steps * (jobs.left.sum() + new.left) <= sizes * np.maximum(last, 0.0) + 2 * TICK
    asked = np.flatnonzero(may)
    if len(asked):
        some = Columns(new.left[asked], new.due[asked], new.behind[asked])
        may[asked] = _room_for_own(jobs, some, sizes[asked], steps[asked], early[asked])
    return may


def _room_for_own(
    jobs: Columns, new: Columns, sizes: NDArray[np.int64], steps: Floats, early: Floats
) -> NDArray[np.bool_]:
    """`may_fit` at the end and the begin of each of `new`."""
    gap = (new.due[:, None] - jobs.due) / steps[:, None]
    must = np.minimum(np.maximum(gap + jobs.left, 0.0), jobs.left).sum(axis=1) + new.left
    time = new.due - early
    room = sizes * np.maximum(0.0, time - (gap >= 0.0) @ jobs.behind - new.behind)
    may = must * steps <= room + 2 * TICK
    gap -= new.left[:, None]
    must = np.minimum(np.maximum(gap + jobs.left, 0.0), jobs.left).sum(axis=1)
    room = sizes * np.maximum(0.0, time - new.left * steps - (gap > TICK) @ jobs.behind)
    both: NDArray[np.bool_] = may & (must * steps <= room + 2 * TICK)
    return both


def sums(x: Floats) -> Floats:
    """The sums of the first 0, 1, ... of x."""
    out = np.zeros(len(x) + 1)
    x.cumsum(out=out[1:])
    return out
