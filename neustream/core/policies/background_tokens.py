"""Requests without a promise beside promised steps of a language model.

Generations decode along, and one prompt at a time is prefilled along in parts, as long as the step
costs no promise. Where promised decodes have time for it, prompts have a step of their own.

A step of their own that is too long makes all promised generations late at once. So it comes only
where nobody can ride (a mixed step may cost too much, or all seats be taken) and the device owes
them all of that step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

from neustream.core.job import Job
from neustream.core.policies.model_queues import (
    ModelQueues,
    at_decode,
    continuous,
    in_part,
    model_queues,
)
from neustream.core.policies.recent_prompts import patience
from neustream.core.policy import Decision, View
from neustream.core.step_times import step_of
from neustream.core.steps import Step

FREE = 0.02
"""Share by which a ride may make a promised step longer without a claim."""
SPARE = 0.5
"""Share of the time of promised jobs that a longer ride without a claim leaves them."""
LEAST = 64
"""Tokens of prompts that a step of their own computes at least; all of a shorter prompt."""

_arrival = attrgetter("arrival")


class Rate(NamedTuple):
    """The share of the device's time that jobs without a promise get, and seconds owed by it."""

    share: float
    owed: float

    @classmethod
    def of(cls, view: View, share: float) -> Rate:
        """The rate, and what is owed by now."""
        busy, served = view.unpromised
        return cls(share, share * busy - served)

    @property
    def claim(self) -> bool:
        """Whether the next step is to serve them."""
        return self.owed > 0


def beside_decodes(promised: View, model: ModelQueues, decision: Decision, rate: Rate) -> Decision:
    """A promised step with jobs of `model` without a promise in it, or a step of their own."""
    if rate.claim:
        prompts = _prompts(model, _tokens_in_time(promised, model), rate)
        if prompts:
            return Decision(list(prompts), decision.drop, sizes=prompts)
    ride = _Ride(model, decision, _longest(promised, model, decision, rate))
    ride.take(rate)
    if ride.jobs or not rate.claim:
        return ride.decision()
    return alone(model, decision, max(_time_to_spare(promised, model), rate.owed), rate)


def _longest(promised: View, model: ModelQueues, decision: Decision, rate: Rate) -> float:
    """Seconds that a promised step may take with jobs without a promise in it.

    Promised jobs planned it as if it took 1 / (1 - share) times as long.
    """
    sizes = [decision.sizes.get(job, job.size) for job in decision.jobs]
    longer = 1 / (1 - rate.share) if rate.claim else 1.0
    longest = max(1 + FREE, longer) * model.seconds(step_of(decision.jobs, sizes))
    if _prompts_wait(promised):
        return longest
    pace = min([job.slo.step for job in promised.jobs])
    return max(longest, SPARE * min(pace, _least_slack(promised)))


def within(model: ModelQueues, seconds: float, rate: Rate) -> Decision:
    """A step of jobs without a promise alone that takes at most so long; without jobs if none."""
    ride = _Ride(model, Decision(), seconds)
    ride.take(rate)
    return ride.decision()


def alone(model: ModelQueues, decision: Decision, seconds: float, rate: Rate) -> Decision:
    """Their decodes, or a part of their prompts, if that takes at most so long; else `decision`."""
    decodes = sorted(model.decodes, key=_arrival)[: model.seats]
    if decodes:
        step = Step(decodes=len(decodes), context=sum([job.size for job in decodes]))
        if model.seconds(step) <= seconds:
            return Decision(decodes, decision.drop)
    least = _least(model, rate)
    if model.seconds(Step(1, least, least * least)) <= seconds:
        prompts = _prompts(model, least, rate)
        if prompts:
            return Decision(list(prompts), decision.drop, sizes=prompts)
    return decision


