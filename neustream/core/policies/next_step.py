"""Which step of a `LineUp` runs, once it is known who is promised."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.batching import largest_in_time
from neustream.core.policies.feasibility import Line
from neustream.core.policies.line_up import LineUp, seconds_of_step
from neustream.core.policy import View
from neustream.core.types import TICK

AMPLE = 2.0
"""Times the latency of the most efficient batch that a job has for each step if it may be encoded
later."""
WORTH_WAITING = 0.05
"""Share of a job's charge that an encoding must save for it to wait for one more."""


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
    """Whether a batch that could be larger stays in time if a slow step of a loop goes first."""
    stage = batch[0].stage
    assert stage is not None
    limit = view.limit(stage.name)
    if len(batch) >= limit or len(batch) < len(jobs.ending[stage.name]):
        return False
    steps = [
        line.speed * line.curve.seconds[min(promised, line.curve.limit)]
        for _, line in jobs.plan.parts
    ]
    steps += [seconds_of_step(view, name, queue) for name, queue in jobs.entering.items()]
    larger = min(len(batch) + 1, limit)
    after = view.speed.get(stage.name, 1.0) * view.work(batch[0], larger, {stage.name: 1})
    others = sum(
        seconds_of_step(view, name, queue)
        for name, queue in jobs.ending.items()
        if name != stage.name
    )
    slow = max([line.spread.slow for _, line in jobs.plan.parts])
    over = view.now + slow * (max(steps) + others + after)
    return over + TICK < min(job.deadline for job in batch)


def steps_come_first(jobs: LineUp, promised: Sequence[int]) -> bool:
    """Whether a loop's step is due before all that comes behind loops.

    One line's jobs run on while decodes are short; with several the first deadline decides.
    """
    if isinstance(jobs.plan, Line) or not promised:
        return False
    behind = min([job.deadline for queue in jobs.ending.values() for job in queue])
    return min([jobs.jobs[index].deadline for index in promised]) < behind


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


def can_encode_later(
    view: View, jobs: LineUp, promised: Sequence[int], batch: Sequence[Job]
) -> list[int]:
    """Those of `promised` that are in the loop, if a step of theirs may go before an encoding.

    It may while the encoding could grow by one job more and that would save a good part of what its
    jobs cost, and while these have time: after that step still `AMPLE` times the latency of the
    most efficient batch for each of their steps, and all promised ones are on time.
    """
    plan = jobs.plan
    stage = batch[0].stage
    assert stage is not None
    if len(batch) >= view.limit(stage.name) or not isinstance(plan, Line):
        return []
    waiting = set(batch)
    encoded = [index for index in promised if jobs.jobs[index] in waiting]
    inside = [index for index in promised if not jobs.in_front(index)]
    if not inside or _saved(view, batch, stage.name) < WORTH_WAITING * _mean_charge(jobs, encoded):
        return []
    step = plan.step(len(inside))
    over = view.now + step + jobs.entries(promised)
    pace = min([(plan.due[index] - over) / plan.left[index] for index in encoded])
    if pace <= AMPLE * plan.speed * plan.curve.enough:
        return []
    return inside if plan.fits(promised, jobs.entries(promised) + step) else []


def _saved(view: View, batch: Sequence[Job], stage: str) -> float:
    """Seconds that one job more in a batch costs less than it does alone."""
    counts = (1, len(batch), len(batch) + 1)
    alone, now, larger = [view.work(batch[0], count, {stage: 1}) for count in counts]
    return alone - (larger - now)


def _mean_charge(jobs: LineUp, places: Sequence[int]) -> float:
    """Mean seconds of charge of some jobs."""
    charges = [jobs.jobs[index].weight / jobs.density[index] for index in places]
    return sum(charges) / len(charges)


def loop_step(jobs: LineUp, promised: Sequence[int]) -> list[Job]:
    """The next step of the line with the first deadline, the jobs of the least laxity in it."""
    plan = jobs.plan
    if isinstance(plan, Line):
        size = plan.batch(promised)
        return [jobs.jobs[index] for index in _least_laxity(plan, promised, size)]
    _, first, line, places = min(
        [
            (min([line.due[index] + line.behind[index] for index in places]), first, line, places)
            for (first, _), (line, places) in zip(plan.parts, plan.split(promised), strict=True)
            if places
        ],
        key=itemgetter(0),
    )
    size = line.curve.best[min(len(places), line.curve.limit)]
    return [jobs.jobs[first + index] for index in _least_laxity(line, places, size)]


def running(jobs: LineUp, promised: Sequence[int]) -> list[bool]:
    """Of each job whether it may run next: it has no more laxity than one of the next loop step.

    Or it is in front of its loop. Of several models all may run.
    """
    plan = jobs.plan
    if not isinstance(plan, Line):
        return [True] * len(jobs.jobs)
    size = plan.batch(promised)
    columns = plan.arrays
    laxity = columns.due - columns.left * (plan.speed * plan.curve.seconds[size])
    most = np.partition(laxity[list(promised)], size - 1)[size - 1]
    runs: list[bool] = (laxity <= most).tolist()
    if jobs.entering:
        return [near or jobs.in_front(index) for index, near in enumerate(runs)]
    return runs


def _least_laxity(line: Line, places: Sequence[int], size: int) -> list[int]:
    """The `size` jobs of one line that have the least laxity in batches of so many."""
    due, left = line.due, line.left
    step = line.speed * line.curve.seconds[size]
    laxity = {index: due[index] - left[index] * step for index in places}
    return sorted(places, key=laxity.__getitem__)[:size]
