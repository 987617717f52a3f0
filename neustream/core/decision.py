"""Checks of decisions. A fault is a PolicyError that names the policy and the job."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence

from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.policy import Policy, View
from neustream.errors import PolicyError


def named(policy: Policy) -> str:
    """How errors call a policy."""
    return f"policy {type(policy).__name__!r}"


def check_drops(policy: Policy, drop: Iterable[Job], live: Mapping[str, Job]) -> None:
    """Only live jobs that wait can be dropped."""
    for job in drop:
        if not _runnable(job, live):
            raise PolicyError(f"{named(policy)} dropped {job!r}, which is not waiting")


def check_apart(policy: Policy, jobs: Iterable[Job], drop: Container[Job]) -> None:
    """Nobody can both run and be dropped."""
    for job in jobs:
        if job in drop:
            raise PolicyError(f"{named(policy)} chose {job!r} and dropped it")


def step_label(policy: Policy, jobs: Sequence[Job], view: View, live: Mapping[str, Job]) -> str:
    """The name of the step of `jobs`: their stage, or the model of several stages that share it."""
    unfit = [job for job in jobs if job.status != "waiting" or live.get(job.id) is not job]
    counts = _by_stage(jobs)
    for stage in counts:
        if stage.name not in view.pool.stages:
            unfit += _at(stage, jobs)
    if unfit:
        raise PolicyError(
            f"{named(policy)} chose {unfit[0]!r}, which is not runnable in pool {view.pool.name!r}"
        )
    if len(set(jobs)) != len(jobs):
        raise PolicyError(f"{named(policy)} chose a job twice for one step")
    _check_limits(policy, counts, view)
    if len(counts) == 1:
        return next(iter(counts)).name
    return _common_model(policy, list(counts))


def _at(stage: Stage, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.stage is stage]


def _by_stage(jobs: Sequence[Job]) -> dict[Stage, int]:
    """How many jobs are at each stage; nearly always all are at one. Ended jobs are at none."""
    stages = [job.stage for job in jobs]
    first = stages[0]
    if first is not None and stages.count(first) == len(stages):
        return {first: len(stages)}
    counts: dict[Stage, int] = {}
    for stage in stages:
        if stage is not None:
            counts[stage] = counts.get(stage, 0) + 1
    return counts


def _common_model(policy: Policy, stages: Sequence[Stage]) -> str:
    """The model that stages of one step belong to; PolicyError if they cannot share a step."""
    models = {stage.model for stage in stages}
    if len(models) == 1 and "" not in models:
        return models.pop()
    names = [stage.name for stage in stages]
    raise PolicyError(f"{named(policy)} mixed stages that cannot share a step: {names}")


def _runnable(job: Job, live: Mapping[str, Job]) -> bool:
    return job.status == "waiting" and live.get(job.id) is job


def _check_limits(policy: Policy, counts: Mapping[Stage, int], view: View) -> None:
    for stage, count in counts.items():
        most = min(stage.max_batch, view.profiles[stage.name].max_batch)
        if count > most:
            raise PolicyError(
                f"{named(policy)} chose {count} jobs for a step of {stage.name!r} "
                f"(max_batch {most})"
            )


def step_sizes(
    policy: Policy, jobs: Sequence[Job], sizes: Mapping[Job, float], label: str
) -> tuple[float, ...]:
    """How much of its step each job gets; all of it where the step cannot be parted."""
    first = jobs[0].stage
    if first is not None and first.size is None and not first.model:  # all are at one stage
        return (0.0,) * len(jobs)
    if not sizes:
        return tuple([job.size for job in jobs])
    parts = tuple([part_of(sizes, job) for job in jobs])
    for job, part in zip(jobs, parts, strict=True):
        if part <= 0 and _is_sized(job):
            raise PolicyError(
                f"{named(policy)} gave a job of stage {label!r} a share of 0 of its step"
            )
    return parts


def _is_sized(job: Job) -> bool:
    return job.stage is not None and job.stage.size is not None


def part_of(sizes: Mapping[Job, float], job: Job) -> float:
    """What a decision gives a job of its step."""
    whole = job.size
    if job.stage is None or job.stage.phase == "decode":
        return whole
    return min(sizes.get(job, whole), whole)


def check_wake(policy: Policy, wake_at: float, now: float) -> None:
    """A policy that waits must name an instant that is yet to come."""
    if not now < wake_at < math.inf:
        raise PolicyError(
            f"{named(policy)} asked to be woken at {wake_at}, which is not after {now}"
        )


def check_progress(policy: Policy, view: View) -> None:
    """PolicyError if jobs would wait for ever: nothing runs, and the policy names no instant."""
    may_run = (-1, view.worker)  # a job of another worker waits for that one to be asked
    jobs = [job for job in view.jobs if job.worker in may_run]
    waiting = sum([job.status == "waiting" for job in jobs])
    if waiting:
        raise PolicyError(
            f"{named(policy)} left {waiting} job(s) of pool {view.pool.name!r} waiting for ever"
        )
