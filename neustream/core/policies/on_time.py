"""How many generations are expected to be on time.

A generation is on time if it ends before its slack is used up. How long it gets is not known, so
its chance to be on time is that of ending before the first point at which the steps until there
take longer than the time that it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.policies.coming import Coming
from neustream.core.policies.horizon import SPREAD, Floats, Horizon, Limits
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.steps import Step
from neustream.core.types import TICK

LOOK = np.array(
    [0, 2, 4, 8, 12, 20, 28, 44, 60, 92, 124, 188, 252, 380, 508, 764, 1020, 1532, 2044],
    dtype=np.float64,
)
"""Steps from now at which chances are looked at."""
DOOMED = 0.02
"""Whose chance is less holds nobody back."""
HOPELESS = 0.002
"""The same of those that were promised their end alone: no output of theirs holds others back."""
HARM = 0.02
"""Requests that late ones may cost by running along, in expectation."""


def expectations(
    model: ModelQueues,
    most: float,
    *,
    margin: float,
    units: float,
    block: int,
    paces: Floats | None = None,
    decodes: Step | None = None,
) -> Horizon:
    """What generations of at most `most` outputs should need of the device.

    `paces`: seconds until the next output of each is due, and from each to the one after it
    [jobs, 2]; None where they do not matter, as all find memory.
    `decodes`: a step of all that run; others come in place of those who end. None: nobody.
    """
    points = LOOK[: int(np.searchsorted(LOOK, (1 + SPREAD) * most)) + 1]
    first = None if paces is None else (paces[:, :1] + paces[:, 1:] * points).min(0)
    horizon = Horizon(
        model, points, margin=margin, units=units, block=block, most=most, first=first
    )
    horizon.before = model.view.reserved
    if decodes is not None:
        horizon.coming = Coming.to(model, horizon.lengths, points, most, decodes)
    return horizon


def chances(rows: Limits, spent: Floats) -> Floats:
    """The chance of each job to be on time [jobs], if the steps until each point take `spent`
    [points]."""
    late = rows.time + TICK < spent
    chance = np.ones(len(late))
    if not late.any():
        return chance
    jobs = np.flatnonzero(late.any(1))
    first = late[jobs].argmax(1)
    begun = first > 0  # else there is no time for the next output
    before = first - begun
    under = rows.time[jobs, before] - spent[before] + TICK
    over = rows.time[jobs, first] - spent[first] + TICK
    last = rows.points[before]
    steps = last + under / np.maximum(under - over, TICK) * (rows.points[first] - last)
    chance[jobs] = np.where(begun, 1.0 - rows.left(jobs, steps), 0.0)
    return chance


class Odds:
    """`chances` of the same jobs in many cases."""

    def __init__(self, rows: Limits) -> None:
        self._rows = rows
        self._limit = rows.time + TICK
        self._by_point = np.ascontiguousarray(self._limit.T)
        # at one more point, in front, no time is left: who is late at the first one has no chance
        self._time = np.concatenate([np.zeros((len(rows.time), 1)), self._limit], axis=1)
        self._points = np.concatenate([[0.0], rows.points])

    def any_late(self, spent: Floats) -> bool:
        """Whether somebody may be late in a case [points]."""
        return bool((self._limit < spent).any())

    def by_case(self, spent: Floats) -> Floats:
        """The chance of each job in each case [cases, jobs], by `spent` [cases, points]."""
        late = self._by_point < spent.max(0)[:, None]
        chance = np.ones((len(spent), len(self._limit)))
        jobs = np.flatnonzero(late.any(0))
        if not len(jobs):
            return chance
        points = np.flatnonzero(late.any(1))
        # counted from behind: the largest is the first
        behind = (len(late) - points).astype(np.uint8)
        limit = self._by_point.take(points, 0).take(jobs, 1)
        over = limit[:, None] < spent.T.take(points, 0)[:, :, None]
        found = np.multiply(over, behind[:, None, None], dtype=np.uint8).max(0)
        first = np.where(found, len(late) - found.astype(np.int64), -1)
        odds = 1.0 - self._rows.left(jobs, self._steps(jobs, spent, first))
        np.putmask(odds, first < 0, 1.0)
        chance[:, jobs] = odds
        return chance

    def _steps(self, jobs: NDArray[np.int64], spent: Floats, first: NDArray[np.int64]) -> Floats:
        """Steps from now after which the time of `jobs` is used up, before the point `first`."""
        used = np.concatenate([np.zeros((len(spent), 1)), spent], axis=1)
        points = used.shape[1]
        before = jobs * points + first
        until = np.arange(0, used.size, points)[:, None] + first
        under = self._time.take(before)
        under -= used.take(until)
        share = under - self._time.take(before + 1)
        share += used.take(until + 1)
        np.maximum(share, TICK, out=share)
        np.divide(under, share, out=share)
        np.clip(share, 0.0, 1.0, out=share)  # of who is never late it is anything
        last = self._points.take(first)
        steps: Floats = last + share * (self._points.take(first + 1) - last)
        return steps


class Outlook:
    """Running generations that were promised something, and their chances.

    Args:
        horizon: with what others beside them need.
        jobs: at decode; `sizes` of them, if they are known.

    Attributes:
        rows: what each needs, and the time that it has; needs: what all of them need.
        spent: seconds until each point with them alone [points].
    """

    def __init__(
        self, horizon: Horizon, jobs: Sequence[Job], sizes: Mapping[Job, float] | None = None
    ) -> None:
        self.horizon = horizon
        self.jobs = list(jobs)
        self.rows = horizon.rows(self.jobs, running=True, sizes=sizes)
        self.needs = self.rows.needed()
        self.spent = horizon.spent_by(self.needs)

    def growth(self, steps: float) -> float:
        """Units of memory that they are expected to need beyond what they do in the coming step, at
        most, within so many steps: as they grow, others of them end."""
        kept, points = self.needs[2], self.horizon.points
        until = kept[points <= steps].max(initial=kept[0])  # steps may be less than any
        most = max(float(until), float(np.interp(steps, points, kept)))
        return most - float(kept[0])

    def costs(self, late: Sequence[Job]) -> bool:
        """Whether running `late` ones too would cost some of the weight expected on time."""
        if not self.jobs or not late:
            return False
        others = self.horizon.rows(late, running=True).needed()
        together = chances(self.rows.limits, self.horizon.spent_by(self.needs + others))
        alone = chances(self.rows.limits, self.spent)
        weight = np.array([job.weight for job in self.jobs])
        return float((alone - together) @ weight) > HARM * float(weight.mean())

    def shed_doomed(self) -> set[Job]:
        """Take out those that have hardly a chance, the worse half of them at a time."""
        rows = self.rows
        if not (rows.time + TICK < self.spent).any():
            return set()
        stay = np.arange(len(self.jobs))
        least = np.array([HOPELESS if job.slo.step == math.inf else DOOMED for job in self.jobs])
        while len(stay):
            chance = chances(rows.limits, self.spent)
            bad = np.flatnonzero(chance < least[stay])
            if not len(bad):
                break
            worst = bad[np.argsort(chance[bad], kind="stable")[: (len(bad) + 1) // 2]]
            keep = np.ones(len(stay), dtype=bool)
            keep[worst] = False
            kept = np.flatnonzero(keep)
            stay, rows = stay[kept], rows.some(kept)
            self.needs = rows.needed()
            self.spent = self.horizon.spent_by(self.needs)
        if len(stay) == len(self.jobs):
            return set()
        left = [self.jobs[index] for index in stay.tolist()]
        gone = set(self.jobs) - set(left)
        self.jobs, self.rows = left, rows
        return gone
