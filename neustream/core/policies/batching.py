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
    for size in range(min(len(jobs), view.limit(stage)), 1, -1):
        seated = _seated(view, stage, size, running)
        if seated is None or len(seated) > size:
            continue
        batch = _filled(view, size, seated, jobs)
        if len(batch) == size:
            return batch
    return list(jobs[:1])


def _seated(view: View, stage: str, size: int, running: Sequence[Job]) -> list[Job] | None:
    """Those of `running` that would be late after a step without them; None if one is even so."""
    now = view.now - TICK
    seated = []
    for job in running:
        start = latest_start(view, job, size)
        if start - view.work(job, size, {stage: 1}) < now:
            if start < now:
                return None
            seated.append(job)
    return seated


def _filled(view: View, size: int, seated: list[Job], jobs: Sequence[Job]) -> list[Job]:
    """`seated` and as many of `jobs`, in order, that are in time in batches of `size`."""
    now = view.now - TICK
    batch = list(seated)
    taken = set(seated)
    for job in jobs:
        if len(batch) == size:
            break
        if job not in taken and latest_start(view, job, size) >= now:
            batch.append(job)
    return batch


def continued(view: View) -> list[Job]:
    """The next step of the whole-request batch that `view.worker` is in the middle of, if any.

    The batch moves through its graph stage by stage: members that are ahead wait for the others,
    so that results come together, as they do from a pipeline that was called with all of them.
    Members of another graph go on behind those of the graph that came first.
    """
    here = [job for job in view.jobs if job.worker == view.worker]
    if not here:
        return []
    graph = min(here, key=lambda job: job.arrival).request.graph
    members = [job for job in here if job.request.graph is graph]
    position = graph.position
    stages = {_stage_name(job) for job in members}
    stage = min(stages, key=position.__getitem__)
    return [job for job in members if _stage_name(job) == stage][: view.limit(stage)]


def _stage_name(job: Job) -> str:
    assert job.stage is not None
    return job.stage.name
