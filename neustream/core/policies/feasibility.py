"""Which sets of jobs can all be on time on one worker, and in what batches: the arithmetic of promises.

Jobs that share a looped stage form a line. Two plans are tried for a set, both fluid (steps are
divisible) and exact but for that as long as nobody else comes:

* **In turns.** Everyone in a line advances at the same pace, in batches of its most efficient size:
  of n jobs, the b <= n of the least latency(b) / b run at a time, so that one step for each costs
  `turn(n) = n * latency(b) / b`. With jobs in order of the steps r they have left, job i ends after
  `sum_{k<=i} (r_k - r_{k-1}) * turn(n - k + 1)`, plus the decodes (and whatever else comes behind the
  loop) of those before it.
* **On seats.** b jobs at a time, each at its own need: b machines that take latency(b) a step, with
  preemption. A set fits iff no job needs longer than it has, and up to each instant x the work that
  must be done by then fits: `sum_i clip(x - (d_i - p_i), 0, p_i) <= b * x` for p_i = r_i * latency(b)
  and deadline d_i, at all x in {d_i, d_i - p_i} (the cuts of the max-flow that such a schedule is).

In turns is right where promises are alike, on seats where some are tight and others loose. With
several lines (two models on one device) only turns are planned, each line at a pace in proportion
to its mean steps left.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neustream.core.profile import LatencyProfile
from neustream.core.types import TICK

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Curve:
    """What follows from a looped stage's latencies at batches of up to `limit`.

    `latency[b]`; `best[n]`, the most efficient batch of at most n; `reach[b - 1]`, the least latency of
    b or more (rising; `fast` as a list), for finding the largest batch that is fast enough.
    """

    def __init__(self, profile: LatencyProfile, limit: int, size: float) -> None:
        self.limit = limit
        steps = [profile.latency(b, b * size, b * size * size) for b in range(1, limit + 1)]
        self.latency = np.array([0.0, *steps])
        self.reach = np.minimum.accumulate(self.latency[:0:-1])[::-1]
        self.fast = self.reach.tolist()
        self.best = [0]
        best = 1
        for n in range(1, limit + 1):
            if self.latency[n] * best <= self.latency[best] * n:
                best = n
            self.best.append(best)
        each = self.latency[1:] / np.arange(1, limit + 1)
        self._each = np.minimum.accumulate(each)
        self._turns = np.zeros(1)
        self._paces, self._charges = _lower_hull(self.reach, self.reach / np.arange(1, limit + 1))
        self._corners: tuple[list[float], list[float]] = (self._paces.tolist(), self._charges.tolist())

    def turns(self, count: int) -> Floats:
        """`turn(n)` for n from 0 to at least `count`."""
        if len(self._turns) <= count:
            n = np.arange(1, 2 * count + 9)
            self._turns = np.concatenate([[0.0], n * self._each[np.minimum(n, self.limit) - 1]])
        return self._turns

    def charge(self, pace: Floats) -> Floats:
        """Device seconds that one step costs at least, if steps may take `pace` seconds on average.

        A step in a batch of b takes latency(b) and occupies 1/b of the device meanwhile; mixtures
        of batches lie on the lower convex hull of these points (the slack-priced bound's measure).
        """
        return np.interp(pace, self._paces, self._charges)

    def charge_of(self, pace: float) -> float:
        """The same for one job."""
        paces, charges = self._corners
        at = bisect_right(paces, pace)
        if at in (0, len(paces)):
            return charges[0 if at == 0 else -1]
        share = (pace - paces[at - 1]) / (paces[at] - paces[at - 1])
        return charges[at - 1] + share * (charges[at] - charges[at - 1])


def _lower_hull(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The falling part of the lower convex hull of points with rising x."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if hull and point[1] >= hull[-1][1]:
            continue
        while hull and (hull[-1][0] >= point[0] or (len(hull) > 1 and _above(hull[-2], hull[-1], point))):
            hull.pop()
        hull.append(point)
    return np.array([p[0] for p in hull]), np.array([p[1] for p in hull])


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


@lru_cache(maxsize=256)
def curve(profile: LatencyProfile, limit: int, size: float = 0.0) -> Curve:
    """The curve of a profile, made once."""
    return Curve(profile, limit, size)


@dataclass(slots=True)
class Lines:
    """The jobs that a worker could serve, as arrays in order of `turns_left`.

    Args:
        start: when the first loop step can begin, but for `entry`.
        curves, speeds, paces: of each line; `speeds` stretches its latencies, `paces` is how many
            steps it takes in a unit of the common plan.
        line: which line each job is in; `left` its steps there, `due` when they must be over, so that
            what comes `behind` the loop, in seconds, still ends in time.
        entry: seconds before its loop that admitting one more job costs everyone (an encoding).
    """

    start: float
    curves: list[Curve]
    speeds: list[float]
    paces: list[float]
    line: Ints
    left: Floats
    due: Floats
    behind: Floats
    entry: Floats
    turns_left: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.turns_left = self.left if len(self.curves) == 1 else self.left / np.array(self.paces)[self.line]

    # -- a set ------------------------------------------------------------------------------------

    def fits(self, some: Ints, entry: float = 0.0) -> bool:
        """Whether all of `some` (rising indices) can be on time, `entry` seconds from `start` on."""
        return not len(some) or self.in_turns(some, entry) or self.seats(some, entry) > 0

    def in_turns(self, some: Ints, entry: float = 0.0) -> bool:
        """Whether all of `some` are on time if they take turns."""
        behind = self.behind[some]
        ends = (_gaps(self.turns_left[some]) * self._costs(some) + behind).cumsum()
        return bool((ends - behind <= self.due[some] - (self.start + entry - TICK)).all())

    def _costs(self, some: Ints) -> Floats:
        """Seconds of a common turn while job k and those behind it in the order are left, for each k."""
        if len(self.curves) == 1:
            return self.speeds[0] * self.curves[0].turns(len(some))[len(some) : 0 : -1]
        cost = np.zeros(len(some))
        for at in range(len(self.curves)):
            cost += self._line_costs(at, (self.line[some] == at)[::-1].cumsum()[::-1])
        return cost

    def _line_costs(self, at: int, counts: Ints) -> Floats:
        return self.paces[at] * self.speeds[at] * self.curves[at].turns(len(self.left) + 1)[counts]

    def seats(self, some: Ints, entry: float = 0.0) -> int:
        """The batch size at which all of `some` are on time on seats; 0 if there is none.

        The largest batch that the tightest job can afford is the limit, the most efficient one
        below it is tried. Real steps end up to one step later than the fluid plan: jobs are given
        one step less time.
        """
        if len(self.curves) > 1 or len(some) < 2:
            return 0
        start = self.start + entry
        size = self._affordable(float(((self.due[some] - start) / (self.left[some] + 1)).min()), len(some) - 1)
        if not size:
            return 0
        work, time = self._on_seats(some, start, size)
        if (work > time).any():
            return 0
        taken = _Taken(time, work, self.behind[some])
        room = size * np.maximum(0.0, taken.points - taken.behind_by(taken.points))
        return size if (taken.work_by(taken.points) <= room + TICK).all() else 0

    def _affordable(self, pace: float, most: int) -> int:
        curve, speed = self.curves[0], self.speeds[0]
        fast = bisect_right(curve.fast, pace / speed)
        return curve.best[min(fast, most, curve.limit)]

    def _on_seats(self, some: Ints, start: float, size: int) -> tuple[Floats, Floats]:
        """Seconds that each needs on a seat, and has until its deadline (one step less)."""
        step = self.curves[0].latency[size] * self.speeds[0]
        return self.left[some] * step, self.due[some] - (start + step)

    # -- a set and one more -----------------------------------------------------------------------

    def fits_with(self, some: Ints, others: Ints) -> NDArray[np.bool_]:
        """For each of `others` whether it fits together with all of `some`."""
        fit = self._turns_with(some, others)
        if len(self.curves) == 1 and len(some) and not fit.all():
            missing = np.flatnonzero(~fit)
            fit[missing] = self._seats_with(some, others[missing])
        return fit

    def _turns_with(self, some: Ints, others: Ints) -> NDArray[np.bool_]:
        """Taking turns with one more: those before it in the order wait for a larger batch, those
        behind it for all of its turns as well, so that a prefix and a suffix minimum of slack decide."""
        left, behind = self.turns_left[some], self.behind[some]
        steps, after = _gaps(left), _sums(behind)
        without = np.append(self._costs(some), 0.0)
        ends = _sums(steps * without[:-1])
        due = self.due[some] - self.start - after[:-1]
        later = np.append(np.minimum.accumulate((due - ends[1:])[::-1])[::-1], np.inf)
        fit = np.zeros(len(others), dtype=bool)
        for at in range(len(self.curves)):
            mine = np.flatnonzero(self.line[others] == at) if len(self.curves) > 1 else np.arange(len(others))
            if not len(mine):
                continue
            who = others[mine]
            together = self._costs_with(some, at, without)
            ends_with = _sums(steps * together[:-1])
            before = np.append(np.minimum.accumulate(due - ends_with[1:]), np.inf)  # [-1]: nobody is before it
            place = some.searchsorted(who)
            beyond = self.turns_left[who] - np.append(left, 0.0)[place - 1]
            end = self.entry[who] + ends_with[place] + beyond * together[place]
            delay = end - ends[place] - beyond * without[place] + self.behind[who]
            own = self.due[who] - (self.start + end + after[place])
            fit[mine] = np.minimum(np.minimum(own, before[place - 1] - self.entry[who]), later[place] - delay) >= -TICK
        return fit

    def _costs_with(self, some: Ints, at: int, without: Floats) -> Floats:
        """`_costs` with one more job of line `at`, and of that job alone."""
        if len(self.curves) == 1:
            return self.speeds[0] * self.curves[0].turns(len(some) + 1)[len(some) + 1 : 0 : -1]
        counts = np.concatenate([(self.line[some] == at)[::-1].cumsum()[::-1], [0]])
        return without + self._line_costs(at, counts + 1) - self._line_costs(at, counts)

    def _seats_with(self, some: Ints, others: Ints) -> NDArray[np.bool_]:
        """As `seats`, for `some` with each one of `others`."""
        start = self.start + float(self.entry[others].max())
        pace = ((self.due[some] - start) / (self.left[some] + 1)).min()
        paces = np.minimum(pace, (self.due[others] - start) / (self.left[others] + 1))
        sizes = np.array([self._affordable(float(x), len(some)) for x in paces])
        fit = np.zeros(len(others), dtype=bool)
        for size in set(sizes.tolist()) - {0}:
            work, time = self._on_seats(some, start, size)
            if (work > time).any():
                continue
            mine = np.flatnonzero(sizes == size)
            taken = _Taken(time, work, self.behind[some])
            own_behind = self.behind[others[mine], None]
            own_work, own_time = (x[:, None] for x in self._on_seats(others[mine], start, size))
            points, begin = taken.points, own_time - own_work
            room = size * np.maximum(0.0, points - taken.behind_by(points) - own_behind * (own_time <= points))
            must = taken.work_by(points) + np.minimum(np.maximum(points - begin, 0.0), own_work)
            good = (must <= room + TICK).all(axis=1) & (begin >= 0)[:, 0]
            for share, paid, at in ((own_work, own_behind, own_time), (0.0, 0.0, begin)):
                room = size * np.maximum(0.0, at - taken.behind_by(at) - paid)
                good &= (taken.work_by(at) + share <= room + TICK)[:, 0]
            fit[mine] = good
        return fit


class _Taken:
    """Seats that are taken: by jobs that need `work` seconds, are due in `time`, and go on for `behind`.

    `points`: where what must be done by an instant can exceed what can be.
    """

    def __init__(self, time: Floats, work: Floats, behind: Floats) -> None:
        begin = time - work
        order = time.argsort()
        self.points = np.concatenate([time, begin])
        begin.sort()
        self._time, self._begin = time[order], begin
        self._times, self._begins, self._behind = _sums(self._time), _sums(begin), _sums(behind[order])

    def work_by(self, points: Floats) -> Floats:
        """Seconds of work that must be done by each of `points`: sum_i clip(x - (time_i - work_i), 0, work_i)."""
        begun, over = self._begin.searchsorted(points), self._time.searchsorted(points)
        return (begun - over) * points - self._begins[begun] + self._times[over]

    def behind_by(self, points: Floats) -> Floats:
        """Seconds behind the loops of those who are due by each of `points`."""
        return self._behind[self._time.searchsorted(points, side="right")]


def _sums(x: Floats) -> Floats:
    """The sums of the first 0, 1, ... of x."""
    out = np.zeros(len(x) + 1)
    np.cumsum(x, out=out[1:])
    return out


def _gaps(x: Floats) -> Floats:
    """The differences of neighbours, the first one to 0."""
    out = x.copy()
    out[1:] -= x[:-1]
    return out
