"""Some steps ahead of a language model: how many generations are left, what they read, what time
they have.

How long a generation gets is not known; what is known is how many of those before it went on so far
(`Lengths`). All numbers here are expectations at the `POINTS`, steps from now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.reserved import NOTHING, Reserved
from neustream.core.steps import Step
from neustream.core.types import TICK

Floats = NDArray[np.float64]
POINTS = np.array([0.0, 4.0, 12.0, 28.0, 60.0, 124.0, 252.0, 508.0, 1020.0])
FOREVER = 1e9
"""Seconds that those have who were promised nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    """At each point: generations expected to be left, the tokens that they read, the units of
    memory that they keep (whole blocks), and the least time that one of them has."""

    count: Floats
    context: Floats
    kept: Floats
    time: Floats

    def __add__(self, other: Load) -> Load:
        return Load(
            self.count + other.count,
            self.context + other.context,
            self.kept + other.kept,
            np.minimum(self.time, other.time),
        )


def points_beyond(most: float) -> Floats:
    """The points up to one that is not before the last of `most` outputs."""
    return POINTS[: int(np.searchsorted(POINTS, most)) + 1]


def points_to_end(most: float) -> Floats:
    """The points up to the last of `most` outputs; the next output is at 0."""
    end = max(most - 1, 0)
    return np.append(POINTS[: int(np.searchsorted(POINTS, end))], end)


class Horizon:
    """What admitted generations will need, and whether one more fits beside them.

    Args:
        lengths: what is known of how long generations get; None: nothing.
        points: steps from now at which to look, from 0 on.
        margin: share of each step's seconds that is kept free.
        units: of memory; inf where it is no limit. `block` of it are handed out at a time.
        reserved: what others were promised of the device.
    """

    def __init__(
        self,
        model: ModelQueues,
        lengths: Lengths | None,
        now: float,
        points: Floats,
        *,
        margin: float = 0.0,
        units: float = math.inf,
        block: int = 0,
        reserved: Reserved = NOTHING,
    ) -> None:
        self.model = model
        self.lengths = lengths if lengths is not None else Lengths()
        self.now = now
        self.points = points
        self.margin = margin
        self.units, self.block = units, block
        self.reserved = reserved
        self.gaps = [1.0, *np.diff(self.points).tolist()]

    def rows(self, jobs: Sequence[Job], running: bool) -> list[Load]:
        """The load of each of `jobs`; those `running` have their next output in the coming step."""
        if not jobs:
            return []
        label = f"{self.model.label}.decode"
        columns = np.array([self._numbers(job, label) for job in jobs]).T
        left, size, pace, slack, total = columns[1:, :, None]
        most = np.maximum(left, 1)
        count = self.lengths.ahead(columns[0], self.points)
        count[self.points > most] = 0.0
        steps = self.points if running else self.points + 1
        time = np.minimum(slack + pace * steps, total)
        time[count < 0.5] = FOREVER  # most are over by then
        tokens = size + np.minimum(self.points, most)
        context = kept = count * tokens
        if self.block:
            kept = count * np.ceil(tokens / self.block) * self.block
        return [Load(*row) for row in zip(count, context, kept, time, strict=True)]

    def _numbers(self, job: Job, label: str) -> tuple[float, ...]:
        """Outputs, decodes left, tokens read; seconds of TPOT, to the next output, to the end."""
        pace = min(job.slo.step, FOREVER)
        slack = min(job.due_next - self.now, FOREVER)
        total = min(job.due - self.now, FOREVER)
        read = job.size + job.computed
        return job.call_outputs, job.calls_left.get(label, 0), read, pace, slack, total

    def of(self, jobs: Sequence[Job], running: bool = True) -> Load:
        """The load of all of `jobs` together."""
        nothing = np.zeros(len(self.points))
        rows = self.rows(jobs, running)
        if not rows:
            return Load(nothing, nothing, nothing, nothing + FOREVER)
        return Load(
            np.sum([row.count for row in rows], 0),
            np.sum([row.context for row in rows], 0),
            np.sum([row.kept for row in rows], 0),
            np.min([row.time for row in rows], 0),
        )

    def fits(self, load: Load, ahead: float = 0.0) -> bool:
        """Whether all of a load has memory, and keeps pace if it decodes step by step.

        `ahead`: seconds of a step before that, which counts where device time is reserved.
        """
        if (load.kept > self.units).any():
            return False
        if self.reserved:
            points = list(self.demand(load, ahead))
            return self.reserved.leaves(points)
        return all(spent <= time + TICK for time, spent in self.demand(load))

    def demand(self, load: Load, ahead: float = 0.0) -> Iterator[tuple[float, float]]:
        """At each point the time that there is, and seconds of steps until then."""
        spent = ahead
        before = 0.0
        for gap, count, context, time in zip(
            self.gaps, load.count.tolist(), load.context.tolist(), load.time.tolist(), strict=True
        ):
            step = Step(decodes=max(round(count), 1), context=max(context, 1.0))
            seconds = (1 + self.margin) * self.model.seconds(step)
            spent += gap * (seconds + (before or seconds)) / 2
            before = seconds
            yield time, spent
