"""One decision of `TokenDeadlines`: which generations decode, wait, or are dropped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import Protocol

from neustream.core.job import Job
from neustream.core.policies.model_queues import ModelQueues, at_decode, has_progress
from neustream.core.policies.recent_prompts import patience, typical
from neustream.core.policies.token_prefill import PrefillFiller, PrefillPlan
from neustream.core.policy import Decision, View
from neustream.core.reasons import due, span
from neustream.core.steps import Step
from neustream.core.types import TICK

SAFE = 3.0
"""Times the median error of predictions that is kept as slack: nearly all steps are within it."""
VAIN = 0.95
"""Prefill and decode are mixed only if that takes less than this share of the two separately."""
CATCH = 0.25
"""Share of the outputs ahead within which `steady` brings a generation back to its pace."""


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
        together: seconds of a decode of all that are alive.
        tight: when the next output of some jobs is due, for the sake of later ones.
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
    together: float = 0.0
    tight: dict[Job, float] = field(default_factory=dict)

    def keep(self) -> None:
        """Sort out who can still be on time."""
        model = self.model
        self.margin = 1 + self.rule.margin + SAFE * model.steps.error
        least = model.seconds(Step(decodes=1, context=1.0))
        self._whole_generations(least)
        if self.rule.steady:
            self._steady(least)
        for job in model.decodes:
            self._sort_decode(job, least)
        for job in model.prefills:
            self._sort_prefill(job)
        served = self.alive or self.broken or self.waiting
        if self.drop and model.steps.learns and not served:
            self._try_one()
        self.alive.sort(key=self.due)
        self.waiting.sort(key=self._rank)
        self.together = self._decode(self.alive) if self.alive else 0.0

    def _sort_decode(self, job: Job, least: float) -> None:
        """A decode is alive if its next output can be in time."""
        if job.late or self._time(job) < least - TICK:
            self.broken.append(job)
        else:
            self.alive.append(job)

    def _sort_prefill(self, job: Job) -> None:
        """A prompt waits if it can be in time, is kept if it has outputs, and else dropped."""
        need = self.model.speed * job.next_output_s
        time = self._time(job)
        if time >= need - TICK and not job.late:
            self.waiting.append(job)
        elif job.late or job.call_outputs:
            self.broken.append(job)
        else:
            what = "next output"
            if job in self.tight:
                what += ", for all to be in time,"
            self.drop[job] = f"hopeless: its {what} needs {span(need)}, {due(time)}"

    def _rank(self, job: Job) -> tuple[bool, bool, float]:
        """Prompts under way first, then those with a deadline, then the shortest by weight."""
        return not has_progress(job), self.due(job) == math.inf, job.size / job.weight

    def _try_one(self) -> None:
        """Keep the job with the most slack of those that a learnt latency calls hopeless.

        The device is idle. What was learnt may be wrong, and only steps that run correct it.
        """
        hopes = [job for job in self.drop if self.due(job) > self.view.now]
        if hopes:
            best = max(hopes, key=lambda job: self.due(job) - self.model.speed * job.next_output_s)
            del self.drop[best]
            self.waiting.append(best)

    def due(self, job: Job) -> float:
        """When its next output is due."""
        return self.tight.get(job, job.due_next)

    def _time(self, job: Job) -> float:
        """Seconds until its next output is due."""
        return self.due(job) - self.view.now

    def _steady(self, least: float) -> None:
        """Tighten deadlines so that outputs come at their TPOT, where they came early."""
        model, label = self.model, f"{self.model.label}.decode"
        if not model.decodes:
            return
        step = self._decode(model.decodes)
        lengths = self.view.lengths.get(model.label)
        for job in model.decodes:
            gain = job.slo.step - step
            if not 0 < gain < math.inf:
                gain = 0.0
            ahead = float(job.calls_left.get(label, 0))
            if lengths is not None:
                ahead = min(ahead, lengths.median(job.call_outputs))
            due = job.first_at + job.call_outputs * job.slo.step + gain * ahead * CATCH
            if self.view.now + least <= due < self.due(job):
                self.tight[job] = due

    def _whole_generations(self, least: float) -> None:
        """Deadlines of next outputs that leave time for the rest, where a total was promised."""
        for job in (*self.model.decodes, *self.model.prefills):
            if job.due < math.inf:
                rest = self._outputs_behind(job)
                self.tight[job] = min(job.due_next, job.due - rest * least)

    def _outputs_behind(self, job: Job) -> float:
        """Outputs that usually follow the next one; 0 while no generation was seen to end."""
        lengths = self.view.lengths.get(self.model.label)
        if lengths is None:
            return 0.0
        seen = lengths.median(job.call_outputs)
        if seen == math.inf:
            return 0.0
        most = job.calls_left.get(f"{self.model.label}.decode", 0)
        if at_decode(job):
            most -= 1
        return min(float(max(most, 0)), seen)

    def seconds(self, step: Step) -> float:
        return self.margin * self.model.seconds(step)

    def _decode(self, jobs: Sequence[Job]) -> float:
        return self.seconds(Step(decodes=len(jobs), context=sum([job.size for job in jobs])))

    # -- prompts ----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Choose the prompts of this step, and the decodes that they run beside."""
        if not self.waiting:
            return
        filler = PrefillFiller(self)
        best = filler.fill(self.alive)
        if self.alive:
            best = self._best(filler, best)
        if best.chosen:
            self.part = best

    def _best(self, filler: PrefillFiller, beside_all: PrefillPlan) -> PrefillPlan:
        """Prompts beside all decodes, beside the urgent ones or alone: what takes most of them in.

        At equality prompts run alone where they cannot wait for a longer step, or save nothing.
        """
        best = beside_all
        urgent = self._urgent()
        if urgent is not None and len(best.chosen) < len(self.waiting):
            beside_urgent = filler.fill(urgent)
            if beside_urgent.worth > best.worth:
                best = beside_urgent
        alone = filler.fill([])
        if alone.worth == best.worth and beside_all.chosen:
            return alone if self._hurried(beside_all) or self._in_vain(beside_all) else best
        return alone if alone.worth > best.worth else best

    def _urgent(self) -> list[Job] | None:
        """Decodes that would be late after the longest step that the most urgent one allows.

        None if those are all.
        """
        until = self.due(self.alive[0]) + self.together
        urgent = [job for job in self.alive if self.due(job) < until]
        return urgent if len(urgent) < len(self.alive) else None

    def _hurried(self, part: PrefillPlan) -> bool:
        """Whether who comes during this step is likely to be late for it."""
        return patience(self.view.recent, self.model) < self.seconds(part.step())

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
                sizes = {self.waiting[0]: self._whole(self.waiting[0])}
                jobs = self.waiting[:1]
                self.part = PrefillPlan([], chosen=dict(sizes))
        if self.broken:
            self._late(jobs, sizes)
        return Decision(jobs, self.drop, sizes=sizes)

    def _may_hope(self) -> bool:
        """Whether the first prompt may run although it does not fit, since nobody else does.

        Not beside others who were promised something, unless its own promise has begun.
        """
        if not self.waiting:
            return False
        return not self.view.reserved or has_progress(self.waiting[0])

    def _whole(self, job: Job) -> float:
        """As much of a prompt as a step may have."""
        return min(job.size, float(self.view.pool.step_tokens))

    def _pause(self) -> float | None:
        """When the decodes go on, if until then it is better to be ready for who may come."""
        if not self.rule.pause or self.waiting or self.broken or self.view.reserved:
            return None
        if not self.alive or self.due(self.alive[0]) == math.inf:
            return None
        if patience(self.view.recent, self.model) >= self.together:
            return None
        _, size = typical(self.view.recent, f"{self.model.label}.prefill")
        reserve = self.rule.pause * self.model.seconds(Step(1, size, size * size))
        wake = self.due(self.alive[0]) - self.together - reserve
        return wake if wake > self.view.now + TICK else None

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

    def _late(self, jobs: list[Job], sizes: dict[Job, float]) -> None:
        """Add late jobs if nobody becomes late by it; drop them if others need their room."""
        part = self.part or PrefillPlan([])
        for job in part.instead:
            self.drop[job] = "shed: it cannot be in time any more, and others had no room"
        if self.part is not None and len(part.decodes) < len(self.alive):
            return
        broken = [job for job in self.broken if job not in self.drop]
        self._late_decodes(filter(at_decode, broken), part, jobs, sizes)
        for job in filterfalse(at_decode, broken):
            self._late_prompt(job, jobs, sizes)

    def _late_prompt(self, job: Job, jobs: list[Job], sizes: dict[Job, float]) -> None:
        """A late prompt runs if nothing else does, and is dropped if others wait."""
        if not jobs:
            jobs.append(job)
            sizes[job] = self._whole(job)
        elif self.waiting:
            self.drop[job] = (
                "shed: it lost its KV blocks and cannot be in time any more, and others wait"
            )

    def _late_decodes(
        self, late: Iterable[Job], part: PrefillPlan, jobs: list[Job], sizes: dict[Job, float]
    ) -> None:
        """Add late decodes as long as the step costs no deadline and nobody's slack."""
        first_due = min([self.due(job) for job in (*self.alive, *sizes)], default=math.inf)
        time = min([first_due - self.view.now, *[job.slo.step for job in self.alive]])
        time = min(time, self.view.reserved.room)
        decodes = len(jobs) - len(sizes)
        context = sum([job.size for job in jobs if job not in sizes])
        for job in late:
            decodes += 1
            context += job.size
            step = Step(len(sizes), part.tokens, part.square, decodes, context)
            if len(jobs) >= self.model.seats or (jobs and self.seconds(step) > time):
                return
            jobs.append(job)
