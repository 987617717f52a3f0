"""Whether all texts that are there are on time for certain: then nobody's chances are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neustream.core.job import Job
from neustream.core.policies.model_queues import at_decode
from neustream.core.steps import Step

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

ROOM = 1.1
"""Times the dearest step: measured tables go up and down a little where they should rise."""
MANY = 32
"""Waiting prompts beyond which it is not asked."""


def calm(plan: StepPlan) -> bool:
    """Whether all can be taken in at once and go on to their maxima, late ones too, and everybody
    who is promised something is on time, if all steps take as long as the dearest one of them.

    The coming step is no part of it: who fills that looks at the next output of each. What the
    chances of each would say is known then: all are 1, whoever rides along. Who comes later is not
    counted (`coming.py`), even where it reads more than those whose places it takes: it is weighed
    when it comes. So a decision at light load costs a few sums.
    """
    waiting, model = plan.waiting, plan.model
    if plan.view.reserved or len(waiting) > MANY:
        return False
    jobs = [*plan.alive, *waiting, *filter(at_decode, plan.broken)]
    if not jobs or len(jobs) > model.seats:
        return False
    label = f"{model.label}.decode"
    outputs = [max(job.calls_here(label), 1) for job in jobs]
    tokens = most_tokens(plan, jobs)
    if not has_memory(plan, tokens, len(jobs)):
        return False
    dearest = model.seconds(Step(decodes=len(jobs), context=tokens))
    step = ROOM * (1 + plan.rule.margin) * dearest
    if plan.alive and plan.view.now + step > plan.due(plan.alive[0]):
        return False
    promised = list(zip((*plan.alive, *waiting), outputs, strict=False))

    def all_on_time(ahead: float) -> bool:
        return all(_on_time(job, plan.dues[job], ahead, step, most) for job, most in promised)

    if not all_on_time(plan.view.now):  # whatever prompts take
        return False
    return all_on_time(plan.view.now + sum([max(plan.prompt_seconds(job), 0.0) for job in waiting]))


def most_tokens(plan: StepPlan, jobs: Sequence[Job]) -> float:
    """Tokens that some jobs read once each has got to its maximum."""
    label = f"{plan.model.label}.decode"
    outputs = sum([max(job.calls_here(label), 1) for job in jobs])
    return sum([plan.sizes[job] + job.computed for job in jobs]) + outputs


def has_memory(plan: StepPlan, tokens: float, jobs: int) -> bool:
    """Whether nobody lost its memory, and so many jobs with so many tokens have enough."""
    if any(job.call_outputs for job in plan.waiting):
        return False
    memory = plan.model.memory
    if memory is None:
        return True
    return tokens + jobs * memory.block_size <= memory.capacity * plan.rule.memory


def _on_time(job: Job, due: float, ahead: float, step: float, most: int) -> bool:
    """Whether the outputs of a job behind its next one are, if steps begin at the instant `ahead`,
    and each takes a `step`; and its last one of `most`."""
    if ahead + most * step > job.leg_latest:
        return False
    pace = job.slo.step
    return due == math.inf or (step <= pace and ahead + 2 * step <= due + pace)
