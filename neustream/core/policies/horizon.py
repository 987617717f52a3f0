"""Some steps ahead of a language model: how many generations are left, what they read, what time
they have.

How long a generation gets is not known; what is known is how many of those before it went on so far
(`Lengths`). All numbers here are expectations at points, which are numbers of steps from now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.lengths import TINY, Lengths
from neustream.core.many_decodes import decode_seconds
from neustream.core.policies.coming import Coming
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.reserved import NOTHING, Reserved
from neustream.core.types import TICK

Floats = NDArray[np.float64]
POINTS = np.array([0.0, 4.0, 12.0, 28.0, 60.0, 124.0, 252.0, 508.0, 1020.0])
FOREVER = 1e9
"""Seconds that those have who were promised nothing."""
SPREAD = 0.08
"""Share by which the steps that are made in a time may be more or fewer than expected. Where many
end at their maximum, a plan that has it come in the last moment holds nobody else back for all."""
AGAIN = 1.1
"""Time that steps take where memory is short, times: prompts of who lost theirs are read again."""

_later = attrgetter("later")


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
class Limits:
    """How long each of some jobs may go on, and the time that it has.

    Attributes:
        time: seconds that there are at each point [jobs, points].
        made: outputs of each; most: those that it still gets at most [jobs].
        curve: the share of generations that reach each number of outputs, then constant.
        points: steps from now.
    """

    time: Floats
    made: Floats
    most: Floats
    curve: Floats
    points: Floats

    def some(self, which: NDArray[np.int64]) -> Limits:
        """Those of some of the jobs."""
        time, made, most = self.time.take(which, 0), self.made.take(which), self.most.take(which)
        return Limits(time, made, most, self.curve, self.points)

    def then(self, other: Limits) -> Limits:
        """Those of these jobs and of others behind them."""
        time = np.concatenate([self.time, other.time])
        made = np.concatenate([self.made, other.made])
        most = np.concatenate([self.most, other.most])
        return Limits(time, made, most, self.curve, self.points)

    def later(self) -> Limits:
        """The same without a deadline in the coming step."""
        time = self.time.copy()
        time[:, 0] = FOREVER
        return Limits(time, self.made, self.most, self.curve, self.points)

    def left(self, jobs: NDArray[np.int64], steps: Floats) -> Floats:
        """The chance of each of `jobs` to go on for `steps` [..., jobs] from now.

        One that just comes to its maximum in them is over half of the time (`SPREAD`).
        """
        made = self.made.take(jobs)
        now = self.curve.take(made.astype(np.int64), mode="clip")
        left = self.curve.take((made + steps).astype(np.int64), mode="clip")
        left /= np.maximum(now, TINY)
        np.minimum(left, 1.0, out=left)
        share = steps / self.most.take(jobs)
        if share.max(initial=0.0) > 1 - SPREAD:
            left *= np.clip(0.5 + (1 - share) / (2 * SPREAD), 0.0, 1.0)
        return left


@dataclass(frozen=True, slots=True)
class Rows(Load):
    """The load of each of some jobs [jobs, points], and how long each may go on.

    Attributes:
        needs: `count`, `context` and `kept` in one array, and `kept` of those who take turns where
            memory is short [4, jobs, points].
        limits: those of the jobs; their `time` is the load's.
    """

    needs: Floats
    limits: Limits

    @classmethod
    def of(cls, needs: Floats, limits: Limits) -> Rows:
        """What some jobs need, and their limits."""
        return cls(needs[0], needs[1], needs[2], limits.time, needs, limits)

    def some(self, which: NDArray[np.int64]) -> Rows:
        """Those of some of the jobs."""
        return Rows.of(self.needs.take(which, 1), self.limits.some(which))

    def needed(self) -> Floats:
        """What all of them need together [4, points]."""
        needed: Floats = self.needs.sum(1)
        return needed


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
        reserved: what others were promised of the device, for whether a load `fits` beside it.
        most: outputs up to which lengths are guessed, as long as none was seen; inf: all get as
            many as they may have.
        first: seconds until the output at each point is due of whoever is due first [points]. Where
            memory is short those who have slack beyond that wait for the others. None: nobody waits
            for others, all take turns.

    Attributes:
        coming: who comes meanwhile; None: nobody, or it is not to count.
        before: what others were promised, where the time of each job is what this leaves of it.
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
        first: Floats | None = None,
    ) -> None:
        self.model = model
        self.lengths = model.view.lengths.get(model.label) or Lengths()
        self.points = points
        self.margin = margin
        self.units, self.block = units, block
        self.reserved = reserved
        self.most = most
        self.first = first
        self.coming: Coming | None = None
        self.before = NOTHING
        self._steps = _steps(tuple(points.tolist()))

    def rows(
        self, jobs: Sequence[Job], running: bool, sizes: Mapping[Job, float] | None = None
    ) -> Rows:
        """The load of each of `jobs`; those `running` have their next output in the coming step.

        `sizes`: tokens that a decode of each reads, if they are known.
        """
        curve = self.lengths.curve(self.most)
        if not jobs:
            nobody = np.zeros(0)
            limits = Limits(np.zeros((0, len(self.points))), nobody, nobody, curve, self.points)
            return Rows.of(np.zeros((4, 0, len(self.points))), limits)
        label = f"{self.model.label}.decode"
        outputs = np.array([job.call_outputs for job in jobs], dtype=np.float64)
        most = np.maximum(_column(_calls_here(jobs, label)), 1.0)
        if sizes is None:
            read = _column([job.size + job.computed for job in jobs])
        else:
            read = _column([sizes[job] for job in jobs])
        needs = np.empty((4, len(jobs), len(self.points)))
        count, context, kept, in_turns = needs
        count[:] = self.lengths.ahead(outputs, self.points, self.most)
        np.putmask(count, self.points >= most, 0.0)
        time = self._time(jobs, self.points if running else self.points + 1)
        tokens = np.minimum(self.points, most)
        tokens += read
        np.multiply(count, tokens, out=context)
        if self.block:
            tokens /= self.block
            np.ceil(tokens, out=tokens)
            np.multiply(tokens, count, out=kept)
            kept *= self.block
        else:
            kept[:] = context
        in_turns[:] = kept
        if self.first is not None:
            np.putmask(in_turns, self._slack(jobs)[:, None] > self.first, 0.0)
        return Rows.of(needs, Limits(time, outputs, most[:, 0], curve, self.points))

    def _time(self, jobs: Sequence[Job], steps: Floats) -> Floats:
        """Seconds until the next output but `steps` of each is due, less those that prompts of
        others take until a promised end."""
        now = self.model.view.now
        dates = np.array([[job.due_next for job in jobs], [job.leg_latest for job in jobs]]) - now
        slack, total = np.minimum(dates, FOREVER)
        pace = np.minimum([job.slo.step for job in jobs], FOREVER)
        time: Floats = pace[:, None] * steps
        time += slack[:, None]
        if total.min() < FOREVER:
            prompt_s = 0.0 if self.coming is None else self.coming.prompt_s
            np.minimum(time, total[:, None] - prompt_s * (steps + 1), out=time)
        else:
            np.minimum(time, FOREVER, out=time)
        return self.before.each_left(time)

    def _slack(self, jobs: Sequence[Job]) -> Floats:
        """Seconds for which each may wait; none where it was promised no pace, or an end too."""
        dues = [
            job.due_next if job.slo.step < math.inf and job.leg_latest == math.inf else 0.0
            for job in jobs
        ]
        return np.array(dues) - self.model.view.now

    def fits(self, load: Load, ahead: float = 0.0) -> bool:
        """Whether all of a load has memory, and keeps pace if it decodes step by step.

        `ahead`: seconds of a step before that, which counts where device time is reserved.
        """
        if not self.keeps(load):
            return False
        if self.reserved:
            return self.reserved.leaves(list(self.demand(load, ahead)))
        return bool((self.spent(load) <= load.time + TICK).all())

    def keeps(self, load: Load) -> bool:
        """Whether there is memory for all of a load."""
        return not (load.kept > self.units).any()

    def keeps_others(self, load: Load) -> bool:
        """Whether what is reserved for others is left to them by a load, if it is late or not."""
        return self.reserved.kept_beside(list(self.demand(load)))

    def demand(self, load: Load, ahead: float = 0.0) -> Iterator[tuple[float, float]]:
        """At each point the time that there is, and seconds of steps until then."""
        return zip(load.time.tolist(), self.spent(load, ahead).tolist(), strict=True)

    def spent(self, load: Load, ahead: float = 0.0) -> Floats:
        """Seconds from now until the step at each point is over, `ahead` before the first."""
        return self.spent_by(np.array([load.count, load.context, load.kept, load.kept]), ahead)

    def spent_by(self, load: Floats, ahead: float | Floats = 0.0) -> Floats:
        """The same of what is needed (see `Rows`) [4, ..., points]: [..., points].

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

        Of a load that needs r times the memory, 1 / r is in a step at a time. An output needs as
        many turns as those who cannot wait need times the memory.
        """
        model = self.model
        count, context, kept, in_turns = load
        if self.coming is not None:
            count, context, kept = self.coming.beside(count, context, kept, self.units)
        if self.units == math.inf or kept.max(initial=0.0) <= self.units:
            batch = np.maximum(np.rint(count), 1.0)
            seconds = decode_seconds(model.steps, batch, np.maximum(context, 1.0))
            return None, (1 + self.margin) * (model.speed * seconds)
        over = np.maximum(kept / self.units, 1.0)
        batch = np.maximum(np.rint(count / over), 1.0)
        context = np.where(over > 1, context / over, np.maximum(context, 1.0))
        seconds = model.speed * decode_seconds(model.steps, batch, context)
        return np.maximum(in_turns / self.units, 1.0), (1 + self.margin) * seconds


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


def _calls_here(jobs: Sequence[Job], stage: str) -> list[int]:
    """`Job.calls_here` of each."""
    if any(map(_later, jobs)):
        return [job.calls_here(stage) for job in jobs]
    return [job.calls_left.get(stage, 0) for job in jobs]


def _column(numbers: Sequence[float]) -> Floats:
    """One number a row."""
    return np.array(numbers, dtype=np.float64)[:, None]
