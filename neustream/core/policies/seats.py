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

    Between two ends what must be done by an instant grows ever faster, and room at one rate: where
    all of it is done by each end, it is in between.
    """

    def __init__(self, time: Floats, work: Floats, behind: Floats) -> None:
        order = time.argsort()
        self._time = time = time[order]
        self._begin = begin = time - work[order]
        begin.sort()
        columns = np.zeros((3, len(time) + 1))
        np.array([time, begin, behind[order]]).cumsum(1, out=columns[:, 1:])
        self._times, self._begins, self._behind = columns
        begun = begin.searchsorted(time)
        self._must = (begun - np.arange(len(time))) * time - self._begins[begun]
        self._must += self._times[:-1]
        self._room = time - self._behind[1:]

    def fit_on(self, size: int) -> bool:
        """Whether `size` seats suffice."""
        room = size * np.maximum(0.0, self._room)
        return bool((self._must <= room + TICK).all())

    def fit_with(self, size: int, time: Floats, work: Floats, behind: Floats) -> NDArray[np.bool_]:
        """For each of other jobs whether `size` seats suffice with it."""
        begin = time - work
        begun = self._begin.searchsorted(time)
        over = self._time.searchsorted(time, side="right")
        must = (begun - over) * time - self._begins[begun] + self._times[over] + work
        room = size * np.maximum(0.0, time - self._behind[over] - behind)
        fit = np.asarray((begin >= 0) & (must <= room + TICK), dtype=np.bool_)
        asked = np.flatnonzero(fit)
        if len(asked):
            fit[asked] = self._at_ends(size, time[asked], work[asked], behind[asked])
        return fit

    def _at_ends(self, size: int, time: Floats, work: Floats, behind: Floats) -> NDArray[np.bool_]:
        """`fit_with` at the ends of those that have seats."""
        ends = self._time
        time, work, behind = time[:, None], work[:, None], behind[:, None]
        must = np.minimum(np.maximum(ends - (time - work), 0.0), work)
        must += self._must
        room = self._room - behind * (time <= ends)
        in_time = must <= size * np.maximum(0.0, room) + TICK
        return np.asarray(in_time.all(axis=1), dtype=np.bool_)


def may_fit(
    jobs: Columns, new: Columns, sizes: NDArray[np.int64], steps: Floats, early: Floats
) -> NDArray[np.bool_]:
    """For each of `new` whether `sizes` seats can do for `jobs` with it.

    It is refused if there is no room for all of the work until the last is due, or none at its own
    end: what is left may still not fit at another's. `due` counts from the start of the steps, and
    jobs are to end `early` before it.
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
    """`may_fit` at the end of each of `new`."""
    gap = (new.due[:, None] - jobs.due) / steps[:, None]
    must = np.minimum(np.maximum(gap + jobs.left, 0.0), jobs.left).sum(axis=1) + new.left
    behind = (gap >= 0.0) @ jobs.behind + new.behind
    room = sizes * np.maximum(0.0, new.due - early - behind)
    may: NDArray[np.bool_] = must * steps <= room + 2 * TICK
    return may


def sums(x: Floats) -> Floats:
    """The sums of the first 0, 1, ... of x."""
    out = np.zeros(len(x) + 1)
    x.cumsum(out=out[1:])
    return out
