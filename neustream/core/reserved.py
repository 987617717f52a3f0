"""Device time that has been promised away: how much of it by when, and what it leaves to others."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from neustream.core.types import TICK

Floats = NDArray[np.float64]
Point = tuple[float, float]
"""Seconds from now, and seconds of the device that are promised until then."""


class Reserved:
    """A demand curve: until `points[k][0]` seconds from now, `points[k][1]` of them are promised.

    Between two points the curve is a line, behind the last one it is flat. The promises can be kept
    with the whole device if and only if the curve is nowhere above the time itself (the processor
    demand criterion of EDF: Baruah, Rosier and Howell, 1990).

    Args:
        points: by rising time. A deadline is a jump: two points, `TICK` apart.
        step: seconds of one step of those who hold the promises. Steps are not divisible, so so
            much may be under way when somebody else is due.
    """

    __slots__ = ("_arrays", "_columns", "_least", "_times", "points", "step")

    def __init__(self, points: Iterable[Point] = (), step: float = 0.0) -> None:
        self.points: tuple[Point, ...] = tuple(points)
        self.step = step
        self._times = [time for time, _ in self.points]
        slack = [time - seconds for time, seconds in self.points]
        least = list(accumulate(reversed(slack), min))
        self._least = [*reversed(least), math.inf]
        self._arrays: NDArray[np.float64] | None = None
        self._columns: tuple[Floats, Floats] | None = None

    def __bool__(self) -> bool:
        return bool(self.points)

    @property
    def room(self) -> float:
        """Seconds for which others may have the device to themselves; negative: none, and late."""
        return self._least[0]

    @property
    def share(self) -> float:
        """The least constant share of the device, 0 to 1, that keeps the promises."""
        shares = [seconds / time if time > 0 else 1.0 for time, seconds in self.points if seconds]
        return min(max(shares, default=0.0), 1.0)

    def by(self, time: float) -> float:
        """Seconds of the device that are promised until `time` seconds from now."""
        index = bisect_left(self._times, time)
        if index == len(self.points):
            return self.points[-1][1] if self.points else 0.0
        end, seconds = self.points[index]
        start, before = self.points[index - 1] if index else (0.0, 0.0)
        if end <= start:
            return seconds
        return before + (seconds - before) * (time - start) / (end - start)

    def left(self, time: float) -> float:
        """Seconds of the next `time` that others may have, so that no promise is broken by them.

        Neither one that is due until then, nor a later one. 0 or more.
        """
        if not self.points or time == math.inf:
            return time
        later = self._least[bisect_left(self._times, time)]
        return max(min(time - self.by(time), later) - self.step, 0.0)

    def each_left(self, times: Floats) -> Floats:
        """`left` of each of some times."""
        if not self.points:
            return times
        if self._columns is None:
            before = [(0.0, 0.0)] if self._times[0] > 0 else []
            self._columns = np.array([*before, *self.points]).T, np.array(self._least)
        (until, seconds), least = self._columns
        later = least[np.searchsorted(self._times, times)]
        free = np.minimum(times - np.interp(times, until, seconds), later)
        left: Floats = np.maximum(free - self.step, 0.0)
        return left

    def leaves(self, points: Sequence[Point]) -> bool:
        """Whether a demand at a pace, by rising time, can be met too, at each of all deadlines.

        Lines between its points, as in `by_pace`; before the first one it is 0.
        """
        most = self.points[-1][1] + self.step
        if self.room >= 0 and min([time - spent for time, spent in points]) >= most:
            return True  # even if all of it were due first
        times, seconds = self._curve
        own_times, own_seconds = np.array(points).T
        beside = np.interp(own_times, times, seconds, left=0.0)
        if (own_seconds + beside + self.step > own_times + TICK).any():
            return False
        return self.kept_beside(points)

    def kept_beside(self, points: Sequence[Point]) -> bool:
        """Whether the promises can be kept beside such a demand, whatever becomes of that."""
        times, seconds = self._curve
        own_times, own_seconds = np.array(points).T
        own = np.interp(times, own_times, own_seconds, left=0.0)
        return not (own + seconds > times + TICK).any()

    @property
    def _curve(self) -> Floats:
        """The times of the points, and their seconds [2, points]."""
        if self._arrays is None:
            self._arrays = np.array(self.points).T
        return self._arrays

    def __add__(self, other: Reserved) -> Reserved:
        """What two kinds of jobs have been promised together."""
        if not other.points:
            return self
        if not self.points:
            return other
        times = sorted({*self._times, *other._times})
        points = [(time, self.by(time) + other.by(time)) for time in times]
        return Reserved(points, max(self.step, other.step))


NOTHING = Reserved()
"""Nobody was promised anything."""


def by_deadlines(seconds_until: Iterable[Point], step: float = 0.0) -> Reserved:
    """The curve of jobs that need so many seconds of the device until their deadlines.

    Args:
        seconds_until: for each job its deadline, in seconds from now, and what it and all that run
            before it need; in any order.
    """
    needed = dict(sorted(seconds_until))  # of equal deadlines the most
    points: list[Point] = []
    most = 0.0
    for time, seconds in needed.items():
        if seconds > most:
            points += [(time - TICK, most), (time, seconds)]
            most = seconds
    return Reserved(_rising(points), step)


def by_pace(seconds_until: Iterable[Point], step: float = 0.0) -> Reserved:
    """The curve of jobs that need the device at a pace: lines behind the first point."""
    points: list[Point] = []
    most = 0.0
    for time, seconds in sorted(seconds_until):
        if not points:
            points.append((time - TICK, 0.0))
        most = max(most, seconds)
        points.append((time, most))
    return Reserved(_rising(points), step)


def _rising(points: Iterable[Point]) -> list[Point]:
    """The points by strictly rising time; of equal times the last."""
    rising: list[Point] = []
    for time, seconds in points:
        while rising and rising[-1][0] >= time:
            rising.pop()
        rising.append((time, seconds))
    return rising
