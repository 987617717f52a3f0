"""Mechanics that several policies share: batches in a given order, in time, and kept together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neustream.core.job import Job
from neustream.core.policy import Decision, View
from neustream.core.types import TICK


def in_order(view: View, key: Callable[[Job], float], drop_hopeless: bool) -> Decision:
    """Fill a step of the next stage with the jobs of the smallest `key`, up to its limit."""
    drop = view.hopeless() if drop_hopeless else {}
    stage = view.first_stage(key, without=drop)
    if stage is None:
        return Decision(drop=drop)
    jobs = view.queues[stage]
    if drop:
        jobs = [job for job in jobs if job not in drop]
    return Decision(sorted(jobs, key=key)[: view.limit(stage)], drop)


def latest_start(view: View, job: Job, batch: int) -> float:
    """The instant at which `job` must go on, were each of its steps run in a batch of `batch`.

    Its next output is taken to be slowed down by as much as the whole of what it has left.
    """
    work = view.work(job, batch)
    if job.due_next >= job.due:
        return job.due - work
    return min(job.due - work, job.due_next - job.next_output_s * work / job.remaining_s)


def largest_in_time(
    view: View, stage: str, jobs: Sequence[Job], running: Sequence[Job] = ()
) -> list[Job]:
    """The largest batch of `stage` that keeps the promises of its members, taken in the order of
    `jobs`.

    They keep them if each of their steps left, run in a batch as large, ends in time. Those of
    `running` that would be late after one such step without them are members first of all; a size
    at which even then they would be late is too large. If nobody is in time, the first of `jobs`.
    """
    now = view.now - TICK
    for size in range(min(len(jobs), view.limit(stage)), 1, -1):
        starts = {job: latest_start(view, job, size) for job in running}
        batch = [
            job for job, start in starts.items() if start - view.work(job, size, {stage: 1}) < now
        ]
        if len(batch) > size or any(starts[job] < now for job in batch):
            continue
        seated = set(batch)
        for job in jobs:
            if len(batch) == size:
                break
            if job not in seated and latest_start(view, job, size) >= now:
                batch.append(job)
        if len(batch) == size:
            return batch
    return list(jobs[:1])


def continued(view: View) -> list[Job]:
    """The next step of the whole-request batch that `view.worker` is in the middle of, if any.

    The batch moves through its graph stage by stage: members that are ahead wait for the others,
    so that results come together, as they do from a pipeline that was called with all of them.
    """
    mine = [job for job in view.jobs if job.worker == view.worker]
    if not mine:
        return []
    position = mine[0].request.graph.position
    stage = min((job.stage.name for job in mine if job.stage is not None), key=position.__getitem__)
    return [job for job in mine if job.stage is not None and job.stage.name == stage][
        : view.limit(stage)
    ]
