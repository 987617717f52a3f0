"""Requests without a promise beside promised ones: a stated rate, and rides that cost nothing.

While both kinds are there, promised jobs are decided as if the others were absent. Jobs without a
promise then run

* at their rate: while they had less than `share` of the device's time (`View.unpromised`) they
  have a claim, and the next step serves them. They ride along in the promised step where it has
  room, else the step is their own.
* for free: in a step that they do not make longer by more than `FREE`; in one that they do, if
  every promised job is in time even so with half of its time left; and while the device would
  idle.

With no promised job there, they run as under `FCFS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter

from neustream.core.job import Job
from neustream.core.policies.fcfs import FCFS
from neustream.core.policies.line_up import line_up
from neustream.core.policies.model_queues import ModelQueues, continuous, model_queues
from neustream.core.policies.recent_prompts import patience
from neustream.core.policy import Decision, View
from neustream.core.step_times import step_latency, step_of
from neustream.core.steps import PhaseProfile, Step
from neustream.core.types import TICK

FREE = 0.02
"""Share by which a ride may make a promised step longer without a claim."""
SPARE = 0.5
"""Share of the time of promised jobs that a longer ride without a claim leaves them."""
OVERDUE = 0.5
"""Below this part of their share, prompts no longer wait for a moment that costs no promise."""
LEAST = 64
"""Tokens of prompts that a step of a claim computes, even if promised outputs are late by it."""

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
    decision = decide(_without(promised, others, share))
    busy, served = view.unpromised
    claim = served < share * busy
    if not decision.jobs:
        return _while_idle(others, decision, claim)
    first = decision.jobs[0].stage
    assert first is not None
    if isinstance(view.profiles[first.name], PhaseProfile):
        return _in_tokens(promised, others, decision, share if claim else 0.0)
    return _in_steps(promised, others, decision, claim)


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
    if pool.kv_cache is not None:
        held = sum([job.num_blocks for job in others.jobs])
        left = max(pool.kv_cache.num_blocks - held, 1)
        pool = replace(pool, kv_cache=replace(pool.kv_cache, num_blocks=left))
    return replace(promised, speed=speed, pool=pool)


def _own(others: View, decision: Decision) -> Decision:
    """A step of jobs without a promise alone; `decision` if none of them can run."""
    own = _AS_THEY_COME.decide(others)
    return replace(own, drop=decision.drop) if own.jobs else decision


def _while_idle(others: View, decision: Decision, claim: bool) -> Decision:
    """Promised jobs leave the device free: for good, or until `decision.wake_at`."""
    own = _own(others, decision)
    if not own.jobs or claim or decision.wake_at is None:
        return own
    first = own.jobs[0].stage
    assert first is not None
    sizes = [own.sizes.get(job, job.size) for job in own.jobs]
    speed = others.speed.get(first.name, 1.0)
    over = others.now + speed * step_latency(others.profiles, own.jobs, sizes)
    return own if over <= decision.wake_at + TICK else decision


# -- steps of stages ------------------------------------------------------------------------------


def _in_steps(promised: View, others: View, decision: Decision, claim: bool) -> Decision:
    """Jobs without a promise ride along at the stage of the promised ones."""
    stage = decision.jobs[0].stage
    assert stage is not None
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


# -- steps of a language model --------------------------------------------------------------------


def _in_tokens(promised: View, others: View, decision: Decision, claim: float) -> Decision:
    """Generations without a promise decode along. Prompts have steps of their own, by claim."""
    first = decision.jobs[0].stage
    assert first is not None
    model = model_queues(others, first.model)
    if model is None:
        return _own(others, decision) if claim else decision
    if claim:
        tokens = _tokens_in_time(promised, model)
        busy, served = others.unpromised
        if served < OVERDUE * claim * busy:
            tokens = max(tokens, LEAST)
        prompts = _prompts(others, model, tokens, claim) if tokens >= LEAST else {}
        if prompts:
            return Decision(list(prompts), decision.drop, sizes=prompts)
    riders = sorted(model.decodes, key=_arrival)
    room = max(model.seats - len(decision.jobs), 0)
    if claim and riders and not room:
        return Decision(riders[: model.seats], decision.drop)
    riders = riders[:room]
    if riders:
        riders = _decoding_along(promised, model, decision, riders, claim)
    return replace(decision, jobs=[*decision.jobs, *riders])


def _prompts_wait(promised: View) -> bool:
    """Whether promised prompts wait, or run in this step."""
    return any(job.stage is not None and job.stage.phase == "prefill" for job in promised.jobs)


def _prompts(others: View, model: ModelQueues, tokens: int, share: float) -> dict[Job, float]:
    """The parts of prompts in a step of at most `tokens`, as far as there is room to keep them."""
    memory = others.pool.kv_cache
    prefills = model.prefills
    if memory is not None:
        held = sum([job.num_blocks for job in (*model.decodes, *prefills)])
        room = share * memory.num_blocks - held
        if held:  # one at least
            prefills = [job for job in prefills if _needs(model, job) <= room]
    if not prefills:
        return {}
    alone = replace(model, decodes=[], prefills=prefills)
    _, sizes = continuous(others, alone, _arrival, tokens)
    return sizes


def _needs(model: ModelQueues, job: Job) -> int:
    """Blocks that a prompt needs beyond those that it holds; 0 for one that is under way."""
    return 0 if job.computed else model.blocks(job, job.size)


def _tokens_in_time(promised: View, model: ModelQueues) -> int:
    """The most tokens of a prompt whose step leaves time for the promised decodes after it."""
    decodes = [
        job for job in promised.jobs if job.stage is not None and job.stage.phase == "decode"
    ]
    context = sum([job.size for job in decodes])
    time = _least_slack(promised)
    if decodes:
        time -= model.seconds(Step(decodes=len(decodes), context=context))
    time = min(time, SPARE * patience(promised.recent, model))  # of requests that come meanwhile
    low = 0
    high = promised.pool.step_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if model.seconds(Step(1, middle, middle * middle)) <= time:
            low = middle
        else:
            high = middle - 1
    return low


def _least_slack(promised: View) -> float:
    """Seconds until the next promised output of a decode that is not late."""
    now = promised.now
    time = math.inf
    for job in promised.jobs:
        if job.stage is not None and job.stage.phase == "decode" and job.due_next > now:
            time = min(time, job.due_next - now)
    return time


def _decoding_along(
    promised: View, model: ModelQueues, decision: Decision, riders: list[Job], claim: float
) -> list[Job]:
    """As many of `riders`, from the front, as cost no promise.

    Promised jobs planned this step as if it took 1 / (1 - claim) times as long.
    """
    sizes = [decision.sizes.get(job, job.size) for job in decision.jobs]
    step = step_of(decision.jobs, sizes)
    longest = max(1 + FREE, 1 / (1 - claim)) * model.seconds(step)
    if not _prompts_wait(promised):
        pace = min([job.slo.step for job in promised.jobs])
        longest = max(longest, SPARE * min(pace, _least_slack(promised)))
    for count, job in enumerate(riders):
        step = step._replace(decodes=step.decodes + 1, context=step.context + job.size)
        if model.seconds(step) > longest:
            return riders[:count]
    return riders
