"""Which sets of jobs can all be on time on one worker, and in what batches.

Jobs that share a looped stage form a line. Two plans are tried for a set. Both are fluid (steps
are divisible), and exact but for that as long as nobody else comes:

* **In turns** (processor sharing). All jobs of a line advance at the same pace, in batches of the
  line's most efficient size: of n jobs, the b <= n of the least latency(b) / b run at a time, so
  that one step for each costs `turn(n) = n * latency(b) / b`. With jobs in order of the steps r
  they have left, job i ends after `sum_{k<=i} (r_k - r_{k-1}) * turn(n - k + 1)`, plus the decodes
  (and whatever else comes behind the loop) of those before it.
* **On seats** (b machines with preemption). b jobs run at a time, each at its own need: b machines
  that take latency(b) a step. A set fits iff no job needs longer than it has, and up to each
  instant x the work that must be done by then fits:
  `sum_i clip(x - (d_i - p_i), 0, p_i) <= b * x` for p_i = r_i * latency(b) and deadline d_i, at
  all x in {d_i, d_i - p_i} (the cuts of the max-flow that such a schedule is).

In turns is right where promises are alike, on seats where some are tight and others loose. With
several lines (two models on one device) only turns are planned, each line at a pace in proportion
to its mean steps left.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Curve, Floats
from neustream.core.types import TICK

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FEW = 6
"""Up to so many jobs it is quicker to ask of each whether it fits than of all at once."""


@dataclass(slots=True)
class Columns:
    """The jobs of `Lines` as arrays."""

    line: Ints
    left: Floats
    due: Floats
    behind: Floats
    entry: Floats
    turns_left: Floats


@dataclass
class Lines:
    """The jobs that a worker could serve, by columns, in order of `turns_left`. Not to be changed.

    Args:
        start: when the first loop step can begin, but for `entry`.
        curves, speeds, paces: of each line; `speeds` stretches its latencies, `paces` is how many
            steps it takes in a unit of the common plan.
        line: the line of each job.
        left: its steps there.
        due: when they must be over, so that what comes `behind` the loop still ends in time.
        behind: seconds of that.
        entry: seconds before its loop that admitting one more job costs everyone (an encoding).

    `turns_left`: units of the common plan until the steps of each job are over.
    """

    start: float
    curves: list[Curve]
    speeds: list[float]
    paces: list[float]
    line: Sequence[int] | Ints
    left: Sequence[float] | Floats
    due: Sequence[float] | Floats
    behind: Sequence[float] | Floats
    entry: Sequence[float] | Floats

    turns_left: Sequence[float] | Floats = field(init=False)
    _latest: tuple[object, float, bool] = field(init=False, default=(None, 0.0, False))

    def __post_init__(self) -> None:
        if len(self.curves) == 1:
            self.turns_left = self.left
        else:
            left = zip(self.line, self.left, strict=True)
            self.turns_left = [steps / self.paces[line] for line, steps in left]

    @cached_property
    def arrays(self) -> Columns:
        return Columns(
            np.asarray(self.line),
            np.asarray(self.left, dtype=np.float64),
            np.asarray(self.due),
            np.asarray(self.behind),
            np.asarray(self.entry),
            np.asarray(self.turns_left, dtype=np.float64),
        )

    # -- a set ------------------------------------------------------------------------------------

    def fits(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> bool:
        """Whether all of `jobs` (rising places) can be on time, `entry` seconds from `start` on."""
        return not len(jobs) or self.in_turns(jobs, entry) or self.seats(jobs, entry) > 0

    def in_turns(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> bool:
        """Whether all of `jobs` are on time if they take turns. The latest answer is kept."""
        asked, at_entry, answer = self._latest
        if asked is not jobs or at_entry != entry:
            answer = self._in_turns(jobs, entry)
            self._latest = jobs, entry, answer
        return answer

    def _in_turns(self, jobs: Sequence[int] | Ints, entry: float) -> bool:
        turns_left, due, behind = self.turns_left, self.due, self.behind
        start = self.start + entry - TICK
        end = before = 0.0
        for index, cost in zip(jobs, self._costs(jobs), strict=True):
            turns = turns_left[index]
            after = behind[index]
            end += (turns - before) * cost + after
            if end - after > due[index] - start:
                return False
            before = turns
        return True

    def _costs(self, jobs: Sequence[int] | Ints) -> list[float]:
        """Seconds of a common turn while job k and those behind it are left, for each k."""
        count = len(jobs)
        if len(self.curves) == 1:
            turns, speed = self.curves[0].turn_list(count), self.speeds[0]
            costs = turns[count:0:-1]
            return costs if speed == 1.0 else [speed * cost for cost in costs]
        lines = self.arrays.line[jobs]
        together = np.zeros(count)
        for line in range(len(self.curves)):
            together += self._line_costs(line, _left_from(lines == line))
        return list(together.tolist())

    def _line_costs(self, line: int, counts: Ints) -> Floats:
        turns = self.curves[line].turns(len(self.left) + 1)
        return self.paces[line] * self.speeds[line] * turns[counts]

    def seats(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> int:
        """The batch size at which all of `jobs` are on time on seats; 0 if there is none.

        The largest batch that the tightest job can afford is the limit, the most efficient one
        below it is tried. Real steps end up to one step later than the fluid plan: jobs are given
        one step less time.
        """
        if len(self.curves) > 1 or len(jobs) < 2:
            return 0
        columns = self.arrays
        start = self.start + entry
        paces = (columns.due[jobs] - start) / (columns.left[jobs] + 1)
        size = self._affordable(float(paces.min()), len(jobs) - 1)
        if not size:
            return 0
        work, time = self._on_seats(jobs, start, size)
        if (work > time).any():
            return 0
        taken = _Taken(time, work, columns.behind[jobs])
        room = size * np.maximum(0.0, taken.points - taken.behind_by(taken.points))
        return size if (taken.work_by(taken.points) <= room + TICK).all() else 0

    def _affordable(self, pace: float, most: int) -> int:
        """The most efficient batch of at most `most` that takes at most `pace` a step; 0: none."""
        curve, speed = self.curves[0], self.speeds[0]
        fast = bisect_right(curve.fast, pace / speed)
        return curve.best[min(fast, most, curve.limit)]

    def _on_seats(
        self, jobs: Sequence[int] | Ints, start: float, size: int
    ) -> tuple[Floats, Floats]:
        """Seconds that each needs on a seat, and has until its deadline (one step less)."""
        step = self.curves[0].seconds[size] * self.speeds[0]
        return self.arrays.left[jobs] * step, self.arrays.due[jobs] - (start + step)

    # -- a set and one more -----------------------------------------------------------------------

    def fits_with(self, jobs: Sequence[int] | Ints, others: Ints) -> Bools:
        """For each of `others` whether it fits together with all of `jobs`."""
        if len(others) <= FEW:
            fit = self._each_with(list(jobs), others)
            jobs = np.asarray(jobs, dtype=np.int64)
        else:
            jobs = np.asarray(jobs, dtype=np.int64)
            fit = self._turns_with(jobs, others)
        if len(self.curves) == 1 and len(jobs) and not fit.all():
            missing = np.flatnonzero(~fit)
            fit[missing] = self._seats_with(jobs, others[missing])
        return fit

    def _each_with(self, jobs: list[int], others: Ints) -> Bools:
        """`fits_with` in turns, asked one by one."""
        fit = np.zeros(len(others), dtype=bool)
        for place, new in enumerate(others.tolist()):
            joint = jobs.copy()
            insort(joint, new)
            fit[place] = self._in_turns(joint, self.entry[new])
        return fit

    def _turns_with(self, jobs: Ints, others: Ints) -> Bools:
        """`fits_with` in turns, for all of `others` at once.

        Jobs before the new one in the order wait for a larger batch; those behind it wait for all
        of its turns as well. So a prefix and a suffix minimum of slack decide.
        """
        columns = self.arrays
        left, behind = columns.turns_left[jobs], columns.behind[jobs]
        steps, after = _gaps(left), _sums(behind)
        without = np.append(self._costs(jobs), 0.0)
        ends = _sums(steps * without[:-1])
        due = columns.due[jobs] - self.start - after[:-1]
        later = np.append(np.minimum.accumulate((due - ends[1:])[::-1])[::-1], np.inf)
        fit = np.zeros(len(others), dtype=bool)
        for line in range(len(self.curves)):
            chosen = self._of_line(line, others)
            if not len(chosen):
                continue
            new = others[chosen]
            entry = columns.entry[new]
            together = self._costs_with(jobs, line, without)
            ends_with = _sums(steps * together[:-1])
            before = np.append(np.minimum.accumulate(due - ends_with[1:]), np.inf)  # [-1]: nobody
            place = jobs.searchsorted(new)
            beyond = columns.turns_left[new] - np.append(left, 0.0)[place - 1]
            end = entry + ends_with[place] + beyond * together[place]
            delay = end - ends[place] - beyond * without[place] + columns.behind[new]
            own_slack = columns.due[new] - (self.start + end + after[place])
            slack = np.minimum(own_slack, before[place - 1] - entry)
            fit[chosen] = np.minimum(slack, later[place] - delay) >= -TICK
        return fit

    def _of_line(self, line: int, jobs: Ints) -> Ints:
        """The places in `jobs` of those of a line."""
        if len(self.curves) == 1:
            return np.arange(len(jobs))
        return np.flatnonzero(self.arrays.line[jobs] == line)

    def _costs_with(self, jobs: Ints, line: int, without: Floats) -> Floats:
        """`_costs` with one more job of `line`, and of that job alone."""
        if len(self.curves) == 1:
            count = len(jobs) + 1
            return self.speeds[0] * self.curves[0].turns(count)[count:0:-1]
        counts = np.append(_left_from(self.arrays.line[jobs] == line), 0)
        return without + self._line_costs(line, counts + 1) - self._line_costs(line, counts)

    def _seats_with(self, jobs: Ints, others: Ints) -> Bools:
        """As `seats`, for `jobs` with each one of `others`."""
        columns = self.arrays
        start = self.start + float(columns.entry[others].max())
        pace = ((columns.due[jobs] - start) / (columns.left[jobs] + 1)).min()
        paces = np.minimum(pace, (columns.due[others] - start) / (columns.left[others] + 1))
        sizes = np.array([self._affordable(float(x), len(jobs)) for x in paces])
        fit = np.zeros(len(others), dtype=bool)
        for size in set(sizes.tolist()) - {0}:
            chosen = np.flatnonzero(sizes == size)
            fit[chosen] = self._seats_of(size, jobs, others[chosen], start)
        return fit

    def _seats_of(self, size: int, jobs: Ints, others: Ints, start: float) -> Bools:
        """Whether `jobs` with each one of `others` are on time on `size` seats."""
        work, time = self._on_seats(jobs, start, size)
        if (work > time).any():
            return np.zeros(len(others), dtype=bool)
        columns = self.arrays
        taken = _Taken(time, work, columns.behind[jobs])
        new_behind = columns.behind[others, None]
        new_work, new_time = (x[:, None] for x in self._on_seats(others, start, size))
        begin = new_time - new_work
        points = taken.points
        behind = taken.behind_by(points)
        room = size * np.maximum(0.0, points - behind - new_behind * (new_time <= points))
        must = taken.work_by(points) + np.minimum(np.maximum(points - begin, 0.0), new_work)
        fit: Bools = (must <= room + TICK).all(axis=1) & (begin >= 0)[:, 0]
        room = size * np.maximum(0.0, new_time - taken.behind_by(new_time) - new_behind)
        fit &= (taken.work_by(new_time) + new_work <= room + TICK)[:, 0]
        room = size * np.maximum(0.0, begin - taken.behind_by(begin))
        fit &= (taken.work_by(begin) <= room + TICK)[:, 0]
        return fit


class _Taken:
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
        self._times = _sums(self._time)
        self._begins = _sums(begin)
        self._behind = _sums(behind[order])

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


def _left_from(jobs: Bools) -> Ints:
    """How many are true from each place on."""
    return jobs[::-1].cumsum()[::-1]


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
