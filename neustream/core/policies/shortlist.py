"""Those of a long queue that a decision can be about.

A decision weighs the first few of those who wait. Where thousands do, the others are told apart by
columns, and no more is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.policies.curve import Curve, Floats
from neustream.core.policies.seats import Columns
from neustream.core.reserved import Reserved
from neustream.core.types import TICK

FOREVER = 1e6
"""Seconds in which a job without a deadline is planned to be done."""
LOOSE = 4.0
"""Times the latency of the most efficient batch: a job with more time per step can come later."""

Bools = NDArray[np.bool_]


class Waiting:
    """The jobs of a queue, all of which get to one loop, by columns.

    Args:
        name: of the loop.
        alone: seconds of one step of a job alone, as profiled.
        slower: how many times as long as profiled takes what comes behind the loop.
        in_front: seconds of what comes in front of it, of those who have that ahead.
    """

    def __init__(
        self,
        name: str,
        queue: Sequence[Job],
        now: float,
        reserved: Reserved,
        alone: float,
        slower: float,
        in_front: Mapping[Job, float],
    ) -> None:
        self.now = now
        left = np.array([job.calls_left[name] for job in queue], dtype=np.float64)
        work = np.array([job.remaining_s for job in queue])
        if in_front:
            work -= np.array([in_front.get(job, 0.0) for job in queue])
        work -= left * alone
        behind = np.where(work > 0.0, work * slower, 0.0)
        self.deadlines = np.array(
            [job.due if job.due <= job.due_next else job.deadline for job in queue]
        )
        due = np.minimum(self.deadlines, now + FOREVER)
        if reserved:
            due = np.array([now + reserved.left(time - now) for time in due.tolist()])
        self.columns = Columns(left, due - behind, behind)
        self.weight = np.array([job.weight for job in queue])
        self.spare = np.maximum(self.columns.due - now, TICK)

    def density(self, curve: Curve, speed: float) -> Floats:
        """Weight per second of charge; see `LineUp.density`."""
        left, _, behind = self.columns
        charge = behind + TICK + left * curve.charge(self.spare / left / speed) * speed
        density: Floats = self.weight / charge
        return density

    def urgency(self, alone: float, efficient: float) -> Floats:
        """Rising in the order of admission; see `LineUp.most_urgent_first`."""
        pace = self.spare / self.columns.left
        urgency, loose = urgencies(self.spare, pace, self.weight, alone, efficient)
        urgency[self.deadlines == math.inf] = math.inf
        ranks: Floats = np.where(loose, urgency, np.minimum(urgency, 0.0))
        return ranks

    def first(self, rank: Floats, among: Bools, most: int) -> NDArray[np.int64]:
        """Those of the `most` least of `rank` among some; of equals those of the least steps, then
        those that are due first, then those that came first."""
        some = np.flatnonzero(among)
        if len(some) <= most:
            return some
        ranks = rank[some]
        cut = np.partition(ranks, most - 1)[most - 1]
        sure, tied = some[ranks < cut], some[ranks == cut]
        left, due, _ = self.columns
        order = np.lexsort((due[tied], left[tied]))
        return np.concatenate([sure, tied[order[: most - len(sure)]]])


def urgencies(
    spare: Floats, pace: Floats, weight: Floats, alone: Floats | float, efficient: Floats | float
) -> tuple[Floats, Bools]:
    """By what jobs are admitted, the least first; and who is behind all others, for it is loose."""
    urgency = -pace / alone * weight
    loose: Bools = pace > LOOSE * efficient
    urgency[loose] = spare[loose]
    return urgency, loose


def shortlist(
    waiting: Waiting, queue: Sequence[Job], curve: Curve, speed: float, least: float, most: int
) -> Sequence[Job]:
    """Those of a queue that have begun, and of the others those that may be taken in now.

    They are the `most` first in the order of admission, the `most` first of those who bring at
    least `least` by the second of their charge, and the one that brings most.
    """
    density = waiting.density(curve, speed)
    step = speed * curve.seconds[curve.best[1]]
    rank = waiting.urgency(step, speed * curve.enough)
    begun = np.array([job.worker >= 0 for job in queue])
    chosen = begun.copy()
    chosen[waiting.first(rank, ~begun, most)] = True
    if least > 0:
        chosen[waiting.first(rank, ~begun & (density >= least), most)] = True
    chosen[waiting.first(-density, np.ones(len(queue), dtype=bool), 1)] = True
    return [queue[at] for at in np.flatnonzero(chosen).tolist()]
