"""How many generations are expected to be on time, and what a newcomer adds to that.

A generation is on time if it ends before its slack is used up. How long it gets is not known, so
its chance to be on time is that of ending before the first point at which the steps until there
take longer than the time that it has. A newcomer makes all steps longer: it is worth its own
chance less what it takes from those of others. No single one has a veto.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.policies.horizon import FOREVER, Floats, Horizon, Load
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.types import TICK

LOOK = np.array(
    [0, 2, 4, 8, 12, 20, 28, 44, 60, 92, 124, 188, 252, 380, 508, 764, 1020, 1532, 2044],
    dtype=np.float64,
)
"""Steps from now at which chances are looked at."""
DOOMED = 0.02
"""Whose chance is less holds nobody back."""
HARM = 0.02
"""Requests that late ones may cost by running along, in expectation."""
WORTH = 0.5
"""Share of its own chance that a newcomer has to add: it may cost others the rest."""
LEAST = 0.5
"""Chance that is the least to be counted there: who has less is taken in only if that is free."""
USUAL = 1 / 3
"""Share of their maximum that generations are taken to reach before any was seen, and at least
64."""
PART = 0.125
"""Share of a prompt that a step computes at least."""
PROBE = 4
"""Typical newcomers by which it is found how much longer steps get with one more."""


def expectations(
    model: ModelQueues,
    most: float,
    *,
    margin: float,
    units: float,
    block: int,
) -> Horizon:
    """What generations of at most `most` outputs should need of the device."""
    points = LOOK[: int(np.searchsorted(LOOK, most)) + 1]
    typical = max(most * USUAL, 64.0)
    return Horizon(model, points, margin=margin, units=units, block=block, typical=typical)


def chances(load: Load, spent: Floats) -> Floats:
    """The chance of each job of a load to be on time, if the steps until each point take `spent`.

    `load`: [jobs, points]; `spent`: [points], or [cases, jobs or 1, points]. [jobs] or [cases,
    jobs] comes back.
    """
    spare = load.time - spent + TICK
    late = spare < 0
    chance = np.ones(spare.shape[:-1])
    who = np.nonzero(late.any(-1))
    if not len(who[0]):
        return chance
    first = late[who].argmax(-1)
    before = np.maximum(first - 1, 0)
    there = load.count[who[-1]]
    row = np.arange(len(first))
    under, over = spare[(*who, before)], spare[(*who, first)]
    share = np.where(first > 0, under / np.maximum(under - over, TICK), 0.0)
    last = there[row, before]
    goes_on = last + share * (there[row, first] - last)
    chance[who] = np.where(first > 0, 1.0 - goes_on, 0.0)
    return chance


class Outlook:
    """Running generations that were promised something, and their chances.

    Args:
        horizon: with what others beside them need.
        jobs: at decode.
    """

    def __init__(self, horizon: Horizon, jobs: Sequence[Job]) -> None:
        self.horizon = horizon
        self.jobs = list(jobs)
        self.rows = horizon.rows(self.jobs, running=True)

    def costs(self, late: Sequence[Job]) -> bool:
        """Whether running `late` ones too would cost some of the weight expected on time."""
        if not self.jobs:
            return False
        load = self.rows.total()
        alone = chances(self.rows, self.horizon.spent(load))
        others = self.horizon.rows(late, running=True).total()
        together = chances(self.rows, self.horizon.spent(load + others))
        weight = np.array([job.weight for job in self.jobs])
        return float((alone - together) @ weight) > HARM * float(weight.mean())

    def shed_doomed(self) -> set[Job]:
        """Take out those that have hardly a chance, the worse half of them at a time."""
        rows = self.rows
        stay = np.arange(len(self.jobs))
        while len(stay):
            some = _some(rows, stay)
            chance = chances(some, self.horizon.spent(some.total()))
            bad = np.flatnonzero(chance < DOOMED)
            if not len(bad):
                break
            worst = bad[np.argsort(chance[bad], kind="stable")[: (len(bad) + 1) // 2]]
            stay = np.delete(stay, worst)
        if len(stay) == len(self.jobs):
            return set()
        kept = [self.jobs[index] for index in stay.tolist()]
        gone = set(self.jobs) - set(kept)
        self.jobs, self.rows = kept, _some(rows, stay)
        return gone


def _some(load: Load, which: NDArray[np.int64]) -> Load:
    return Load(load.count[which], load.context[which], load.kept[which], load.time[which])


Taken = tuple[tuple[int, float], ...]
"""Newcomers: which, and seconds of its prompt in the coming step."""


class Newcomers:
    """What those who wait would add to the number that is expected to be on time.

    Args:
        outlook: of those who run.
        back: those that lost their memory and have to be prefilled again: they count as running.
        waiting: the newcomers; `extra`: seconds that the prompt of each takes beside the others.
        first: the most seconds of prompts in the coming step, if that is to cost no deadline.
        beside: whether the others decode in that step too.
    """

    def __init__(
        self,
        outlook: Outlook,
        back: Sequence[Job],
        waiting: Sequence[Job],
        extra: Floats,
        first: float,
        beside: bool,
    ) -> None:
        horizon = outlook.horizon
        self.horizon = horizon
        self.own = self._loads = horizon.rows(waiting, running=beside)
        later = horizon.points > 0  # who fills the coming step looks at the next output of each
        rows = outlook.rows
        running = replace(rows, time=np.where(later, rows.time, FOREVER))
        if beside:  # in that step they do not decode
            self.own = replace(self.own, time=np.where(later, self.own.time, FOREVER))
            count, context = self.own.count * later, self.own.context * later
            self._loads = replace(self.own, count=count, context=context)
        self.others = _stacked([running, horizon.rows(back, running=False)])
        self._extra = extra
        self._first = first
        jobs = [*outlook.jobs, *back]
        self._weight = np.array([job.weight for job in jobs])
        self._own_weight = np.array([job.weight for job in waiting])
        self._load = _sums(self.others)
        self._all = _stacked([self.others, self.own])
        self._values: dict[Taken, tuple[float, Floats]] = {}

    def gains(self) -> Floats:
        """What each adds if it comes alone, by its weight. Growth of steps is taken as linear."""
        load, own, others = self._load, self._loads, self.others
        spent = self.horizon.spent(load)
        typical = Load(own.count.mean(0), own.context.mean(0), own.kept.mean(0), own.time[0])
        more = load
        for _ in range(PROBE):
            more = more + typical
        growth = (self.horizon.spent(more) - spent) / PROBE
        size = own.context / np.maximum(typical.context, TICK)
        number = own.count / np.maximum(typical.count, TICK)
        parts = np.clip(self._extra, None, np.maximum(self._first, PART * self._extra))
        after = spent + growth * (size + number) / 2 + parts[:, None]
        own_chance = np.concatenate(
            [chances(_some(self.own, np.array([at])), after[at]) for at in range(len(after))]
        )
        if not len(self._weight):
            return own_chance
        hit = np.flatnonzero((others.time < after.max(0)).any(1))  # nobody else can be late by it
        some = _some(others, hit)
        with_it = chances(some, after[:, None, :])
        lost = (chances(some, spent) - with_it) @ self._weight[hit]
        gain: Floats = own_chance - lost / self._own_weight
        return gain

    def all_in_time(self) -> bool:
        """Whether nobody can be late if all of them come."""
        load = self._load + _sums(self._loads)
        spent = self.horizon.spent(load, float(self._extra.sum()))
        return not (self._all.time + TICK < spent).any()

    def adds(self, index: int, seconds: float, taken: Taken) -> bool:
        """Whether one of them adds enough, beside those that were `taken` before."""
        before, _ = self._value(taken)
        value, chance = self._value((*taken, (index, seconds)))
        own = max(float(chance[len(self._weight) + index]), LEAST)
        return value - before >= WORTH * own * float(self._own_weight[index])

    def _value(self, who: Taken) -> tuple[float, Floats]:
        """The weight that is expected to be on time with some of the newcomers; all chances."""
        known = self._values.get(who)
        if known is not None:
            return known
        load = self._load
        for index, _ in who:
            load = load + self._loads[index]
        indices = np.array([index for index, _ in who], dtype=np.int64)
        ahead = sum([seconds for _, seconds in who])
        chance = chances(self._all, self.horizon.spent(load, ahead))
        count = len(self._weight)
        value = float(self._weight @ chance[:count])
        value += float(self._own_weight[indices] @ chance[count + indices])
        self._values[who] = value, chance
        return value, chance


def _stacked(loads: Sequence[Load]) -> Load:
    """The jobs of several loads [jobs, points]."""
    return Load(
        np.concatenate([load.count for load in loads]),
        np.concatenate([load.context for load in loads]),
        np.concatenate([load.kept for load in loads]),
        np.concatenate([load.time for load in loads]),
    )


def _sums(load: Load) -> Load:
    """All of a load together, whose time does not matter."""
    least = np.full(load.time.shape[-1], math.inf)
    return Load(load.count.sum(0), load.context.sum(0), load.kept.sum(0), least)
