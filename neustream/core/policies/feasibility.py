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
  `sum_i clip(x - (d_i - p_i), 0, p_i) <= b * x` for p_i = r_i * latency(b) and deadline d_i (the
  cuts of the max-flow that such a schedule is). The left side is convex between deadlines, so that
  it is looked at at these.

In turns is right where promises are alike, on seats where some are tight and others loose. But
small batches waste the device: b jobs alone cost a step that might have served more. That is
counted until the last job is over that needs the seats (in turns it would be late). At what a
second of the device is worth lately (`price.py`) it must be no more than the weight of the jobs
that need seats; else the set does not fit. Jobs that end in the same turn may decode together
(`tied.py`). Several lines on one device (two models) are put
together in `several.py`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neustream.core.observed import Ratios
from neustream.core.policies.curve import Curve, Floats
from neustream.core.policies.seats import Columns, Taken, may_fit
from neustream.core.policies.tied import Row, in_time
from neustream.core.policies.turns import OneMore, Turns
from neustream.core.types import TICK

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Asked = tuple[tuple[int, ...], float]
"""Jobs by their places, and seconds of encodings before their loops."""

FEW = 6
"""Up to so many jobs it is quicker to ask of each whether it fits than of all at once."""
FEW_SIZES = 2
"""Up to so many sizes it is quicker to ask for each than to refuse some of the jobs first."""
SPARE = 2
"""Steps by which real steps may end later than seats that change hands at any instant: a job waits
for the end of a step of others, and for whole steps of those that have its seat by turns."""


def _nothing() -> float:
    """The value of a device that is nobody's."""
    return 0.0


def _all(count: int) -> float:
    """The share of a batch that costs as much as one each."""
    return 1.0


