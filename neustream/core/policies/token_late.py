"""What becomes of generations that cannot be on time any more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse
from typing import TYPE_CHECKING

from neustream.core.job import Job
from neustream.core.policies.model_queues import at_decode
from neustream.core.policies.prefill_plan import PrefillPlan
from neustream.core.steps import Step

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan


def take_late(plan: StepPlan, jobs: list[Job], sizes: dict[Job, float]) -> None:
    """Add late jobs to a step if nobody becomes late by it; drop them if others need their room."""
    part = plan.part or PrefillPlan([])
    for job in part.instead:
        plan.drop[job] = "shed: it cannot be in time any more, and others had no room"
    if plan.part is not None and len(part.decodes) < len(plan.alive):
        return
    broken = [job for job in plan.broken if job not in plan.drop]
    decodes = list(filter(at_decode, broken))
    riders = _riders(plan, decodes, jobs, sizes)
    if riders and not _cost(plan, decodes):
        jobs += riders
    for job in filterfalse(at_decode, broken):
        _prompt(plan, job, jobs, sizes)


def _cost(plan: StepPlan, decodes: Sequence[Job]) -> bool:
    """Whether late decodes cost some of what is expected on time."""
    if plan.calm or plan.view.reserved:
        return False
    return (plan.outlook if plan.few is None else plan.few).costs(decodes)


def _prompt(plan: StepPlan, job: Job, jobs: list[Job], sizes: dict[Job, float]) -> None:
    """A late prompt runs if nothing else does, and is dropped if others wait."""
    if not jobs:
        jobs.append(job)
        sizes[job] = plan.whole(job)
    elif plan.waiting:
        plan.drop[job] = (
            "shed: it lost its KV blocks and cannot be in time any more, and others wait"
        )


def _riders(
    plan: StepPlan, late: Iterable[Job], jobs: Sequence[Job], sizes: Mapping[Job, float]
) -> list[Job]:
    """As many late decodes, from the front, as cost the step no deadline and nobody's slack."""
    part = plan.part or PrefillPlan([])
    first_due = min([plan.due(job) for job in (*plan.alive, *sizes)], default=math.inf)
    time = min([first_due - plan.view.now, *[job.slo.step for job in plan.alive]])
    time = min(time, plan.view.reserved.room)
    decodes = len(jobs) - len(sizes)
    context = sum([job.size for job in jobs if job not in sizes])
    riders: list[Job] = []
    for job in late:
        decodes += 1
        context += job.size
        step = Step(len(sizes), part.tokens, part.square, decodes, context)
        count = len(jobs) + len(riders)
        if count >= plan.model.seats or (count and plan.seconds(step) > time):
            break
        riders.append(job)
    return riders
