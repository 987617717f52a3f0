"""Newcomers who are in time also if others come in place of those who end.

A plan in turns counts on batches that shrink as jobs end. Under load they do not: others come, and
each job that was promised more than its seat has hardly any time left in the end. It then keeps
the batch small, and whole rows of newcomers out. So a newcomer is held against seats that stay
taken. In a batch of `size` a job takes as much of a seat as it needs, at most one:

* for its steps `need * latency(size) / latency(1)`. `need` is the share of the device that they
  need alone: the larger of what they came with and of what they have by now, so that time that a
  job gained by running ahead is not given away;
* for what comes behind the loop `size` times its seconds, by the time that the job came with: a
  decode stops the whole batch, and each seat has one as often as somebody new has it.

`size` is the largest that the newcomer's own pace allows. But what became of those who came with
time for batches as large shows what will become of it: the least pace that one of them has by now
counts. That is so for as much of the time as the load fills; for the rest the newcomer has its own
pace, and seats are free.

Who can stand aside takes no seat: a job with a loose promise that would still be in time if it
stood still until the newcomer is over, and then went on in one batch with all others that are
promised. The next newcomer finds it with less time, and in the end with none to spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    part = filled(view)
    if not part:  # seats are free: who has time for its steps alone has one
        least = line.speed * line.curve.fast[0]
        return [index for index in ranked if line.pace(index, line.entry[index]) >= least]
    taken = _Taken(jobs, line, part, promised)
    return [index for index in ranked if taken.by(index)]


class _Seat(NamedTuple):
    """What a job needs of a seat.

    Attributes:
        came, pace: seconds that it had for each step when it came, and has by now.
        rate: steps a second that it needs; behind: the part of its time that goes to what comes
            behind the loop. left: steps that it has left.
    """

    came: float
    pace: float
    rate: float
    behind: float
    weight: float
    left: float


class _Taken:
    """The seats that some jobs take; `part` of the time they stay taken."""

    def __init__(self, jobs: LineUp, line: Line, part: float, some: Sequence[int]) -> None:
        self._jobs, self._line, self._part = jobs.jobs, line, part
        self._some = [self._seat(index) for index in some]
        self._known: dict[tuple[int, float], tuple[float, int]] = {}  # sums, and of how many
        self._paces: dict[int, tuple[float, int]] = {}  # the least, and of how many
        self._waits: list[float] = []  # seconds that each can stand still

    def by(self, index: int) -> bool:
        """Whether one more has a seat. It takes it then."""
        new = self._seat(index)
        size = self._line.affordable(new.pace, len(self._some) + 1)
        if not size:
            return False
        least = min(new.pace, self._least_pace(size))
        loaded = self._line.affordable(least, len(self._some) + 1)
        room = self._part * (loaded - self._of(new, loaded))
        room += (1 - self._part) * (size - self._of(new, size)) + EVEN
        most = self._part * self._all_seats(loaded, new.weight)
        if room < most and room < self._part * self._seats(loaded, new):
            return False
        self._some.append(new)
        return True

    def _of(self, one: _Seat, size: int) -> float:
        """Seats of `size` that a job takes, at most one."""
        step = self._line.speed * self._line.curve.seconds[size]
        return min(one.rate * step + size * one.behind, 1.0)

    def _least_pace(self, size: int) -> float:
        """The least pace of those who came with time for batches of `size`; inf if nobody did."""
        least, count = self._paces.get(size, (math.inf, 0))
        enough = self._line.speed * self._line.curve.fast[size - 1]
        least = min([least, *[one.pace for one in self._some[count:] if one.came >= enough]])
        self._paces[size] = least, len(self._some)
        return least

    def _seats(self, size: int, new: _Seat) -> float:
        """Seats of `size` that are taken from a newcomer, by those who cannot stand aside."""
        stay = new.left * self._line.speed * self._line.curve.seconds[size]
        self._note_waits()
        if stay > max(self._waits):
            return self._all_seats(size, new.weight)
        some = [one for one, wait in zip(self._some, self._waits, strict=True) if wait < stay]
        return self._sum(some, size, new.weight)

    def _note_waits(self) -> None:
        """How long each can stand still, to go on in one batch with all of them."""
        count, known = len(self._some), len(self._waits)
        fast = self._line.curve.fast
        step = self._line.speed * fast[min(count, len(fast)) - 1]
        same = known if known >= len(fast) else 0  # of a batch that is full each waits as long
        self._waits[same:] = [(one.pace - step) * one.left for one in self._some[same:]]

    def _all_seats(self, size: int, weight: float) -> float:
        """Seats of `size` that all take from somebody of `weight`."""
        taken, count = self._known.get((size, weight), (0.0, 0))
        taken += self._sum(self._some[count:], size, weight)
        self._known[size, weight] = taken, len(self._some)
        return taken

    def _sum(self, some: Sequence[_Seat], size: int, weight: float) -> float:
        """What some take from somebody of `weight`: a lighter one, which can make room, less."""
        step = self._line.speed * self._line.curve.seconds[size]
        taken = 0.0
        for one in some:
            seat = min(one.rate * step + size * one.behind, 1.0)
            taken += seat if one.weight >= weight else seat * one.weight / weight
        return taken

    def _seat(self, index: int) -> _Seat:
        """What a job needs of a seat."""
        line = self._line
        job: Job = self._jobs[index]
        behind = line.behind[index]
        budget = max(job.deadline - job.arrival, TICK)
        steps = (job.alone_s - behind) / line.curve.seconds[1]
        came = max(budget - behind, TICK) / max(steps, TICK)
        time = max(line.due[index] - line.start, TICK)
        rate = max(1 / came, line.left[index] / time)
        pace = line.pace(index, line.entry[index])
        return _Seat(came, pace, rate, behind / budget, job.weight, line.left[index])