@dataclass
class Line:
    """The jobs of one looped stage that a worker could serve, by columns, in order of `left`.

    Not to be changed.

    Args:
        start: when the first loop step can begin, but for `entry`.
        curve, speed: of the stage; `speed` stretches its latencies.
        left: steps of each job there.
        due: when they must be over, so that what comes `behind` the loop still ends in time.
        behind: seconds of that.
        entry: seconds before its loop that admitting one more job costs everyone (an encoding).
        weight: of each job.
        value: what a second of the device is worth, in weight; asked when it is needed.
        shared: what each of so many costs behind the loop in one batch, by what it does alone.
        spread: what steps took lately, by what was expected.
    """

    start: float
    curve: Curve
    speed: float
    left: Sequence[float] | Floats
    due: Sequence[float] | Floats
    behind: Sequence[float] | Floats
    entry: Sequence[float] | Floats
    weight: Sequence[float] | Floats = ()
    value: Callable[[], float] = _nothing
    shared: Callable[[int], float] = _all
    spread: Ratios = field(default_factory=Ratios)

    _turns: dict[Asked, bool] = field(init=False, default_factory=dict)
    _seats: dict[Asked, int] = field(init=False, default_factory=dict)
    _paces: dict[float, Floats] = field(init=False, default_factory=dict)
    _times: dict[tuple[float, int], tuple[Floats, Floats]] = field(init=False, default_factory=dict)

    @property
    def parts(self) -> list[tuple[int, Line]]:
        """The lines, each with the place of its first job: this one."""
        return [(0, self)]

    @cached_property
    def arrays(self) -> Columns:
        """The columns that are asked for by many jobs at once."""
        return Columns(*np.array([self.left, self.due, self.behind], dtype=np.float64))

    @cached_property
    def _rows(self) -> list[tuple[float, float, float]]:
        """The same by jobs, for one after the other."""
        return list(zip(self.left, self.due, self.behind, strict=True))

    def pace(self, job: int, wait: float = 0.0) -> float:
        """Seconds that a job has for each of its steps if it waits `wait` seconds first."""
        return float((self.due[job] - self.start - wait) / self.left[job])

    def step(self, count: int) -> float:
        """Seconds of a step of the most efficient batch of up to `count` jobs."""
        curve = self.curve
        return self.speed * curve.seconds[curve.best[min(count, curve.limit)]]

    # -- a set ------------------------------------------------------------------------------------

    def fits(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> bool:
        """Whether all of `jobs` (rising places) can be on time, `entry` seconds from `start` on."""
        if not len(jobs) or self.in_turns(jobs, entry):
            return True
        return self.seats(jobs, entry) > 0 or self._tied(jobs, entry)

    def _tied(self, jobs: Sequence[int] | Ints, entry: float) -> bool:
        """Whether all of `jobs` are on time if those who end together decode together."""
        if len(jobs) > self.curve.limit or self.shared(2) >= 1.0:
            return False
        rows = [Row(self.left[index], self.due[index], self.behind[index]) for index in jobs]
        return in_time(rows, self.curve, self.speed, self.start + entry, self.shared)

    def in_turns(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> bool:
        """Whether all of `jobs` are on time if they take turns. Answers are kept."""
        asked = tuple(jobs), entry
        answer = self._turns.get(asked)
        if answer is None:
            answer = self._turns[asked] = self._in_turns(jobs, entry)
        return answer

    def _in_turns(self, jobs: Sequence[int] | Ints, entry: float) -> bool:
        rows = self._rows
        if len(jobs) < len(rows):
            rows = [rows[index] for index in jobs]
        speed, costs = self.speed, self._costs(len(jobs))
        start = self.start + entry - TICK
        end = before = 0.0
        for (turns, due, behind), cost in zip(rows, costs, strict=True):
            end += (turns - before) * (speed * cost) + behind
            if end - behind > due - start:
                return False
            before = turns
        return True

    def demand(self, jobs: Sequence[int], entry: float = 0.0) -> list[tuple[float, float]]:
        """What `jobs` need: for each its deadline, and when its work is over by then.

        On seats if they fit only so. Else in turns: each has to wait for the turns of all.
        """
        seats = 0 if self.in_turns(jobs, entry) else self.seats(jobs, entry)
        return self.seat_ends(jobs, entry, seats) if seats else self.turn_ends(jobs, entry)

    def need(self, jobs: Sequence[int]) -> list[tuple[float, float]]:
        """By rising deadline, seconds that `jobs` need in turns by it, beyond those before."""
        over = self.start
        need = []
        for due, end in sorted(self.turn_ends(jobs, 0.0)):
            if end > over:
                need.append((due, end - over))
                over = end
        return need

    def batch(self, jobs: Sequence[int]) -> int:
        """The size of the next step of `jobs`: of their seats, or the most efficient one."""
        seats = 0 if self.in_turns(jobs) else self.seats(jobs)
        return seats or self.curve.best[min(len(jobs), self.curve.limit)]

    def turn_ends(self, jobs: Sequence[int], entry: float) -> list[tuple[float, float]]:
        """Deadline and end of each of `jobs`, in their order, if they take turns."""
        speed, costs = self.speed, self._costs(len(jobs))
        ends = []
        end = self.start + entry
        before = 0.0
        for index, cost in zip(jobs, costs, strict=True):
            turns, behind = self.left[index], self.behind[index]
            end += (turns - before) * (speed * cost) + behind
            before = turns
            ends.append((self.due[index] + behind, end))
        return ends

    def seat_ends(self, jobs: Sequence[int], entry: float, seats: int) -> list[tuple[float, float]]:
        """Deadline and end of each of `jobs`, by rising deadline, on so many seats."""
        step = self.curve.seconds[seats] * self.speed
        start = self.start + entry
        together = start
        ends = []
        for index in sorted(jobs, key=self.due.__getitem__):
            alone, behind = self.left[index] * step, self.behind[index]
            together += alone / seats + behind
            ends.append((self.due[index] + behind, max(together, start + alone + behind)))
        return ends

    def _costs(self, count: int) -> list[float]:
        """By `speed`, seconds of a common turn while job k of `count` and those behind are left."""
        return self.curve.turn_list(count)[count:0:-1]

    def seats(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> int:
        """The batch size at which all of `jobs` are on time on seats; 0 if there is none.

        The largest batch that the tightest job can afford is the limit, the most efficient one
        below it is tried. Jobs are given `SPARE` steps less time than they have: see there.
        Answers are kept.
        """
        if len(jobs) < 2:
            return 0
        asked = tuple(jobs), entry
        size = self._seats.get(asked)
        if size is None:
            size = self._seats[asked] = self._seats_for(jobs, entry)
        return size

    def _seats_for(self, jobs: Sequence[int] | Ints, entry: float) -> int:
        start = self.start + entry
        places = np.asarray(jobs, np.int64)
        size = self.affordable(float(self._pace(places, start).min()), len(jobs) - 1)
        taken = self._taken(places, start, size) if size else None
        if taken is None or not taken.fit_on(size):
            return 0
        return size if self.worth(places, entry, size) else 0

    def _pace(self, jobs: Ints, start: float) -> Floats:
        """Seconds that each has for a step, with `SPARE` steps to spare."""
        paces = self._paces.get(start)
        if paces is None:
            columns = self.arrays
            paces = self._paces[start] = (columns.due - start) / (columns.left + SPARE)
        return paces[jobs]

    def affordable(self, pace: float, most: int) -> int:
        """The most efficient batch of at most `most` that takes at most `pace` a step; 0: none."""
        curve = self.curve
        fast = bisect_right(curve.fast, pace / self.speed)
        return curve.best[min(fast, most, curve.limit)]

    def _on_seats(self, jobs: Ints, start: float, size: int) -> tuple[Floats, Floats]:
        """Seconds that each has on a seat until its deadline (`SPARE` steps less), and needs."""
        times = self._times.get((start, size))
        if times is None:
            step = self.curve.seconds[size] * self.speed
            columns = self.arrays
            times = columns.due - (start + SPARE * step), columns.left * step
            self._times[start, size] = times
        return times[0][jobs], times[1][jobs]

    def _taken(self, jobs: Ints, start: float, size: int) -> Taken | None:
        """What `jobs` take of `size` seats; None if one of them needs longer than it has, or all
        of them together until the last is due."""
        time, work = self._on_seats(jobs, start, size)
        if (work > time).any() or work.sum() > size * time.max() + TICK:
            return None
        return Taken(time, work, self.arrays.behind[jobs])

    # -- a set and one more -----------------------------------------------------------------------

    def fits_with(self, jobs: Sequence[int] | Ints, others: Sequence[int] | Ints) -> list[bool]:
        """For each of `others` whether it fits together with all of `jobs`."""
        if len(others) <= FEW:
            fit = self._each_with(jobs, others)
        else:
            fit = self._turns_with(np.asarray(jobs, np.int64), np.asarray(others, np.int64)).fit()
        if not len(jobs) or all(fit):
            return fit
        missing = [place for place, fits in enumerate(fit) if not fits]
        rest = np.array([others[place] for place in missing], np.int64)
        seated = self._seats_with(np.asarray(jobs, np.int64), rest)
        few = len(jobs) < self.curve.limit
        for place, fits in zip(missing, seated, strict=True):
            fit[place] = fits or (few and self._tied_with(jobs, others[place]))
        return fit

    def _tied_with(self, jobs: Sequence[int] | Ints, new: int) -> bool:
        """As `_tied`, for `jobs` with one more."""
        joint = list(jobs)
        insort(joint, new)
        return self._tied(joint, self.entry[new])

    def _each_with(self, jobs: Sequence[int] | Ints, others: Sequence[int] | Ints) -> list[bool]:
        """`fits_with` in turns, asked one by one."""
        fit = []
        for new in others:
            joint = list(jobs)
            insort(joint, new)
            fit.append(self._in_turns(joint, self.entry[new]))
        return fit

    def _turns_with(self, jobs: Ints, others: Ints) -> OneMore:
        """Taking turns with one more, for all of `others` at once."""
        columns = self.arrays
        due = columns.due - self.start
        turns = self.speed * self.curve.turns(len(jobs) + 1)[: len(jobs) + 2]
        place = jobs.searchsorted(others)
        entry = np.array([self.entry[new] for new in others])
        line = Turns(columns.left[jobs], due[jobs], columns.behind[jobs], turns)
        return line.with_one(
            place, columns.left[others], due[others], columns.behind[others], entry
        )

    def _seats_with(self, jobs: Ints, others: Ints) -> list[bool]:
        """As `seats`, for `jobs` with each one of `others`."""
        start = self.start + max([self.entry[new] for new in others])
        paces = np.minimum(self._pace(jobs, start).min(), self._pace(others, start))
        sizes = self.curve.affordable(paces / self.speed, len(jobs))
        fit = sizes > 0
        if len(set(sizes.tolist())) > FEW_SIZES:
            fit[fit] = self._may_sit(jobs, others[fit], start, sizes[fit])
        asked = fit.nonzero()[0]
        for size in set(sizes[asked].tolist()):
            chosen = asked[sizes[asked] == size]
            new = others[chosen]
            taken = self._taken(jobs, start, size)
            if taken is None:
                fit[chosen] = False
                continue
            time, work = self._on_seats(new, start, size)
            fit[chosen] = taken.fit_with(size, time, work, self.arrays.behind[new])
        fitting = np.flatnonzero(fit)
        if len(fitting):
            fit[fitting] = self._worth_with(jobs, others[fitting], sizes[fitting].tolist())
        answer: list[bool] = fit.tolist()
        return answer

    def _may_sit(self, jobs: Ints, others: Ints, start: float, sizes: Ints) -> Bools:
        """For each of `others` whether so many seats may do for `jobs` with it: most do not."""
        left, due, behind = self.arrays
        steps = self.curve.latency[sizes] * self.speed
        old = Columns(left[jobs], due[jobs] - start, behind[jobs])
        new = Columns(left[others], due[others] - start, behind[others])
        return may_fit(old, new, sizes, steps, SPARE * steps)

    # -- whether small batches are worth it -------------------------------------------------------

    def worth(self, jobs: Ints, entry: float, size: int) -> bool:
        """Whether those of `jobs` that need the seats bring what these cost the device."""
        lost = self.lost(size)
        if not lost:
            return True
        places: list[int] = jobs.tolist()
        ends = zip(places, self.turn_ends(places, entry), strict=True)
        late = [job for job, (due, end) in ends if end > due + TICK]
        longest = max([float(self.left[job]) for job in late], default=0.0)
        return lost * longest <= sum([float(self.weight[job]) for job in late])

    def _worth_with(self, jobs: Ints, others: Ints, sizes: Sequence[int]) -> Bools:
        """As `worth`, for `jobs` with each one of `others`."""
        by_size = {size: self.lost(size) for size in set(sizes)}
        lost = np.array([by_size[size] for size in sizes])
        if not lost.any():
            return np.ones(len(others), dtype=bool)
        late = self._turns_with(jobs, others).late()
        left, weight = self.arrays.left, np.asarray(self.weight)
        lefts = np.column_stack([np.tile(left[jobs], (len(others), 1)), left[others]])
        weights = np.column_stack([np.tile(weight[jobs], (len(others), 1)), weight[others]])
        longest = np.where(late, lefts, 0.0).max(axis=1)
        worth: Bools = lost * longest <= np.where(late, weights, 0.0).sum(axis=1)
        return worth

    def lost(self, size: int) -> float:
        """What a step of `size` costs the device, in weight, by what it does less.

        Less, that is, than steps of the most efficient batch of all jobs of the line.
        """
        curve = self.curve
        best = curve.best[min(len(self.left), curve.limit)]
        seconds = curve.seconds[size] - size * curve.seconds[best] / best
        return self.value() * self.speed * seconds if seconds > 0 else 0.0
