"""Mechanics that several policies share: batches in a given order, and batches kept together."""

from __future__ import annotations

from collections.abc import Callable

from neustream.core.policy import Decision, View
from neustream.core.types import Job


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
    return [job for job in mine if job.stage is not None and job.stage.name == stage][: view.limit(stage)]
