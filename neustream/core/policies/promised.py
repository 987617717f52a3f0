"""What the jobs that a rule has begun still need of the device, and by when.

Others may promise what that leaves (`View.reserved`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from neustream.core.job import Job
from neustream.core.policies.fitting import committed, kept
from neustream.core.policies.horizon import FOREVER, Horizon, points_to_end
from neustream.core.policies.line_up import LineUp, line_up
from neustream.core.policies.model_queues import ModelQueues, has_progress, one_model
from neustream.core.policies.token_noise import safe
from neustream.core.policy import View
from neustream.core.reserved import Reserved, by_deadlines, by_pace
from neustream.core.types import TICK


def promised_steps(view: View) -> Reserved:
    """What jobs at stages need that have run: their loops, in the batches that they fit in.

    Those that cannot be on time, each alone or all together, need nothing.
    """
    jobs = line_up(view, view.hopeless(), lambda: 0.0)  # those who wait are promised nothing
    demand = []
    if jobs.ending and len(jobs.plan.parts) <= 1:
        demand = _endings(view, jobs)
    step = 0.0
    promised = kept(jobs, committed(jobs)) if jobs.jobs else []
    if promised:
        ends = jobs.plan.demand(promised, jobs.entries(promised))
        demand += [(due - view.now, end - view.now) for due, end in ends]
        step = max([line.step(len(promised)) for _, line in jobs.plan.parts])
    return by_deadlines(demand, step)


def _endings(view: View, jobs: LineUp) -> list[tuple[float, float]]:
    """What jobs behind all loops need: one step of each stage."""
    needed = jobs.plan.start - view.now
    due = [job.deadline - view.now for queue in jobs.ending.values() for job in queue]
    return [(min(due), needed)] if min(due) < math.inf else []


def promised_tokens(view: View) -> Reserved:
    """What generations need that have begun: decodes at their pace until they are expected to end.

    And the rest of prompts that are under way. Those that are late already need nothing.
    """
    model = one_model(view)
    decodes = [job for job in model.decodes if _in_time(view, job)]
    prompts = [job for job in model.prefills if has_progress(job) and _in_time(view, job)]
    if not decodes and not prompts:
        return Reserved()
    label = f"{model.label}.decode"
    most = max([job.calls_left.get(label, 1) for job in (*decodes, *prompts)])
    error = safe(model.steps.error, len(decodes))
    horizon = Horizon(model, points_to_end(most), margin=error)
    load = horizon.rows(decodes, running=True).total()
    load = load + horizon.rows(prompts, running=False).total()
    points = [point for point in horizon.demand(load) if point[0] < FOREVER / 2]
    step = points[0][1] if points else 0.0
    return by_pace(points, step) + _rest_of_prompts(view, model, prompts)


def _in_time(view: View, job: Job) -> bool:
    """Whether its next output can be in time."""
    return not job.late and job.due_next - job.next_output_s >= view.now - TICK


def _rest_of_prompts(view: View, model: ModelQueues, prompts: Sequence[Job]) -> Reserved:
    needed = 0.0
    demand = []
    for job in sorted(prompts, key=lambda job: job.due_next):
        needed += model.prompt_speed * job.next_output_s
        if job.due_next < math.inf:
            demand.append((job.due_next - view.now, needed))
    return by_deadlines(demand)