@dataclass(slots=True)
class _Ride:
    """Jobs without a promise in a step `with_them`, as long as that takes at most `longest`."""

    model: ModelQueues
    with_them: Decision
    longest: float
    jobs: list[Job] = field(default_factory=list)
    sizes: dict[Job, float] = field(default_factory=dict)
    step: Step = field(init=False)

    def __post_init__(self) -> None:
        jobs, sizes = self.with_them.jobs, self.with_them.sizes
        self.step = step_of(jobs, [sizes.get(job, job.size) for job in jobs])

    def take(self, rate: Rate) -> None:
        """Take in as many generations as fit, and as much of a prompt."""
        self._decode()
        prompt = _first_prompt(self.model, rate) if rate.share else None
        if prompt is not None and self.room > 0:
            self._prefill(prompt)

    @property
    def room(self) -> int:
        """Seats that are left."""
        return self.model.seats - len(self.with_them.jobs) - len(self.jobs)

    def _decode(self) -> None:
        """As many generations as fit, in order of arrival."""
        for job in sorted(self.model.decodes, key=_arrival):
            step = self.step
            step = step._replace(decodes=step.decodes + 1, context=step.context + job.size)
            if self.room < 1 or self.model.seconds(step) > self.longest:
                return
            self.jobs.append(job)
            self.step = step

    def _prefill(self, job: Job) -> None:
        """As much of a prompt as fits."""
        low, high = 0, int(min(job.size, self._tokens_left()))
        while low < high:
            middle = (low + high + 1) // 2
            if self.model.seconds(self._with_prompt(job, middle)) <= self.longest:
                low = middle
            else:
                high = middle - 1
        if low:
            self.jobs.append(job)
            self.sizes[job] = float(low)
            self.step = self._with_prompt(job, low)

    def _tokens_left(self) -> float:
        """Tokens that the step may still compute."""
        return self.model.view.pool.step_tokens - self.step.tokens - self.step.decodes

    def _with_prompt(self, job: Job, tokens: int) -> Step:
        step = self.step
        square = step.square + (2 * job.computed + tokens) * tokens
        return step._replace(prefills=step.prefills + 1, tokens=step.tokens + tokens, square=square)

    def decision(self) -> Decision:
        """The step with them."""
        together = self.with_them
        jobs = [*together.jobs, *self.jobs]
        return replace(together, jobs=jobs, sizes={**together.sizes, **self.sizes})


def _prompts_wait(promised: View) -> bool:
    """Whether promised prompts wait, or run in this step."""
    return any(job.stage is not None and job.stage.phase == "prefill" for job in promised.jobs)


def _prompts(model: ModelQueues, tokens: int, rate: Rate) -> dict[Job, float]:
    """The parts of prompts in a step of at most `tokens`, as far as there is room to keep them."""
    prefills = _with_room(model, rate)
    if not prefills or tokens < _least(model, rate):
        return {}
    alone = replace(model, decodes=[], prefills=prefills)
    _, sizes = continuous(model.view, alone, _arrival, tokens)
    return sizes


def _with_room(model: ModelQueues, rate: Rate) -> list[Job]:
    """The prompts that fit into their share of the KV cache; all, if they hold nothing of it."""
    memory = model.memory
    held = sum([job.num_blocks for job in (*model.decodes, *model.prefills)])
    if memory is None or not held:
        return model.prefills
    room = rate.share * memory.num_blocks - held
    return [job for job in model.prefills if _needs(model, job) <= room]


def _oldest_prompt(model: ModelQueues, rate: Rate) -> Job | None:
    """The prompt that goes on first: one under way, or the oldest."""
    prefills = _with_room(model, rate)
    return min(prefills, key=lambda job: (not in_part(job), job.arrival), default=None)


def _least(model: ModelQueues, rate: Rate) -> int:
    """Tokens of prompts that a step of their own computes at least.

    Not more than the first one has: where steps are learnt, what more would take is a guess.
    """
    job = _oldest_prompt(model, rate)
    return LEAST if job is None else int(min(LEAST, job.size))


def _first_prompt(model: ModelQueues, rate: Rate) -> Job | None:
    """The prompt that goes on first, if there is room to keep it."""
    job = _oldest_prompt(model, rate)
    if job is None or _needs(model, job) > model.room():
        return None
    return job


def _needs(model: ModelQueues, job: Job) -> int:
    """Blocks that a prompt needs beyond those that it holds; 0 for one that is under way."""
    return 0 if job.num_blocks else model.blocks(job, job.size)


def _time_to_spare(promised: View, model: ModelQueues) -> float:
    """Seconds that a step may take before the next one of all promised decodes, of each model."""
    time = _least_slack(promised)
    labels = [job.stage.model for job in promised.jobs if job.stage and at_decode(job)]
    for label in dict.fromkeys(labels):
        own = model_queues(promised, label)
        assert own is not None
        context = sum([job.size for job in own.decodes])
        time -= own.seconds(Step(decodes=len(own.decodes), context=context))
    return min(time, SPARE * patience(promised, model))  # of requests that come meanwhile


def _tokens_in_time(promised: View, model: ModelQueues) -> int:
    """The most tokens of a prompt whose step leaves time for the promised decodes after it."""
    time = _time_to_spare(promised, model)
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
        if at_decode(job) and job.due_next > now:
            time = min(time, job.due_next - now)
    return time
