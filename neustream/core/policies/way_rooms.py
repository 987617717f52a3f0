"""What is known of requests on their way: their legs, who needs a pool's time when, its price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neustream.core.demand import Demand
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.policies.price import ENOUGH
from neustream.core.policies.way_ahead import SHARES, Leg, legs_of_demand, legs_of_job
from neustream.core.policy import View
from neustream.core.types import TICK

Floats = NDArray[np.float64]
AGAIN = 6
"""Decodes after which it is looked again who may join, if nobody came or went."""
TIGHT = 1.25
"""Times what it would have cost a pool that a request costs which has hardly any time left."""
KEPT = 1024
"""Requests whose worth is kept at most."""


class Room:
    """One pool's time: who is there from when to when, and what it costs."""

    def __init__(self) -> None:
        self._stays: list[tuple[float, float, float]] = []

    def add(self, start: float, end: float, charge: float) -> None:
        self._stays.append((start, end, charge))

    def has(self, start: float, end: float, charge: float) -> bool:
        """Whether another one fits: no span of time that its stay is in is asked for too much.

        The criterion of EDF for jobs with a start and a deadline, by what each costs.
        """
        if not self._stays:
            return True
        starts, ends, charges = np.array([*self._stays, (start, end, charge)]).T
        first = np.unique(starts[starts <= start])
        last = np.unique(ends[ends >= end])
        inside = (starts[None, :] >= first[:, None]).astype(float) * charges
        asked = inside @ (ends[:, None] <= last[None, :])
        return bool((asked <= last[None, :] - first[:, None] + TICK).all())


class Looked:
    """When it was looked last, in vain, whether somebody may join, and who was there.

    `until`: when it is looked again at the latest.
    """

    def __init__(self) -> None:
        self._at = self.until = -math.inf
        self._who: tuple[Job, ...] = ()

    def again(self, now: float, *jobs: Sequence[Job]) -> bool:
        """Whether to look again."""
        if not self._at < now < self.until:
            return True
        return self._who != tuple(chain(*jobs))

    def in_vain(self, now: float, until: float, *jobs: Sequence[Job]) -> None:
        """Nobody may join now, and nobody is given up: so it stays `until` then, as it seems."""
        if self.again(now, *jobs):
            self._at, self.until, self._who = now, until, tuple(chain(*jobs))


class Ahead(NamedTuple):
    """What is ahead of a job at a stage.

    `call`: which of its calls it is in, or on the way to: when it came, and its outputs before;
    `times`: how often lengths had been learnt anew (`Lengths.times`), of one that has not begun.
    `behind`: seconds alone of all legs but the first, at each of `SHARES`; `shared`: of those of
    them in pools that charge for it.
    """

    stage: Stage | None
    call: tuple[float, int]
    times: int
    legs: list[Leg]
    behind: list[float]
    shared: list[float]


class KnownLegs:
    """What is ahead of live jobs, as long as they are at one stage of one call.

    Of those that have not begun also as long as no more is known of how long generations get: who
    waits is not to be judged by what was guessed when it came.
    """

    def __init__(self) -> None:
        self._known: dict[str, Ahead] = {}

    def of(self, view: View, job: Job) -> Ahead:
        known = self._known.get(job.id)
        call = job.arrival, job.outputs - job.call_outputs
        times = 0 if job.begun else sum([lengths.times for lengths in view.lengths.values()])
        here = known is not None and known.stage is job.stage
        if known is None or not here or known.call != call or known.times != times:
            legs = legs_of_job(view, job)
            nothing = np.zeros(len(SHARES))
            behind = sum([leg.alones for leg in legs[1:]], nothing)
            shared = sum([leg.alones for leg in legs[1:] if leg.pool], nothing)
            known = Ahead(job.stage, call, times, legs, behind.tolist(), shared.tolist())
            if len(self._known) > 4 * len(view.live) + 64:
                self._known = {id: one for id, one in self._known.items() if id in view.live}
            self._known[job.id] = known
        return known


