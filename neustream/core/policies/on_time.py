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
from typing import Any, NamedTuple

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
WORTH = 0.4
"""Share of its own chance that a newcomer has to add: it may cost others the rest."""
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
    return Horizon(model, points, margin=margin, units=units, block=block, most=most)


def chances(load: Load, spent: Floats) -> Floats:
    """The chance of each job of a load to be on time, if the steps until each point take `spent`.

    `load`: [jobs, points]; `spent`: [points], or [cases, jobs or 1, points]. [jobs] or [cases,
    jobs] comes back.
    """
    spare = load.time - spent + TICK
    if spare.min(initial=0.0) >= 0:
        return np.ones(spare.shape[:-1])
    cases = spare.reshape(-1, spare.shape[-1])
    first = (cases < 0).argmax(-1)
    chance = np.ones(len(cases))
    who = np.flatnonzero(cases[np.arange(len(cases)), first] < 0)
    if len(who):
        first = first[who]
        before = np.maximum(first - 1, 0)
        job = who % len(load.time)
        under, over = cases[who, before], cases[who, first]
        share = np.where(first > 0, under / np.maximum(under - over, TICK), 0.0)
        last = load.count[job, before]
        goes_on = last + share * (load.count[job, first] - last)
        chance[who] = np.where(first > 0, 1.0 - goes_on, 0.0)
    return chance.reshape(spare.shape[:-1])


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
            chance = chances(rows, self.horizon.spent_by(_needs(rows)))
            bad = np.flatnonzero(chance < DOOMED)
            if not len(bad):
                break
            worst = bad[np.argsort(chance[bad], kind="stable")[: (len(bad) + 1) // 2]]
            keep = np.ones(len(stay), dtype=bool)
            keep[worst] = False
            stay, rows = stay[keep], _some(rows, keep)
        if len(stay) == len(self.jobs):
            return set()
        kept = [self.jobs[index] for index in stay.tolist()]
        gone = set(self.jobs) - set(kept)
        self.jobs, self.rows = kept, rows
        return gone


def _some(load: Load, which: NDArray[Any]) -> Load:
    return Load(load.count[which], load.context[which], load.kept[which], load.time[which])


def _needs(load: Load) -> Floats:
    """Counts, contexts and kept units of all jobs of a load together [3, points]."""
    return np.stack([load.count.sum(0), load.context.sum(0), load.kept.sum(0)])


Taken = tuple[tuple[int, float], ...]
"""Newcomers: which, and seconds of its prompt in the coming step."""


class _Taken(NamedTuple):
    """Some of the newcomers: needs of all that run with them, seconds of their prompts, the weight
    that is expected to be on time, the chances of those who wait."""

    needs: Floats
    ahead: float
    value: float
    chance: Floats


class Newcomers:
    """What those who wait would add to the number that is expected to be on time.

    Args:
        outlook: of those who run.
        back: those that lost their memory and have to be prefilled again: they count as running.
        waiting: the newcomers; `extra`: seconds that the prompt of each takes beside the others.
        first: the most seconds of prompts in the coming step, if that is to cost no deadline.
        beside: whether the others decode in that step too.

    Attributes:
        weight: of each newcomer.
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
        own = horizon.rows(waiting, running=beside)
        later = horizon.points > 0  # who fills the coming step looks at the next output of each
        rows = outlook.rows
        others = replace(rows, time=np.where(later, rows.time, FOREVER))
        if beside:  # in that step they do not decode
            own = replace(own, time=np.where(later, own.time, FOREVER))
        if back:
            others = _stacked(others, horizon.rows(back, running=False))
        self.own, self.others = own, others
        self._each = np.stack([own.count, own.context, own.kept], axis=1)  # [waiting, 3, points]
        if beside:
            self._each[:, :2] *= later  # it keeps its memory
        brief = [job.slo.step == math.inf and job.due == math.inf for job in waiting]
        self._each[brief] *= ~later  # nothing is promised after the first output
        self._extra = extra
        self._first = first
        self._weight = np.array([job.weight for job in (*outlook.jobs, *back)])
        self.weight = np.array([job.weight for job in waiting])
        self._needs = _needs(others)
        self._most = horizon.spent_by(self._needs + self._each.sum(0), float(extra.sum()))
        self._split()
        self._known: dict[Taken, _Taken] = {}

    def _split(self) -> None:
        """Keep apart those of the others who are on time even if all newcomers come."""
        others = self.others
        tight = np.any(others.time + TICK < self._most, axis=1)
        self._calm = others.time[~tight].min(0, initial=FOREVER)
        self._calm_weight = float(self._weight[~tight].sum())
        self._tight_weight = self._weight[tight]
        self._watched = _stacked(_some(others, tight), self.own)

    def gains(self) -> Floats:
        """What each adds if it comes alone, by its weight. Growth of steps is taken as linear."""
        own, others = self.own, self.others
        spent = self.horizon.spent_by(self._needs)
        typical = np.stack([own.count.mean(0), own.context.mean(0), own.kept.mean(0)])
        more = self._needs
        for _ in range(PROBE):
            more = more + typical
        growth = (self.horizon.spent_by(more) - spent) / PROBE
        size = own.context / np.maximum(typical[1], TICK)
        number = own.count / np.maximum(typical[0], TICK)
        parts = np.clip(self._extra, None, np.maximum(self._first, PART * self._extra))
        after = spent + growth * (size + number) / 2 + parts[:, None]
        own_chance = chances(own, after)
        if not len(self._weight):
            return own_chance
        hit = (others.time < after.max(0)).any(1)  # nobody else can be late by it
        some = _some(others, hit)
        with_it = chances(some, after[:, None, :])
        lost = (chances(some, spent) - with_it) @ self._weight[hit]
        gain: Floats = own_chance - lost / self.weight
        return gain

    def memory_time(self) -> Floats | None:
        """Seconds that each takes of all of the memory until it ends; None where it is not short:
        where all of them are expected to find room."""
        kept, units = self._each[:, 2], self.horizon.units
        if (self._needs[2] + kept.sum(0)).max() <= units:
            return None
        lasts = np.diff(self.horizon.spent_by(self._needs), prepend=0.0)
        taken: Floats = np.maximum(kept @ lasts / units, TICK)
        return taken

    def all_in_time(self) -> bool:
        """Whether nobody can be late if all of them come."""
        if len(self._tight_weight):
            return False
        return not (self.own.time + TICK < self._most).any()

    def adds(self, index: int, seconds: float, taken: Taken) -> bool:
        """Whether one of them adds enough, beside those that were `taken` before."""
        before = self._with(taken)
        after = self._with((*taken, (index, seconds)))
        own = float(after.chance[index])
        if own < DOOMED:
            return False
        return after.value - before.value >= WORTH * own * float(self.weight[index])

    def _with(self, who: Taken) -> _Taken:
        """What is expected with some of the newcomers."""
        known = self._known.get(who)
        if known is not None:
            return known
        needs, ahead = self._needs, 0.0
        if who:
            before = self._with(who[:-1])
            needs, ahead = before.needs + self._each[who[-1][0]], before.ahead + who[-1][1]
        spent = self.horizon.spent_by(needs, ahead)
        chance, others = self._chances(spent)
        indices = [index for index, _ in who]
        value = others + float(self.weight[indices] @ chance[indices])
        known = self._known[who] = _Taken(needs, ahead, value, chance)
        return known

    def _chances(self, spent: Floats) -> tuple[Floats, float]:
        """The chances of those who wait, and the weight of the others that is on time."""
        tight = len(self._tight_weight)
        chance = chances(self._watched, spent)
        weight = self._calm_weight + float(self._tight_weight @ chance[:tight])
        if (self._calm + TICK < spent).any():  # a larger step takes less time: look at all
            weight = float(self._weight @ chances(self.others, spent))
        return chance[tight:], weight


def _stacked(first: Load, second: Load) -> Load:
    """The jobs of two loads [jobs, points]."""
    return Load(
        np.concatenate([first.count, second.count]),
        np.concatenate([first.context, second.context]),
        np.concatenate([first.kept, second.kept]),
        np.concatenate([first.time, second.time]),
    )
