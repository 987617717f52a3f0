"""Who of those that wait may be promised that they will be on time, in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from heapq import nsmallest
from typing import TYPE_CHECKING, Protocol

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.horizon import Floats, Horizon, points_to_end
from neustream.core.policies.model_queues import has_progress, in_part
from neustream.core.policies.newcomers import WORTH, Newcomers
from neustream.core.policies.on_time import DOOMED
from neustream.core.policies.prefill_plan import PrefillPlan
from neustream.core.policies.token_few import Few
from neustream.core.steps import Step

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

WEIGHED = 32
"""Waiting prompts that are weighed in one decision: half are the shortest, half the most urgent."""
PATIENCE = 0.3
"""Share of the time for which all who wait take the memory, within which one comes to be urgent."""
QUEUE = 1.2
"""Time that prompts one after the other take, times: other steps come between them."""


class Admission(Protocol):
    """Asked for each prompt of each step that is filled.

    Attributes:
        waiting: prompts in the order in which they are to be tried.
    """

    waiting: list[Job]

    def begin(self, part: PrefillPlan) -> None:
        """A step is filled from now on."""
        ...

    def takes(self, index: int, part: PrefillPlan, size: float) -> bool:
        """Whether `waiting[index]` may be promised, with `size` tokens of it in `part`; it is."""
        ...


def admission(plan: StepPlan) -> Admission:
    """All where nobody can be late, else by expected worth, of few or of many. Where others were
    promised some of the device, by whether it all fits. Where it does not with nobody new, and
    costs none of the others its promise, by worth: or whoever will be late would keep everybody
    out."""
    if plan.calm:
        return All(plan)
    if plan.few is not None:
        return FewWorth(plan, plan.few)
    if not plan.view.reserved:
        return Worth(plan)
    beside = Beside(plan)
    return Worth(plan) if beside.keeps_only_others() else beside


class All:
    """Everybody is taken in: in order of deadline if only first outputs are promised, else as
    `StepPlan` sorts them."""

    def __init__(self, plan: StepPlan) -> None:
        self.waiting = _by_deadline(plan) or plan.waiting

    def begin(self, part: PrefillPlan) -> None:
        """Nothing is counted."""

    def takes(self, index: int, part: PrefillPlan, size: float) -> bool:
        return True


class FewWorth:
    """A prompt is taken in if it adds enough to the number that is expected to be on time, as
    `Few` has it. Order as of `All`."""

    def __init__(self, plan: StepPlan, account: Few) -> None:
        self.waiting = _by_deadline(plan) or plan.waiting
        self._plan = plan
        self._account = account
        self._taken: list[Job] = []
        self._weight = 0.0

    @cached_property
    def _nobody(self) -> float:
        """The weight that is expected on time without newcomers."""
        return self._account.with_some([], self._plan.together)[0]

    def begin(self, part: PrefillPlan) -> None:
        self._taken = []

    def takes(self, index: int, part: PrefillPlan, size: float) -> bool:
        plan, job = self._plan, self.waiting[index]
        seconds = plan.seconds(part.step_with(job, size))
        if len(part.decodes) < len(plan.alive):
            seconds += plan.together
        before = self._weight if self._taken else self._nobody
        taken = [*self._taken, job]
        weight, chance = self._account.with_some(taken, seconds)
        enough = chance >= DOOMED and weight - before >= WORTH * chance * job.weight
        if enough or has_progress(job):
            self._taken, self._weight = taken, weight
            return True
        return False


class Worth:
    """A prompt is taken in if it adds enough to the number that is expected to be on time.

    Prompts under way go first: they were taken in already. Then in order of deadline if all who
    wait are in time so, else by what they add, to one digit; then the shortest, or where memory is
    short the most urgent. Those that lost their memory add all of themselves. Who is promised
    nothing more comes behind.
    """

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        by_deadline = _by_deadline(plan)
        waiting = by_deadline[:WEIGHED] or _some(plan)
        back = [job for job in plan.waiting if job.call_outputs and plan.due(job) < math.inf]
        self._extra = np.array([plan.prompt_seconds(job) for job in waiting])
        slack = (plan.due(plan.alive[0]) if plan.alive else math.inf) - plan.view.now
        self._newcomers = Newcomers(
            plan.outlook,
            back,
            waiting,
            self._extra,
            self._saved(waiting),
            slack - plan.together,
            beside=bool(plan.alive),
        )
        # whoever is asked first will be refused, as it seems
        self._doubtful = float(self._newcomers.gains.max()) < WORTH
        self._order = list(range(len(waiting))) if by_deadline else self._by_gain(waiting)
        self.waiting = [waiting[index] for index in self._order]
        self._taken, self._refused = self._newcomers.nobody, self._doubtful

    def _by_gain(self, waiting: Sequence[Job]) -> list[int]:
        """Prompts under way; then who adds most, to one digit; among those the most urgent."""
        plan = self._plan
        gains = self._newcomers.gains.round(1)
        gains[[has_progress(job) for job in waiting]] = 1.0
        gains[[plan.dues[job] == math.inf for job in waiting]] = 0.0
        gains[[in_part(job) for job in waiting]] = math.inf
        order: list[int] = np.lexsort((-self._urgency(waiting), -gains)).tolist()
        return order

    def _saved(self, waiting: Sequence[Job]) -> float:
        """Seconds by which a prompt makes a step longer less if it is not the first of it: by how
        much as many as have seats take less in one than each alone, for each but one."""
        plan = self._plan
        some = waiting[: max(plan.model.seats - len(plan.alive), 0)]
        if len(some) < 2:
            return 0.0
        everybody = PrefillPlan(plan.alive, context=plan.context)
        for job in some:
            everybody.add(job, plan.sizes[job])
        together = plan.seconds(everybody.step()) - plan.together
        apart = float(self._extra[: len(some)].sum())
        return max((apart - together) / (len(some) - 1), 0.0)

    def _urgency(self, waiting: Sequence[Job]) -> Floats:
        """Apparent tardiness cost (Vepsalainen and Morton, 1987) where memory is short, else 0.

        The less memory one takes for its weight, the more; the longer it could still wait, beside
        how long they all keep the memory, the less. So deadlines decide where all can be in time,
        and where they cannot, the cheapest come first.
        """
        plan = self._plan
        cost = self._newcomers.memory_time()
        if cost is None:
            return np.zeros(len(waiting))
        ahead = PATIENCE * float(cost.sum()) * len(plan.waiting) / len(waiting)
        due = np.array([plan.due(job) for job in waiting])
        slack = np.maximum(due - plan.view.now - self._extra, 0.0)
        urgency: Floats = np.log(self._newcomers.weight / cost) - slack / ahead
        return urgency

    def begin(self, part: PrefillPlan) -> None:
        self._taken, self._refused = self._newcomers.nobody, self._doubtful

    def takes(self, index: int, part: PrefillPlan, size: float) -> bool:
        job = self.waiting[index]
        if has_progress(job) or self._newcomers.all_add:
            return True
        place = self._order[index]
        seconds = self._newcomers.seconds(self._taken, place)
        if size < self._plan.sizes[job]:
            seconds = self._plan.seconds(part.step_with(job, size))
            seconds -= self._plan.seconds(part.step())
        behind = self._order[index + 1 :]
        after = self._newcomers.adds(self._taken, place, seconds, behind, self._refused)
        if after is None:
            self._refused = True
            return False
        self._taken = after
        return True


def _some(plan: StepPlan) -> list[Job]:
    """Those who wait; of many the first half of `WEIGHED`, and as many others that are due first,
    so that nobody who is large is left behind for ever."""
    waiting, half = plan.waiting, WEIGHED // 2
    if len(waiting) <= WEIGHED:
        return waiting
    return waiting[:half] + nsmallest(WEIGHED - half, waiting[half:], key=plan.due)


def _by_deadline(plan: StepPlan) -> list[Job]:
    """All who wait, those due first in front, if only first outputs are promised, and all in time
    so; else nobody."""
    if any(job.slo.step < math.inf or job.due < math.inf for job in plan.waiting):
        return []
    least = plan.model.seconds(Step(1, 1.0, 1.0))
    jobs = sorted(plan.waiting, key=lambda job: (not in_part(job), plan.due(job)))
    over = plan.view.now + plan.together
    for job in jobs:
        seconds = plan.seconds(Step(1, job.size, job.size * job.size))
        over += QUEUE * max(seconds - least, 0.05 * least)
        if over > plan.due(job):
            return []
    return jobs


def _beside(plan: StepPlan, new: Sequence[Job]) -> Horizon:
    """What those who run, and some more, need to their ends beside what others were promised."""
    model, memory = plan.model, plan.model.memory
    label = f"{model.label}.decode"
    most = max([job.calls_left.get(label, 1) for job in (*plan.alive, *new)], default=1)
    return Horizon(
        model,
        points_to_end(most),
        margin=plan.margin - 1,
        units=math.inf if memory is None else memory.capacity * plan.rule.memory,
        block=0 if memory is None else memory.block_size,
        reserved=plan.view.reserved,
    )


def without_memory(plan: StepPlan) -> dict[Job, str]:
    """The reasons of those that are dropped and have no memory by `Beside` with those who run."""
    if not plan.drop or not plan.alive or plan.model.memory is None or not plan.view.reserved:
        return {}
    jobs = list(plan.drop)
    horizon = _beside(plan, jobs)
    running = horizon.rows(plan.alive, running=True).total()
    rows = horizon.rows(jobs, running=False)
    told = {}
    for index, job in enumerate(jobs):
        if not horizon.keeps(running + rows.one(index)):
            told[job] = f"{plan.drop[job]}; those who run are expected to fill the KV cache"
    return told


class Beside:
    """A prompt is taken in if all who run and it fit into what is left by others' promises."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self.waiting = _some(plan)
        self._horizon = _beside(plan, self.waiting)
        rows = self._horizon.rows(self.waiting, running=False)
        self._rows = rows
        self._rows_of = [rows.one(index) for index in range(len(self.waiting))]
        nobody = self._horizon.rows([], running=True).total()
        self._running = {
            beside: self._horizon.rows(plan.alive, beside).total() if plan.alive else nobody
            for beside in (True, False)
        }
        self._load = nobody
        self._all_fit = False

    def keeps_only_others(self) -> bool:
        """Whether of those who run some will be late, with nobody new, and none of the others."""
        load = self._running[True]
        return not self._horizon.fits(load) and self._horizon.keeps_others(load)

    def begin(self, part: PrefillPlan) -> None:
        """Those that do not decode in this step have their next output in the one after it."""
        self._load = self._running[len(part.decodes) < len(self._plan.alive)]
        self._all_fit = False
        if len(self.waiting) + len(part.decodes) > self._plan.model.seats:
            return
        square = sum([(2 * job.computed + job.size) * job.size for job in self.waiting])
        tokens = sum([job.size for job in self.waiting])
        step = Step(len(self.waiting), tokens, square, len(part.decodes), part.context)
        everybody = self._load + self._rows.total()
        self._all_fit = self._horizon.fits(everybody, self._plan.seconds(step))

    def takes(self, index: int, part: PrefillPlan, size: float) -> bool:
        job = self.waiting[index]
        load = self._load + self._rows_of[index]
        if not in_part(job) and not self._all_fit:
            ahead = self._plan.seconds(part.step_with(job, size))
            if not self._horizon.fits(load, ahead):
                return False
        self._load = load
        return True
