"""Requests without a promise beside promised ones: a stated rate, and rides that cost nothing.

While both kinds are there, promised jobs are decided as if the others were absent. Jobs without a
promise then run

* at their rate: while they had less than `share` of the device's time (`View.unpromised`) they
  have a claim, and the next step serves them. They ride along in the promised step where it has
  room, else the step is their own.
* for free: in a step that they do not make longer by more than `FREE`; in one that they do, if
  every promised job is in time even so with half of its time left; and while the device would
  idle.

`background_tokens.py` has the same for steps of a language model. With no promised job there, they
run as under `FCFS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.policies.background_tokens import (
    FREE,
    SPARE,
    Rate,
    alone,
    beside_decodes,
    within,
)
from neustream.core.policies.fcfs import FCFS
from neustream.core.policies.line_up import line_up
from neustream.core.policies.model_queues import model_queues
from neustream.core.policy import Decision, View
from neustream.core.step_times import step_latency
from neustream.core.steps import PhaseProfile
from neustream.core.types import TICK

_AS_THEY_COME = FCFS(drop_hopeless=False)
_arrival = attrgetter("arrival")


def beside(view: View, share: float, decide: Callable[[View], Decision]) -> Decision:
    """The decision of `decide` for promised jobs, with jobs without a promise at their rate.

    Args:
        share: of the device's time that jobs without a promise get at least.
        decide: the rule for promised jobs.
    """
    if _all_are_promised(view):
        return decide(view)
    promised, others = _parted(view)
    if not promised.queues:
        return _AS_THEY_COME.decide(others)
    if not others.queues:  # they are other workers'
        return decide(promised)
    decision = replace(decide(_without(promised, others, share)), until=-math.inf)
    rate = Rate.of(view, share)
    if not decision.jobs:
        return _while_idle(others, decision, rate)
    if not isinstance(view.profiles[_stage(decision).name], PhaseProfile):
        return _in_steps(promised, others, decision, rate.claim)
    model = model_queues(others, _stage(decision).model)
    if model is not None:
        return beside_decodes(promised, model, decision, rate)
    return _own(others, decision) if rate.claim else decision


def _stage(decision: Decision) -> Stage:
    """The stage of the first job of a step."""
    stage = decision.jobs[0].stage
    assert stage is not None
    return stage


def _all_are_promised(view: View) -> bool:
    for queue in view.queues.values():
        for job in queue:
            if not job.promised:
                return False
    return True


def _parted(view: View) -> tuple[View, View]:
    """The view of promised jobs, and that of the others that this worker may run."""
    promised: dict[str, list[Job]] = {}
    others: dict[str, list[Job]] = {}
    may_run = (-1, view.worker)
    for stage, queue in view.queues.items():
        for job in queue:
            if job.promised:
                promised.setdefault(stage, []).append(job)
            elif job.worker in may_run or view.pool.workers == 1:
                others.setdefault(stage, []).append(job)
    return replace(view, queues=promised), replace(view, queues=others)


def _without(promised: View, others: View, share: float) -> View:
    """What promised jobs may plan with: a device slower by `share`, and what KV cache is left."""
    speed = {name: speed / (1 - share) for name, speed in promised.speed.items()}
    for name in promised.pool.stages:
        speed.setdefault(name, 1 / (1 - share))
    pool = promised.pool
    if pool.kv_caches:
        pool = replace(pool, kv_caches=_left(pool.kv_caches, others))
    return replace(promised, speed=speed, pool=pool)


def _left(caches: Mapping[str, KVCache], others: View) -> dict[str, KVCache]:
    """The KV caches without the blocks that jobs without a promise hold."""
    left = {model: cache.num_blocks for model, cache in caches.items()}
    for job in others.jobs:
        if job.num_blocks and job.stage is not None:
            left[job.stage.model] -= job.num_blocks
    return {
        model: replace(cache, num_blocks=max(left[model], 1)) for model, cache in caches.items()
    }


def _own(others: View, decision: Decision) -> Decision:
    """A step of jobs without a promise alone; `decision` if none of them can run."""
    own = _AS_THEY_COME.decide(others)
    return replace(own, drop=decision.drop) if own.jobs else decision


def _while_idle(others: View, decision: Decision, rate: Rate) -> Decision:
    """Promised jobs leave the device free: for good, or until `decision.wake_at`."""
    own = _own(others, decision)
    if not own.jobs or decision.wake_at is None:
        return own
    time = decision.wake_at - others.now + TICK
    seconds = step_seconds(others, own)
    if seconds <= time:
        return own
    if not isinstance(others.profiles[_stage(own).name], PhaseProfile):
        return own if seconds <= rate.owed else decision
    model = model_queues(others, _stage(own).model)
    assert model is not None
    part = within(model, time, rate)
    if part.jobs:
        return replace(part, drop=decision.drop)
    return alone(model, decision, rate.owed, rate)


def step_seconds(view: View, decision: Decision) -> float:
    """Seconds of a step."""
    sizes = [decision.sizes.get(job, job.size) for job in decision.jobs]
    speed = view.speed.get(_stage(decision).name, 1.0)
    return speed * step_latency(view.profiles, decision.jobs, sizes)


# -- steps of stages ------------------------------------------------------------------------------


def _in_steps(promised: View, others: View, decision: Decision, claim: bool) -> Decision:
    """Jobs without a promise ride along at the stage of the promised ones."""
    stage = _stage(decision)
    queue = others.queues.get(stage.name, ())
    room = _limit(others, stage.name, decision.jobs) - len(decision.jobs)
    riders = sorted(queue, key=_arrival)[: max(room, 0)]
    if claim and not riders:
        return _own(others, decision)
    if not claim and riders:
        riders = _free_riders(promised, decision, riders)
    return replace(decision, jobs=[*decision.jobs, *riders])


def _limit(view: View, stage: str, jobs: Sequence[Job]) -> int:
    declared = jobs[0].stage
    assert declared is not None
    return min(declared.max_batch, view.profiles[stage].max_batch)


def _free_riders(promised: View, decision: Decision, riders: list[Job]) -> list[Job]:
    """As many of `riders`, from the front, as cost no promise."""
    jobs = list(decision.jobs)
    without = _seconds(promised, jobs)
    longest = (1 + FREE) * without
    spare = line_up(promised, decision.drop)
    everyone = list(range(len(spare.jobs)))
    reserve = spare.entries(everyone) + SPARE * _least_time(promised)
    count = 0
    for rider in riders:
        jobs.append(rider)
        seconds = _seconds(promised, jobs)
        longer = seconds - without
        if seconds > longest and not spare.plan.fits(everyone, reserve + longer):
            break
        count += 1
    return riders[:count]


def _least_time(promised: View) -> float:
    """Seconds until the first promised job is due."""
    return min([job.deadline for job in promised.jobs]) - promised.now


def _seconds(view: View, jobs: Sequence[Job]) -> float:
    return step_latency(view.profiles, jobs, [job.size for job in jobs])
