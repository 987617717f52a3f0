"""One decision of `TokenDeadlines`: which generations decode, wait, or are dropped."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.horizon import Floats
from neustream.core.policies.model_queues import ModelQueues, has_progress, in_part
from neustream.core.policies.on_time import Outlook, expectations
from neustream.core.policies.prefill_plan import PrefillPlan
from neustream.core.policies.recent_prompts import patience, typical
from neustream.core.policies.token_admission import without_memory
from neustream.core.policies.token_again import LONGER, until
from neustream.core.policies.token_calm import calm
from neustream.core.policies.token_company import waits
from neustream.core.policies.token_due import shortest, steady
from neustream.core.policies.token_few import Few
from neustream.core.policies.token_late import take_late
from neustream.core.policies.token_noise import safe
from neustream.core.policies.token_prefill import PrefillFiller
from neustream.core.policy import Decision, View
from neustream.core.reasons import due, span
from neustream.core.steps import Step
from neustream.core.types import TICK

VAIN = 0.95
"""Prefill and decode are mixed only if that takes less than this share of the two separately."""


class Parameters(Protocol):
    """Those of `TokenDeadlines`."""

    @property
    def margin(self) -> float: ...

    @property
    def memory(self) -> float: ...

    @property
    def pause(self) -> float: ...

    @property
    def steady(self) -> bool: ...


@dataclass(slots=True)
class StepPlan:
    """One decision in the making.

    Attributes:
        alive: decodes that can still be on time, the most urgent first; `broken`: jobs that cannot.
        waiting: prompts that can.
        part: the prompts of this step.
        margin: factor of expected seconds for what is counted with.
        promised: those of `alive` that are promised something more; calm: whether nobody can be
            late, whatever is decided (`token_calm.py`); few: the account where few are there.
        together: seconds of a decode of all that are alive; context: tokens that it reads.
        dues: when the next output of each job is due; sizes: tokens that a decode of each reads,
            and those that are left of each prompt.
        full: whether there was no room for any prompt.
    """

    view: View
    model: ModelQueues
    rule: Parameters
    alive: list[Job] = field(default_factory=list)
    broken: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    drop: dict[Job, str] = field(default_factory=dict)
    part: PrefillPlan | None = None
    margin: float = 1.0
    promised: list[Job] = field(default_factory=list)
    calm: bool = False
    together: float = 0.0
    context: float = 0.0
    dues: dict[Job, float] = field(default_factory=dict)
    sizes: dict[Job, float] = field(default_factory=dict)
    full: bool = False
    few: Few | None = None
    _outlook: Outlook | None = None

    @property
    def outlook(self) -> Outlook:
        """The account where many are there: the chances of those that are promised something."""
        if self._outlook is None:
            self._outlook = self._expected()
        return self._outlook

    def keep(self) -> None:
        """Sort out who can still be on time."""
        model = self.model
        self.margin = 1 + self.rule.margin + safe(self._error(), len(model.decodes))
        least = model.seconds(Step(decodes=1, context=1.0))
        self.sizes = {job: job.size for job in (*model.decodes, *model.prefills)}
        self.dues = {job: job.due_next for job in (*model.decodes, *model.prefills)}
        if self.rule.steady and model.decodes:
            self.dues |= steady(model, least, self._decode(model.decodes))
        self._sort_decodes(least)
        behind = shortest(model)
        for job in model.prefills:
            self._sort_prefill(job, behind.get(job, 0.0))
        served = self.alive or self.broken or self.waiting
        if self.drop and model.steps.learns and not served:
            self._try_one()
        self.alive.sort(key=self.dues.__getitem__)
        self.waiting.sort(key=self._rank)
        self._count()
        in_time = not self.alive or self.together <= self._time(self.alive[0])
        if self.waiting or self.broken or not in_time:
            self.promised = self.alive[
                : bisect_left(self.alive, math.inf, key=self.dues.__getitem__)
            ]
            self.calm = calm(self)
            if not self.calm:
                self._shed_doomed()
        self.drop |= without_memory(self)

    def _error(self) -> float:
        """By how much single steps usually miss what was expected of them, as a share."""
        spread = self.view.spread
        errors = [spread[name].error for name in self.view.queues if name in spread]
        return max([self.model.steps.error, *errors])

    def most(self) -> int:
        """The most outputs that one of those who are in time may have got in the end."""
        label = f"{self.model.label}.decode"
        outputs = [job.call_outputs + job.calls_left.get(label, 1) for job in self.alive]
        outputs += [job.call_outputs + job.calls_left.get(label, 1) for job in self.waiting]
        return max(outputs, default=1)

    def _expected(self) -> Outlook:
        model, memory, most = self.model, self.model.memory, self.most()
        horizon = expectations(
            model,
            most,
            margin=self.rule.margin,
            units=math.inf if memory is None else memory.capacity * self.rule.memory,
            block=0 if memory is None else memory.block_size,
            paces=self._paces(most),
            decodes=self.followed(),
        )
        return Outlook(horizon, self.promised, self.sizes)

    def _shed_doomed(self) -> None:
        """Those that have hardly a chance to be on time count as late, and hold nobody back."""
        self.few = Few.of(self)
        if self.view.reserved or (self.few is not None and self.few.hopeful()):
            return
        doomed = self.outlook.shed_doomed()
        if doomed:
            self.broken += [job for job in self.alive if job in doomed]
            self.alive = [job for job in self.alive if job not in doomed]
            self.promised = self.outlook.jobs
            self._count()

    def followed(self) -> Step | None:
        """A decode of all that are alive, if others come in place of those who end; None if nobody
        decodes, or the pool has other models: the places are theirs too."""
        own = {f"{self.model.label}.prefill", f"{self.model.label}.decode"}
        if not self.alive or not own.issuperset(self.view.pool.stages):
            return None
        return Step(decodes=len(self.alive), context=self.context)

    def _paces(self, most: int) -> Floats | None:
        """Seconds until the next output of each who was promised a pace is due, and from each to
        the one after it [jobs, 2]; None if there is memory for `most` outputs of each."""
        memory, jobs = self.model.memory, [*self.alive, *self.waiting]
        if memory is None:
            return None
        needed = sum([self.sizes[job] + job.computed for job in jobs])
        needed += len(jobs) * (most + memory.block_size)
        if needed <= memory.capacity * self.rule.memory:
            return None
        now = self.view.now  # as `Horizon` has it: deadlines that `steady` tightens are not meant
        paces = [(job.due_next - now, job.slo.step) for job in jobs if job.slo.step < math.inf]
        return np.array(paces) if paces else None

    def _count(self) -> None:
        """What a decode of all that are alive takes."""
        self.context = self.read_by(self.alive)
        step = Step(decodes=len(self.alive), context=self.context)
        self.together = self.seconds(step) if self.alive else 0.0

    def _sort_decodes(self, least: float) -> None:
        """A decode is alive if its next output can be in time."""
        now, dues = self.view.now, self.dues
        decodes = self.model.decodes
        self.broken = [job for job in decodes if job.late or dues[job] - now < least - TICK]
        self.alive = decodes[:]
        if self.broken:
            broken = set(self.broken)
            self.alive = [job for job in decodes if job not in broken]

    def _sort_prefill(self, job: Job, behind: float) -> None:
        """A prompt waits if it can be in time, is kept if it has outputs, and else dropped.

        `behind`: seconds that it needs at least after its next output, for a promised end.
        """
        need = self.model.prompt_speed * job.next_output_s
        time, left = self._time(job), job.leg_latest - self.view.now
        if time >= need - TICK and left >= need + behind - TICK and not job.late:
            self.waiting.append(job)
        elif job.late or job.call_outputs:
            self.broken.append(job)
        elif time < need - TICK:
            self.drop[job] = f"hopeless: its next output needs {span(need)}, {due(time)}"
        else:
            self.drop[job] = f"hopeless: needs {span(need + behind)} more, {due(left)}"

    def _rank(self, job: Job) -> tuple[bool, bool, float]:
        """Prompts under way first, then those with a deadline, then the shortest by weight."""
        return not in_part(job), self.dues[job] == math.inf, self.sizes[job] / job.weight

    def _try_one(self) -> None:
        """Keep the job with the most slack of those that a learnt latency calls hopeless.

        The device is idle. What was learnt may be wrong, and only steps that run correct it.
        """
        hopes = [job for job in self.drop if self.due(job) > self.view.now]
        if hopes:
            speed = self.model.prompt_speed
            best = max(hopes, key=lambda job: self.due(job) - speed * job.next_output_s)
            del self.drop[best]
            self.waiting.append(best)

    def due(self, job: Job) -> float:
        """When its next output is due."""
        return self.dues[job]

    def _time(self, job: Job) -> float:
        """Seconds until its next output is due."""
        return self.due(job) - self.view.now

    def seconds(self, step: Step) -> float:
        """Seconds of a step, with what is kept so that no output of others is late by it."""
        return self.margin * self.model.seconds(step)

    def prompt_seconds(self, job: Job) -> float:
        """Seconds by which a prompt makes a step longer in which all that are alive decode."""
        size = self.sizes[job]
        square = (2 * job.computed + size) * size
        return self.seconds(Step(1, size, square, len(self.alive), self.context)) - self.together

    def expected_and_safe(self, step: Step) -> tuple[float, float]:
        """Seconds of a step without what is kept for its noise, and with it (see `seconds`)."""
        seconds = self.model.seconds(step)
        return (1 + self.rule.margin) * seconds, self.margin * seconds

    def _decode(self, jobs: Sequence[Job]) -> float:
        return self.seconds(Step(decodes=len(jobs), context=self.read_by(jobs)))

    def read_by(self, decodes: Sequence[Job]) -> float:
        """Tokens that a step of decodes reads."""
        return sum(map(self.sizes.__getitem__, decodes))

    # -- prompts ----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Choose the prompts of this step, and the decodes that they run beside."""
        if not self.waiting:
            return
        filler = PrefillFiller(self)
        self.full = not filler.finds_any()
        if self.full:
            return
        best = filler.fill(self.alive)
        if self.alive:
            best = self._best(filler, best)
        if best.chosen and not waits(self, best):
            self.part = best

    def _best(self, filler: PrefillFiller, beside_all: PrefillPlan) -> PrefillPlan:
        """Prompts beside all decodes, beside the urgent ones or alone: what takes most of them in.

        At equality prompts run alone where they cannot wait for a longer step, or save nothing.
        """
        better_alone = bool(beside_all.chosen) and (
            self._hurried(beside_all) or self._in_vain(beside_all)
        )
        if not better_alone and self._takes_all(beside_all):
            return beside_all
        best = beside_all
        urgent = self._urgent()
        if urgent is not None and len(best.chosen) < len(self.waiting):
            beside_urgent = filler.fill(urgent)
            if beside_urgent.worth > best.worth:
                best = beside_urgent
        alone = filler.fill([])
        if alone.worth == best.worth and better_alone:
            return alone
        return alone if alone.worth > best.worth else best

    def _takes_all(self, part: PrefillPlan) -> bool:
        """Whether all prompts that wait are in a step as a whole."""
        if len(part.chosen) < len(self.waiting):
            return False
        return all(size == job.size for job, size in part.chosen.items())

    def _urgent(self) -> list[Job] | None:
        """Decodes that would be late after the longest step that the most urgent one allows.

        None if those are all.
        """
        until = self.due(self.alive[0]) + self.together
        count = bisect_left(self.alive, until, key=self.dues.__getitem__)
        return self.alive[:count] if count < len(self.alive) else None

    def _hurried(self, part: PrefillPlan) -> bool:
        """Whether who comes during this step is likely to be late for it."""
        return patience(self.view, self.model) < self.seconds(part.step())

    def _in_vain(self, part: PrefillPlan) -> bool:
        """Whether a mixed step saves next to nothing over the two run separately."""
        alone = self.seconds(part.without_decodes())
        return self.seconds(part.step()) >= VAIN * (alone + self.together)

    # -- the step ---------------------------------------------------------------------------------

    def decision(self) -> Decision:
        """The step, or a pause, and who is given up."""
        if self.part is not None:
            jobs, sizes = [*self.part.decodes, *self.part.chosen], dict(self.part.chosen)
        else:
            wake_at = self._pause()
            if wake_at is not None:
                return Decision(drop=self.drop, wake_at=wake_at)
            jobs, sizes = self._decoding(), {}
            if not jobs and self._may_hope():  # what is there is better than nothing
                sizes = {self.waiting[0]: self.whole(self.waiting[0])}
                jobs = self.waiting[:1]
                self.part = PrefillPlan([], chosen=dict(sizes))
        if self.broken:
            take_late(self, jobs, sizes)
        if sizes or self.drop:
            return Decision(jobs, self.drop, sizes=sizes)
        seconds = self._decode(jobs) if self.broken else self.together
        return Decision(jobs, until=until(self, seconds), within=LONGER * seconds)

    def _may_hope(self) -> bool:
        """Whether the first prompt may run although it does not fit, since nobody else does.

        Not beside others who were promised something, unless its own promise has begun.
        """
        if not self.waiting:
            return False
        return not self.view.reserved or has_progress(self.waiting[0])

    def whole(self, job: Job) -> float:
        """As much of a prompt as a step may have."""
        return min(job.size, float(self.view.pool.step_tokens))

    def _pause(self) -> float | None:
        """When the decodes go on, if until then it is better to be ready for who may come."""
        if not self.rule.pause or self.waiting or self.broken or self.view.reserved:
            return None
        if not self.alive or self.due(self.alive[0]) == math.inf:
            return None
        if patience(self.view, self.model) >= self.together:
            return None
        _, size = typical(self.view, f"{self.model.label}.prefill")
        reserve = self.rule.pause * self.model.seconds(Step(1, size, size * size))
        wake = min(self.due(self.alive[0]), self._ends_from()) - self.together - reserve
        return wake if wake > self.view.now + TICK else None

    def _ends_from(self) -> float:
        """From when on all that are alive would have to decode, to reach their maxima by the ends
        that were promised; inf where none was."""
        label = f"{self.model.label}.decode"
        return min([job.leg_latest - job.calls_here(label) * self.together for job in self.alive])

    def _decoding(self) -> list[Job]:
        """The generations that decode: all of them, or as many as keep the most urgent in time."""
        now, alive = self.view.now, self.alive
        if alive and self.together <= self.due(alive[0]) - now + TICK:
            return list(alive)
        while alive:
            count = self._in_time(alive, self.due(alive[0]) - now)
            if count:
                return alive[:count]
            alive = alive[1:]  # even alone it may be late
        return list(self.alive[:1])

    def _in_time(self, jobs: Sequence[Job], time: float) -> int:
        """How many of `jobs`, from the front, decode within `time`."""
        low, high = 0, len(jobs)
        while low < high:
            middle = (low + high + 1) // 2
            if self._decode(jobs[:middle]) <= time + TICK:
                low = middle
            else:
                high = middle - 1
        return low
