"""Some steps ahead of a language model: how many generations are left, what they read, what time
they have.

How long a generation gets is not known; what is known is how many of those before it went on so far
(`Lengths`). All numbers here are expectations at the `POINTS`, steps from now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.policies.model_queues import ModelQueues
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


class Horizon:
    """What admitted generations will need, and whether one more fits beside them.

    Args:
        lengths: what is known of how long generations get; None: nothing.
        most: outputs that the longest of them may still have.
        margin: share of each step's seconds that is kept free.
        units: of memory; inf where it is no limit. `block` of it are handed out at a time.
    """

    def __init__(
        self,
        model: ModelQueues,
        lengths: Lengths | None,
        now: float,
        most: float,
        *,
        margin: float = 0.0,
        units: float = math.inf,
        block: int = 0,
    ) -> None:
        self.model = model
        self.lengths = lengths if lengths is not None else Lengths()
        self.now = now
        self.points = POINTS[: int(np.searchsorted(POINTS, most)) + 1]
        self.margin = margin
        self.units, self.block = units, block
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

    def of(self, jobs: Sequence[Job]) -> Load:
        """The load of all the running ones together."""
        nothing = np.zeros(len(self.points))
        rows = self.rows(jobs, running=True)
        if not rows:
            return Load(nothing, nothing, nothing, nothing + FOREVER)
        return Load(
            np.sum([row.count for row in rows], 0),
            np.sum([row.context for row in rows], 0),
            np.sum([row.kept for row in rows], 0),
            np.min([row.time for row in rows], 0),
        )

    def fits(self, load: Load) -> bool:
        """Whether all of a load has memory, and keeps pace if it decodes step by step."""
        if (load.kept > self.units).any():
            return False
        spent = before = 0.0
        for gap, count, context, time in zip(
            self.gaps, load.count.tolist(), load.context.tolist(), load.time.tolist(), strict=True
        ):
            step = Step(decodes=max(round(count), 1), context=max(context, 1.0))
            seconds = (1 + self.margin) * self.model.seconds(step)
            spent += gap * (seconds + (before or seconds)) / 2
            before = seconds
            if spent > time + TICK:
                return False
        return True
