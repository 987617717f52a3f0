"""Which step of a `LineUp` runs, once it is known who is promised."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neustream.core.job import Job
from neustream.core.policies.batching import largest_in_time
from neustream.core.policies.feasibility import Lines
from neustream.core.policies.line_up import LineUp, seconds_of_step
from neustream.core.policy import View
from neustream.core.types import TICK


def ending(view: View, jobs: LineUp) -> list[Job]:
    """A batch of a stage behind all loops, that of the job that is due first."""
    if not jobs.ending:
        return []
    heads = [min(queue, key=_deadline) for queue in jobs.ending.values()]
    first = min(heads, key=_deadline)
    assert first.stage is not None
    stage = first.stage.name
    return largest_in_time(view, stage, sorted(jobs.ending[stage], key=_deadline))


def _deadline(job: Job) -> float:
    return job.deadline


def can_wait(view: View, jobs: LineUp, batch: Sequence[Job], promised: int) -> bool:
    """Whether a batch that could be larger stays in time if a step of a loop goes first."""
    stage = batch[0].stage
    assert stage is not None
    limit = view.limit(stage.name)
    if len(batch) >= limit or len(batch) < len(jobs.ending[stage.name]):
        return False
    plan = jobs.plan
    steps = [
        speed * curve.seconds[min(promised, curve.limit)]
        for curve, speed in zip(plan.curves, plan.speeds, strict=True)
    ]
    steps += [seconds_of_step(view, name, queue) for name, queue in jobs.entering.items()]
    larger = min(len(batch) + 1, limit)
    after = view.speed.get(stage.name, 1.0) * view.work(batch[0], larger, {stage.name: 1})
    others = sum(
        seconds_of_step(view, name, queue)
        for name, queue in jobs.ending.items()
        if name != stage.name
    )
    over = view.now + max(steps) + others + after
    return over + TICK < min(job.deadline for job in batch)


def entering(view: View, jobs: LineUp, promised: Sequence[int]) -> list[Job]:
    """The promised jobs at the first stage in front of a loop that has any."""
    for stage in jobs.entering:
        batch = []
        for index in promised:
            job = jobs.jobs[index]
            if job.stage is not None and job.stage.name == stage:
                batch.append(job)
        if batch:
            return batch[: view.limit(stage)]
    return []


def loop_step(jobs: LineUp, promised: Sequence[int]) -> list[Job]:
    """The next step of the line with the least laxity, the jobs of the least laxity in it."""
    plan = jobs.plan
    due, left = plan.due, plan.left
    seats = 0 if plan.in_turns(promised) else plan.seats(promised)
    batch: list[int] = []
    least = math.inf
    for line, members in _members(plan, promised).items():
        curve = plan.curves[line]
        size = seats or curve.best[min(len(members), curve.limit)]
        step = plan.speeds[line] * curve.seconds[size]
        laxity = {index: due[index] - left[index] * step for index in members}
        ranked = sorted(members, key=laxity.__getitem__)
        if not batch or laxity[ranked[0]] < least:
            least = laxity[ranked[0]]
            batch = ranked[:size]
    return [jobs.jobs[index] for index in batch]


def _members(plan: Lines, places: Sequence[int]) -> dict[int, Sequence[int]]:
    """`places` by line."""
    if len(plan.curves) == 1:
        return {0: places}
    members: dict[int, list[int]] = {}
    for place in places:
        members.setdefault(plan.line[place], []).append(place)
    return {line: members[line] for line in sorted(members)}
