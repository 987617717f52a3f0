"""The account of few texts: what each expects if steps go on to take what they take now.

The account of many (`on_time.py`) looks at some twenty points ahead. That is hundreds of operations
on arrays, which take a millisecond whether there are two texts or two hundred. Where there are two
hundred, a step takes many times that. Where there are a few, of a small model, it is a good part of
one, for which all of them wait: it costs more of them than a better guess keeps. Under load others
come in the places of those that end, so steps stay as they are. Then the time that a text has is
used up after a number of steps that is one division, and its chance is that of ending before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from neustream.core.job import Job
from neustream.core.lengths import TINY, Lengths
from neustream.core.policies.coming import in_prompts
from neustream.core.policies.horizon import SPREAD
from neustream.core.policies.model_queues import at_decode
from neustream.core.policies.on_time import DOOMED, HARM
from neustream.core.policies.recent_prompts import typical
from neustream.core.policies.token_calm import ROOM, has_memory, most_tokens
from neustream.core.steps import Step

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

FEW = 16
"""Texts up to which the account is this one."""


class Few:
    """What some of those that are there expect, for one decision."""

    @classmethod
    def of(cls, plan: StepPlan) -> Few | None:
        """None if many are there, or somebody may want for memory."""
        if plan.view.reserved or len(plan.alive) + len(plan.waiting) > FEW:
            return None
        jobs = [*plan.alive, *plan.waiting, *filter(at_decode, plan.broken)]
        enough = has_memory(plan, most_tokens(plan, jobs), len(jobs))
        return cls(plan) if enough else None

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._label = f"{plan.model.label}.decode"
        self._lengths = plan.view.lengths.get(plan.model.label) or Lengths()

    @cached_property
    def _left(self) -> list[float]:
        """The share of generations that reach each number of outputs, then constant."""
        left: list[float] = self._lengths.curve(self._plan.most()).tolist()
        return left

    @cached_property
    def _prompt_s(self) -> float:
        """Seconds by which prompts of those who come make a step longer."""
        plan, decodes = self._plan, self._plan.followed()
        if decodes is None:
            return 0.0
        return in_prompts(plan.model, self._lengths, plan.most(), decodes)

    def hopeful(self) -> bool:
        """Whether each of those that run has some chance for certain: nobody is doomed.

        If all of its steps take as long as the dearest one of all that run, or of others in their
        places, it has no more than that.
        """
        plan = self._plan
        _, prompt = typical(plan.view, f"{plan.model.label}.prefill")
        others = len(plan.promised) * (prompt + plan.most())
        tokens = max(most_tokens(plan, plan.promised), others)
        step = ROOM * self._step(len(plan.promised), tokens)
        over = plan.view.now + step
        return all(
            job.due_next >= over and self.chance(job, over, step) >= DOOMED for job in plan.promised
        )

    def costs(self, late: Sequence[Job]) -> bool:
        """Whether running `late` ones too would cost some of the weight expected on time."""
        plan, jobs = self._plan, self._plan.promised
        if not jobs or not late:
            return False
        now, context = plan.view.now, plan.read_by(jobs)
        alone = self._step(len(jobs), context)
        both = self._step(len(jobs) + len(late), context + plan.read_by(late))
        lost = self.on_time(jobs, now + alone, alone) - self.on_time(jobs, now + both, both)
        return lost * len(jobs) > HARM * sum([job.weight for job in jobs])

    def _step(self, decodes: int, context: float) -> float:
        """Seconds of a step of decodes, at least one."""
        plan, step = self._plan, Step(decodes=max(decodes, 1), context=max(context, 1.0))
        return (1 + plan.rule.margin) * plan.model.seconds(step)

    def with_some(self, new: Sequence[Job], seconds: float) -> tuple[float, float]:
        """The weight that is expected on time with some newcomers, and the chance of the last one.

        Who is promised its first output alone slows nobody later. `seconds`: until those that run
        have their next outputs, with the newcomers' prompts.
        """
        plan = self._plan
        stay = [job for job in new if min(job.slo.step, job.due) < math.inf]
        context = plan.read_by(plan.promised)
        context += sum([plan.sizes[job] + job.computed for job in stay])
        step = self._step(len(plan.promised) + len(stay), context)
        over = plan.view.now + seconds
        weight = self.on_time([*plan.promised, *new], over, step)
        return weight, self.chance(new[-1], over, step) if new else 1.0

    def on_time(self, jobs: Sequence[Job], over: float, step: float) -> float:
        """The weight of some jobs that is expected on time (see `chance`)."""
        return sum([job.weight * self.chance(job, over, step) for job in jobs])

    def chance(self, job: Job, over: float, step: float) -> float:
        """That a job ends while it is in time, with its next output at the instant `over`, which is
        not asked for, and the others a `step` apart."""
        pace = job.slo.step
        steps = (job.due_next - over) / (step - pace) if pace < step else math.inf
        if job.leg_latest < math.inf:
            steps = min(steps, (job.leg_latest - over) / (step + self._prompt_s))
        most = max(job.calls_here(self._label), 1)
        if steps >= (1 + SPREAD) * most:
            return 1.0
        left, made = self._left, job.call_outputs
        last = len(left) - 1
        going = left[min(int(made + max(steps, 0.0)), last)]
        unsure = min(0.5 + (most - steps) / (2 * SPREAD * most), 1.0)
        return 1.0 - unsure * min(going / max(left[min(made, last)], TINY), 1.0)
