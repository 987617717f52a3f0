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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Curve, Floats
from neustream.core.policies.seats import Taken, sums
from neustream.core.types import TICK

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FEW = 6
"""Up to so many jobs it is quicker to ask of each whether it fits than of all at once."""


class Columns(NamedTuple):
    """The jobs of `Lines` as arrays."""

    left: Floats
    due: Floats
    behind: Floats
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
    _arrays: Columns | None = field(init=False, default=None)
    _rows: list[tuple[float, float, float]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if len(self.curves) == 1:
            self.turns_left = self.left
        else:
            left = zip(self.line, self.left, strict=True)
            self.turns_left = [steps / self.paces[line] for line, steps in left]

    @property
    def arrays(self) -> Columns:
        """The columns that are asked for by many jobs at once."""
        if self._arrays is None:
            left, due, behind = np.array([self.left, self.due, self.behind], dtype=np.float64)
            turns = left if self.turns_left is self.left else np.array(self.turns_left)
            self._arrays = Columns(left, due, behind, turns)
        return self._arrays

    def of_line(self, line: int, jobs: Sequence[int] | Ints) -> Bools:
        """Which of `jobs` are of a line."""
        if len(self.curves) == 1:
            return np.ones(len(jobs), dtype=bool)
        chosen: Bools = np.asarray(self.line)[jobs] == line
        return chosen

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
        if self._rows is None:
            self._rows = list(zip(self.turns_left, self.due, self.behind, strict=True))
        rows = self._rows
        if len(jobs) < len(rows):
            rows = [rows[index] for index in jobs]
        speed, costs = self._costs(jobs)
        start = self.start + entry - TICK
        end = before = 0.0
        for (turns, due, behind), cost in zip(rows, costs, strict=True):
            end += (turns - before) * (speed * cost) + behind
            if end - behind > due - start:
                return False
            before = turns
        return True

    def demand(self, jobs: Sequence[int], entry: float = 0.0) -> list[tuple[float, float]]:
        """What `jobs`, which fit, need: for each its deadline, and when its work is over by then.

        In turns, if they fit so: each has to wait for the turns of all. Else on seats.
        """
        if self.in_turns(jobs, entry):
            return self._turn_ends(jobs, entry)
        return self._seat_ends(jobs, entry, self.seats(jobs, entry))

    def _turn_ends(self, jobs: Sequence[int], entry: float) -> list[tuple[float, float]]:
        speed, costs = self._costs(jobs)
        ends = []
        end = self.start + entry
        before = 0.0
        for index, cost in zip(jobs, costs, strict=True):
            turns, behind = self.turns_left[index], self.behind[index]
            end += (turns - before) * (speed * cost) + behind
            before = turns
            ends.append((self.due[index] + behind, end))
        return ends

    def _seat_ends(
        self, jobs: Sequence[int], entry: float, seats: int
    ) -> list[tuple[float, float]]:
        step = self.curves[0].seconds[seats] * self.speeds[0]
        start = self.start + entry
        together = start
        ends = []
        for index in sorted(jobs, key=self.due.__getitem__):
            alone, behind = self.left[index] * step, self.behind[index]
            together += alone / seats + behind
            ends.append((self.due[index] + behind, max(together, start + alone + behind)))
        return ends

    def _costs(self, jobs: Sequence[int] | Ints) -> tuple[float, list[float]]:
        """A factor, and by it seconds of a common turn while job k and those behind it are left."""
        count = len(jobs)
        if len(self.curves) == 1:
            return self.speeds[0], self.curves[0].turn_list(count)[count:0:-1]
        together = np.zeros(count)
        for line in range(len(self.curves)):
            together += self._line_costs(line, _left_from(self.of_line(line, jobs)))
        return 1.0, together.tolist()

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
        start = self.start + entry
        places = np.asarray(jobs, np.int64)
        size = self._affordable(float(self._pace(places, start).min()), len(jobs) - 1)
        taken = self._taken(places, start, size) if size else None
        return size if taken is not None and taken.fit_on(size) else 0

    def _pace(self, jobs: Ints, start: float) -> Floats:
        """Seconds that each has for a step, with one step to spare."""
        columns = self.arrays
        return (columns.due[jobs] - start) / (columns.left[jobs] + 1)

    def _affordable(self, pace: float, most: int) -> int:
        """The most efficient batch of at most `most` that takes at most `pace` a step; 0: none."""
        curve, speed = self.curves[0], self.speeds[0]
        fast = bisect_right(curve.fast, pace / speed)
        return curve.best[min(fast, most, curve.limit)]

    def _on_seats(self, jobs: Ints, start: float, size: int) -> tuple[Floats, Floats]:
        """Seconds that each has on a seat until its deadline (one step less), and needs."""
        step = self.curves[0].seconds[size] * self.speeds[0]
        return self.arrays.due[jobs] - (start + step), self.arrays.left[jobs] * step

    def _taken(self, jobs: Ints, start: float, size: int) -> Taken | None:
        """What `jobs` take of `size` seats; None if one of them needs longer than it has."""
        time, work = self._on_seats(jobs, start, size)
        if (work > time).any():
            return None
        return Taken(time, work, self.arrays.behind[jobs])

    # -- a set and one more -----------------------------------------------------------------------

    def fits_with(self, jobs: Sequence[int] | Ints, others: Sequence[int] | Ints) -> list[bool]:
        """For each of `others` whether it fits together with all of `jobs`."""
        if len(others) <= FEW:
            fit = self._each_with(jobs, others)
        else:
            fit = self._turns_with(np.asarray(jobs, np.int64), np.asarray(others, np.int64))
        if len(self.curves) > 1 or not len(jobs):
            return fit
        missing = [place for place, fits in enumerate(fit) if not fits]
        if missing:
            rest = np.array([others[place] for place in missing], np.int64)
            seated = self._seats_with(np.asarray(jobs, np.int64), rest)
            for place, fits in zip(missing, seated, strict=True):
                fit[place] = fits
        return fit

    def _each_with(self, jobs: Sequence[int] | Ints, others: Sequence[int] | Ints) -> list[bool]:
        """`fits_with` in turns, asked one by one."""
        fit = []
        for new in others:
            joint = list(jobs)
            insort(joint, new)
            fit.append(self._in_turns(joint, self.entry[new]))
        return fit

    def _turns_with(self, jobs: Ints, others: Ints) -> list[bool]:
        """`fits_with` in turns, for all of `others` at once.

        Jobs before the new one in the order wait for a larger batch; those behind it wait for all
        of its turns as well. So a prefix and a suffix minimum of slack decide.
        """
        columns = self.arrays
        left, behind = columns.turns_left[jobs], columns.behind[jobs]
        steps, after = _gaps(left), sums(behind)
        speed, costs = self._costs(jobs)
        without = speed * np.array([*costs, 0.0])
        ends = sums(steps * without[:-1])
        due = columns.due[jobs] - self.start - after[:-1]
        later = np.append(np.minimum.accumulate((due - ends[1:])[::-1])[::-1], np.inf)
        fit = np.zeros(len(others), dtype=bool)
        for line in range(len(self.curves)):
            chosen = np.flatnonzero(self.of_line(line, others))
            if not len(chosen):
                continue
            new = others[chosen]
            entry = np.asarray(self.entry)[new]
            together = self._costs_with(jobs, line, without)
            ends_with = sums(steps * together[:-1])
            before = np.append(np.minimum.accumulate(due - ends_with[1:]), np.inf)  # [-1]: nobody
            place = jobs.searchsorted(new)
            beyond = columns.turns_left[new] - np.append(left, 0.0)[place - 1]
            end = entry + ends_with[place] + beyond * together[place]
            delay = end - ends[place] - beyond * without[place] + columns.behind[new]
            own_slack = columns.due[new] - (self.start + end + after[place])
            slack = np.minimum(own_slack, before[place - 1] - entry)
            fit[chosen] = np.minimum(slack, later[place] - delay) >= -TICK
        answer: list[bool] = fit.tolist()
        return answer

    def _costs_with(self, jobs: Ints, line: int, without: Floats) -> Floats:
        """`_costs` with one more job of `line`, and of that job alone."""
        if len(self.curves) == 1:
            count = len(jobs) + 1
            return self.speeds[0] * self.curves[0].turns(count)[count:0:-1]
        counts = np.append(_left_from(self.of_line(line, jobs)), 0)
        return without + self._line_costs(line, counts + 1) - self._line_costs(line, counts)

    def _seats_with(self, jobs: Ints, others: Ints) -> list[bool]:
        """As `seats`, for `jobs` with each one of `others`."""
        start = self.start + max([self.entry[new] for new in others])
        paces = np.minimum(self._pace(jobs, start).min(), self._pace(others, start))
        sizes = [self._affordable(pace, len(jobs)) for pace in paces.tolist()]
        fit = np.zeros(len(others), dtype=bool)
        for size in set(sizes) - {0}:
            taken = self._taken(jobs, start, size)
            if taken is None:
                continue
            chosen = np.flatnonzero(np.array(sizes) == size)
            new = others[chosen]
            time, work = self._on_seats(new, start, size)
            fit[chosen] = taken.fit_with(size, time, work, self.arrays.behind[new])
        answer: list[bool] = fit.tolist()
        return answer


def _left_from(jobs: Bools) -> Ints:
    """How many are true from each place on."""
    return jobs[::-1].cumsum()[::-1]


def _gaps(x: Floats) -> Floats:
    """The differences of neighbours, the first one to 0."""
    out = x.copy()
    out[1:] -= x[:-1]
    return out
