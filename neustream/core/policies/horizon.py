"""Some steps ahead of a language model: how many generations are left, what they read, what time
they have.

How long a generation gets is not known; what is known is how many of those before it went on so far
(`Lengths`). All numbers here are expectations at points, which are numbers of steps from now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.lengths import TINY, Lengths
from neustream.core.many_decodes import decode_seconds
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.reserved import NOTHING, Reserved
from neustream.core.types import TICK

Floats = NDArray[np.float64]
POINTS = np.array([0.0, 4.0, 12.0, 28.0, 60.0, 124.0, 252.0, 508.0, 1020.0])
FOREVER = 1e9
"""Seconds that those have who were promised nothing."""
AGAIN = 1.1
"""Time that steps take where memory is short, times: prompts of who lost theirs are read again."""


@dataclass(frozen=True, slots=True)
class Load:
    """At each point: generations expected to be left, the tokens that they read, the units of
    memory that they keep (whole blocks), and the seconds that there are.

    Arrays [points] for several together, whose time is that of the one with the least, or
    [jobs, points].
    """

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

    def __getitem__(self, job: int) -> Load:
        """That of one job."""
        return Load(self.count[job], self.context[job], self.kept[job], self.time[job])

    def one(self, job: int) -> Load:
        """That of one job; it has no deadline at points at which it is likely to be over."""
        time = np.where(self.count[job] < 0.5, FOREVER, self.time[job])
        return Load(self.count[job], self.context[job], self.kept[job], time)

    def total(self) -> Load:
        """That of all jobs together. Those that are likely to be over have no deadline."""
        time = np.where(self.count < 0.5, FOREVER, self.time)
        least = time.min(axis=0, initial=FOREVER)
        return Load(self.count.sum(0), self.context.sum(0), self.kept.sum(0), least)


@dataclass(frozen=True, slots=True)
class Rows(Load):
    """The load of each of some jobs [jobs, points], and how long each may go on.

    Attributes:
        made: outputs of each; most: those that it still gets at most [jobs].
        curve: the share of generations that reach each number of outputs, then constant.
        points: steps from now.
    """

    made: Floats
    most: Floats
    curve: Floats
    points: Floats

    def some(self, which: NDArray[np.bool_]) -> Rows:
        """Those of some of the jobs, by a mask."""
        return replace(
            self,
            count=self.count[which],
            context=self.context[which],
            kept=self.kept[which],
            time=self.time[which],
            made=self.made[which],
            most=self.most[which],
        )

    def then(self, other: Rows) -> Rows:
        """Those of these jobs and of others behind them."""
        return replace(
            self,
            count=np.concatenate([self.count, other.count]),
            context=np.concatenate([self.context, other.context]),
            kept=np.concatenate([self.kept, other.kept]),
            time=np.concatenate([self.time, other.time]),
            made=np.concatenate([self.made, other.made]),
            most=np.concatenate([self.most, other.most]),
        )

    def left(self, jobs: NDArray[np.int64], steps: Floats) -> Floats:
        """The chance of each of `jobs` to go on for `steps` [..., jobs] from now."""
        last = len(self.curve) - 1
        made = self.made[jobs]
        now = self.curve[np.minimum(made, last).astype(np.int64)]
        left = self.curve[np.minimum(made + steps, last).astype(np.int64)]
        left /= np.maximum(now, TINY)
        np.minimum(left, 1.0, out=left)
        np.putmask(left, steps >= self.most[jobs], 0.0)
        return left


def points_to_end(most: float) -> Floats:
    """The points up to the last of `most` outputs; the next output is at 0."""
    end = max(most - 1, 0)
    return np.append(POINTS[: int(np.searchsorted(POINTS, end))], end)


class Horizon:
    """What generations will need of the device.

    Args:
        points: steps from now at which to look, from 0 on.
        margin: share of each step's seconds that is kept free.
        units: of memory; inf where it is no limit. `block` of it are handed out at a time.
        reserved: what others were promised of the device.
        most: outputs up to which lengths are guessed, as long as none was seen; inf: all get as
            many as they may have.
    """

    def __init__(
        self,
        model: ModelQueues,
        points: Floats,
        *,
        margin: float = 0.0,
        units: float = math.inf,
        block: int = 0,
        reserved: Reserved = NOTHING,
        most: float = math.inf,
    ) -> None:
        self.model = model
        self.lengths = model.view.lengths.get(model.label) or Lengths()
        self.points = points
        self.margin = margin
        self.units, self.block = units, block
        self.reserved = reserved
        self.most = most
        self._steps = _steps(tuple(points.tolist()))

    def rows(
        self, jobs: Sequence[Job], running: bool, sizes: Mapping[Job, float] | None = None
    ) -> Rows:
        """The load of each of `jobs`; those `running` have their next output in the coming step.

        `sizes`: tokens that a decode of each reads, if they are known.
        """
        curve = self.lengths.curve(self.most)
        if not jobs:
            nothing = np.zeros((0, len(self.points)))
            nobody = np.zeros(0)
            return Rows(nothing, nothing, nothing, nothing, nobody, nobody, curve, self.points)
        label = f"{self.model.label}.decode"
        outputs = np.array([job.call_outputs for job in jobs], dtype=np.float64)
        most = np.maximum(_column([job.calls_here(label) for job in jobs]), 1.0)
        if sizes is None:
            read = _column([job.size + job.computed for job in jobs])
        else:
            read = _column([sizes[job] for job in jobs])
        count = self.lengths.ahead(outputs, self.points, self.most)
        count *= self.points < most
        time = self._time(jobs, self.points if running else self.points + 1)
        tokens = np.minimum(self.points, most)
        tokens += read
        context = kept = count * tokens
        if self.block:
            tokens /= self.block
            kept = np.ceil(tokens, out=tokens)
            kept *= count
            kept *= self.block
        return Rows(count, context, kept, time, outputs, most[:, 0], curve, self.points)

    def _time(self, jobs: Sequence[Job], steps: Floats) -> Floats:
        """Seconds until the next output but `steps` of each is due."""
        now = self.model.view.now
        slack = np.minimum(_column([job.due_next for job in jobs]) - now, FOREVER)
        total = np.minimum(_column([job.leg_latest for job in jobs]) - now, FOREVER)
        pace = np.minimum(_column([job.slo.step for job in jobs]), FOREVER)
        time: Floats = pace * steps
        time += slack
        return np.minimum(time, total, out=time)

    def fits(self, load: Load, ahead: float = 0.0) -> bool:
        """Whether all of a load has memory, and keeps pace if it decodes step by step.

        `ahead`: seconds of a step before that, which counts where device time is reserved.
        """
        if (load.kept > self.units).any():
            return False
        if self.reserved:
            return self.reserved.leaves(list(self.demand(load, ahead)))
        return bool((self.spent(load) <= load.time + TICK).all())

    def demand(self, load: Load, ahead: float = 0.0) -> Iterator[tuple[float, float]]:
        """At each point the time that there is, and seconds of steps until then."""
        return zip(load.time.tolist(), self.spent(load, ahead).tolist(), strict=True)

    def spent(self, load: Load, ahead: float = 0.0) -> Floats:
        """Seconds from now until the step at each point is over, `ahead` before the first."""
        return self.spent_by(np.array([load.count, load.context, load.kept]), ahead)

    def spent_by(self, load: Floats, ahead: float | Floats = 0.0) -> Floats:
        """The same of counts, contexts and kept units [3, ..., points]: [..., points].

        `ahead`: of all, or [..., 1].
        """
        spent: Floats = ahead + self._seconds(load) @ self._steps
        return spent

    def held(self, load: Floats) -> Floats:
        """Seconds until each point in which somebody who has memory keeps it [points].

        Steps in which it waits for memory are not among them.
        """
        _, seconds = self._turns(load)
        return seconds @ self._steps

    def _seconds(self, load: Floats) -> Floats:
        """Seconds from one output to the next at each point."""
        turns, seconds = self._turns(load)
        return seconds if turns is None else np.where(turns > 1, AGAIN * turns * seconds, seconds)

    def _turns(self, load: Floats) -> tuple[Floats | None, Floats]:
        """How many turns each output needs at each point, None if one everywhere; seconds of one.

        Of a load that needs r times the memory, 1 / r is in a step at a time.
        """
        model = self.model
        count, context, kept = load
        if self.units == math.inf or kept.max(initial=0.0) <= self.units:
            batch = np.maximum(np.rint(count), 1.0)
            seconds = decode_seconds(model.steps, batch, np.maximum(context, 1.0))
            return None, (1 + self.margin) * (model.speed * seconds)
        turns = np.maximum(kept / self.units, 1.0)
        batch = np.maximum(np.rint(count / turns), 1.0)
        context = np.where(turns > 1, context / turns, np.maximum(context, 1.0))
        seconds = model.speed * decode_seconds(model.steps, batch, context)
        return turns, (1 + self.margin) * seconds


@lru_cache(maxsize=64)
def _steps(points: tuple[float, ...]) -> Floats:
    """How many steps as long as those at each point there are until each point [points, points].

    Between two points the length changes linearly.
    """
    gaps = np.diff(points)
    each = np.eye(len(points))
    each[0, 0] = 1.0
    for at, gap in enumerate(gaps, 1):
        each[:, at] = 0.0
        each[at - 1, at] = each[at, at] = gap / 2
    return np.cumsum(each, axis=1)


def _column(numbers: Sequence[float]) -> Floats:
    """One number a row."""
    return np.array(numbers, dtype=np.float64)[:, None]
