"""Several lines on one device (two models, two sizes of one): which sets of jobs fit all together.

Each line keeps a plan of its own, as if it had the device alone (`feasibility.py`). From it follows
for each of its jobs how much of the device the line must have had by the job's deadline. The lines
fit together if and only if at each deadline all of them have had theirs: what is due by then,
summed over the lines, is no more than the time until then. With steps that can be interrupted, the
line with the earliest deadline first keeps all of that (the processor demand criterion of EDF:
Baruah, Rosier and Howell, 1990).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import numpy as np

from neustream.core.policies.feasibility import Ints, Line
from neustream.core.policies.seats import Columns
from neustream.core.types import TICK

Need = list[tuple[float, float]]
"""By rising deadline: the deadline, and seconds of the device that are due by it beyond those due
before."""


@dataclass
class Lines:
    """The jobs of several lines, one line after the other. Not to be changed.

    Args:
        start: from when on there is time.
        lines: each without what it waits for itself.
        elsewhere: what else the device must do, by deadline.
    """

    start: float
    lines: Sequence[Line]
    elsewhere: Need

    @cached_property
    def parts(self) -> list[tuple[int, Line]]:
        """The lines, each with the place of its first job."""
        first = 0
        parts = []
        for line in self.lines:
            parts.append((first, line))
            first += len(line.left)
        return parts

    @cached_property
    def arrays(self) -> Columns:
        """The columns of all lines."""
        columns = [line.arrays for line in self.lines]
        return Columns(*[np.concatenate(column) for column in zip(*columns, strict=True)])

    @cached_property
    def entry(self) -> list[float]:
        """Seconds before its loop that admitting one more job costs everyone."""
        return [seconds for line in self.lines for seconds in line.entry]

    def fits(self, jobs: Sequence[int] | Ints, entry: float = 0.0) -> bool:
        """Whether all of `jobs` (rising places) can be on time, `entry` seconds from `start` on."""
        needs = [line.need(places) for line, places in self.split(jobs)]
        return self._in_time([*self.elsewhere, *_joined(needs)], entry)

    def fits_with(self, jobs: Sequence[int] | Ints, others: Sequence[int] | Ints) -> list[bool]:
        """For each of `others` whether it fits together with all of `jobs`."""
        split = self.split(jobs)
        needs = [line.need(places) for line, places in split]
        beside: dict[int, Need] = {}
        fit = []
        for new in others:
            number = self._number(new)
            if number not in beside:
                rest = needs[:number] + needs[number + 1 :]
                beside[number] = sorted([*self.elsewhere, *_joined(rest)])
            first, line = self.parts[number]
            places = list(split[number][1])
            insort(places, new - first)
            joint = [*beside[number], *line.need(places)]
            fit.append(self._in_time(joint, self.entry[new]))
        return fit

    def _in_time(self, need: Need, entry: float) -> bool:
        """Whether there is time for all that is due by each deadline."""
        needed = self.start + entry - TICK
        for due, seconds in sorted(need):
            needed += seconds
            if needed > due:
                return False
        return True

    def cannot_wait(self, some: Sequence[int], jobs: Sequence[int]) -> list[int]:
        """Those of `some` that will have no time for efficient batches once all `jobs` are over."""
        over = self.demand(jobs)[-1][1] - self.start
        late = []
        for job in some:
            first, line = self.parts[self._number(job)]
            if line.pace(job - first, over) < line.speed * line.curve.enough:
                late.append(job)
        return late

    def demand(self, jobs: Sequence[int], entry: float = 0.0) -> Need:
        """What `jobs`, which fit, need: their deadlines, and when all work due by then is over."""
        over = self.start + entry
        ends = []
        needs = [line.need(places) for line, places in self.split(jobs)]
        for due, seconds in sorted([*self.elsewhere, *_joined(needs)]):
            over += seconds
            ends.append((due, over))
        return ends

    def split(self, jobs: Sequence[int] | Ints) -> list[tuple[Line, list[int]]]:
        """The lines, and which of their own jobs are among `jobs`."""
        places: list[list[int]] = [[] for _ in self.lines]
        for job in jobs:
            number = self._number(job)
            places[number].append(int(job) - self.parts[number][0])
        return list(zip(self.lines, places, strict=True))

    def _number(self, job: int) -> int:
        """The number of the line that a job is in."""
        return bisect_right(self.parts, job, key=itemgetter(0)) - 1


def _joined(needs: Sequence[Need]) -> Need:
    return [part for need in needs for part in need]
