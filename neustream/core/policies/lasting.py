"""Newcomers who are in time also if others come in place of those who end.

A plan in turns counts on batches that shrink as jobs end. Under load they do not: others come, and
each job that was promised more than its seat has hardly any time left in the end. It then keeps
the batch small, and whole rows of newcomers out. So a newcomer is held against seats that stay
taken. In the largest batch (`size`) that its own pace allows, a job that needs the share `need`
of the device were it alone there takes `need * latency(size) / latency(1)` of a seat, at most one.
`need` is the larger of what it came with and of what it has by now: time that it gained by running
ahead is not given away. By as much of the time as the load fills, seats stay taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from neustream.core.job import Job
from neustream.core.policies.feasibility import Line
from neustream.core.policies.line_up import LineUp
from neustream.core.policies.price import filled
from neustream.core.policy import View
from neustream.core.types import TICK

EVEN = 1e-9
"""Seats by which two sums are the same."""


def lasting(view: View, jobs: LineUp, promised: Sequence[int], ranked: list[int]) -> list[int]:
    """Those of `ranked`, from the front, who have a seat beside the promised ones and each other.

    All of them where several models share the device, and where nobody is promised anything.
    """
    line = jobs.plan
    if not promised or not ranked or not isinstance(line, Line):
        return ranked
    taken = _Taken(jobs, line, filled(view), promised)
    return [index for index in ranked if taken.by(index)]


class _Taken:
    """The seats that some jobs take; `part` of the time they stay taken."""

    def __init__(self, jobs: LineUp, line: Line, part: float, some: Sequence[int]) -> None:
        self._jobs, self._line, self._part = jobs.jobs, line, part
        self._needs = [self._need(index) for index in some]
        self._weights = [jobs.jobs[index].weight for index in some]
        self._known: dict[tuple[int, float], tuple[float, int]] = {}  # sums, and of how many

    def by(self, index: int) -> bool:
        """Whether one more has a seat. It takes it then."""
        line, job = self._line, self._jobs[index]
        pace = (line.due[index] - line.start - line.entry[index]) / line.left[index]
        size = line.affordable(pace, len(self._needs) + 1)
        if not size:
            return False
        own = line.speed * line.curve.seconds[size] / pace
        if self._part * self._seats(size, job.weight) + own > size + EVEN:
            return False
        self._needs.append(self._need(index))
        self._weights.append(job.weight)
        return True

    def _seats(self, size: int, weight: float) -> float:
        """Seats of `size` that are taken from somebody of `weight`.

        Those of lighter jobs count by their weight: such a job can make room.
        """
        needs, weights = self._needs, self._weights
        taken, count = self._known.get((size, weight), (0.0, 0))
        seconds = self._line.curve.seconds
        stretch = self._line.speed * seconds[size] / seconds[1]
        for index in range(count, len(needs)):
            seat = min(needs[index] * stretch, 1.0)
            taken += seat * min(weights[index] / weight, 1.0)
        self._known[size, weight] = taken, len(needs)
        return taken

    def _need(self, index: int) -> float:
        """The share of the device that a job needs, were it alone there."""
        job: Job = self._jobs[index]
        time = max(job.deadline - self._line.start, TICK)
        came = max(job.deadline - job.arrival, TICK)
        return max(job.alone_s / came, job.remaining_s / time)