class ScarcePrice:
    """What the scarcest pool's time is worth by what was asked for lately."""

    def __init__(self) -> None:
        self.price = 0.0
        self._pool = ""
        self._recent: tuple[Demand, ...] = ()
        self._stages: dict[str, Stage] = {}
        self._charges: dict[Demand, dict[str, float]] = {}
        self._worth: dict[str, tuple[Sequence[Leg], float, float]] = {}

    def learn(self, view: View, jobs: Sequence[Job]) -> None:
        """Take in the latest requests."""
        if view.recent is self._recent:
            return
        for job in jobs:
            self._stages.update(job.request.graph.stages)
        self._recent = view.recent
        self._charges = {
            demand: self._charges.get(demand) or self._charge(view, demand)
            for demand in view.recent[1:]
            if demand.budget < math.inf
        }
        self._worth = {}
        self._clear()

    def _charge(self, view: View, demand: Demand) -> dict[str, float]:
        legs = legs_of_demand(view, demand, self._stages)
        alone = sum([leg.alone for leg in legs])
        stretch = max(demand.budget / max(alone, TICK), 1.0)
        charges: dict[str, float] = {}
        for leg in legs:
            charges[leg.pool] = charges.get(leg.pool, 0.0) + leg.charge(stretch)
        return charges

    def _clear(self) -> None:
        self.price, self._pool = 0.0, ""
        recent, charges = self._recent, self._charges
        if len(charges) + 1 < ENOUGH:
            return
        span = recent[-1].at - recent[0].at
        if span * len(charges) < sum([demand.budget for demand in charges]):
            return
        total: dict[str, float] = {}
        for each in charges.values():
            for pool, seconds in each.items():
                total[pool] = total.get(pool, 0.0) + seconds
        self._pool = max(total, key=lambda pool: total[pool])
        room = span
        offers = [
            (demand.weight / each[self._pool], each[self._pool])
            for demand, each in charges.items()
            if each.get(self._pool, 0.0) > 0
        ]
        for density, seconds in sorted(offers, reverse=True):
            room -= seconds
            if room < 0:
                self.price = density
                return

    def scarce(self, view: View) -> bool:
        """Whether the pool of a view is the scarcest."""
        return view.pool.name == self._pool

    def density(self, legs: Sequence[Leg], stretch: float, job: Job) -> float:
        """Weight per second of the scarcest pool that a request brings; inf if it needs none."""
        known = self._worth.get(job.id)
        if known is None or known[0] is not legs or known[1] != stretch:
            if len(self._worth) >= KEPT:  # who was moved here is in no `recent`
                self._worth.clear()
            known = self._worth[job.id] = legs, stretch, self._density(legs, stretch, job)
        return known[2]

    def _density(self, legs: Sequence[Leg], stretch: float, job: Job) -> float:
        seconds = sum([leg.charge(stretch) for leg in legs if leg.pool == self._pool])
        if not self._pool:
            seconds = max([leg.charge(stretch) for leg in legs], default=0.0)
        return job.weight / seconds if seconds > 0 else math.inf


def planned(job: Job) -> float:
    """Times what it takes alone that it had when it came."""
    return max(job.slo.total / max(job.alone_s, TICK), 1.0)


def begun_first(job: Job) -> tuple[bool, float]:
    """Those that have begun, who has to start first in front; then the latest."""
    new = not job.begun
    return new, -job.arrival if new else job.due - job.remaining_s


def tight(legs: Sequence[Leg], job: Job, now: float) -> bool:
    """Whether it has waited so long that it would cost much more here than when it came."""
    if not legs:
        return False
    own = legs[0]
    here = (job.due - sum([leg.alone for leg in legs[1:]]) - now) / own.alone
    return own.charge(max(here, 1.0)) > TIGHT * own.charge(planned(job))
