"""Which prompts a step of a language model prefills, and how much of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neustream.core.job import Job
from neustream.core.policies.horizon import Horizon
from neustream.core.steps import Step
from neustream.core.types import TICK

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

WEIGHED = 32
"""Waiting prompts that are weighed in one decision, the shortest first."""
REFUSALS = 4
"""Prompts for whom there is no lasting room, after which longer ones are not tried."""


@dataclass(slots=True)
class PrefillPlan:
    """Prompts in a step: who, how many tokens of each, beside which decodes."""

    decodes: list[Job]
    chosen: dict[Job, float] = field(default_factory=dict)
    tokens: float = 0.0
    square: float = 0.0
    instead: list[Job] = field(default_factory=list)  # late ones whose room they need

    @property
    def worth(self) -> float:
        return sum(job.weight * size / job.size for job, size in self.chosen.items())

    def step(self, reading: float, job: Job | None = None, size: float = 0.0) -> Step:
        """The step, with `size` tokens of one more prompt."""
        if job is None:
            return Step(len(self.chosen), self.tokens, self.square, len(self.decodes), reading)
        square = self.square + (2 * job.computed + size) * size
        return Step(len(self.chosen) + 1, self.tokens + size, square, len(self.decodes), reading)

    def add(self, job: Job, size: float) -> None:
        self.square += (2 * job.computed + size) * size
        self.tokens += size
        self.chosen[job] = size


class PrefillFiller:
    """Fills steps of different kinds with prompts, for one decision."""

    def __init__(self, plan: StepPlan) -> None:
        view, model = plan.view, plan.model
        self.plan = plan
        self.waiting = plan.waiting[:WEIGHED]
        self.free = model.room() - sum([model.blocks(job, 1) for job in plan.alive])
        here = [
            job
            for job in plan.broken
            if job.num_blocks or (job.stage is not None and job.stage.phase == "decode")
        ]
        self.late = sorted(here, key=lambda job: job.num_blocks)
        self.seats = model.seats - len(plan.alive) - len(self.late)
        label, memory = f"{model.label}.decode", view.pool.kv_cache
        self.horizon = Horizon(
            model,
            view.lengths.get(model.label),
            view.now,
            max([job.calls_left.get(label, 1) for job in (*plan.alive, *self.waiting)], default=1),
            margin=plan.margin - 1,
            units=math.inf if memory is None else memory.capacity * plan.rule.memory,
            block=0 if memory is None else memory.block_size,
        )
        self.load = self.horizon.of(plan.alive)
        self.rows = self.horizon.rows(self.waiting, running=False)
        self.pace = min([job.slo.step for job in plan.alive], default=math.inf)

    def fill(self, decodes: list[Job]) -> PrefillPlan:
        """The prompts that fit into a step with `decodes`, and how much of each."""
        plan, now = self.plan, self.plan.view.now
        reading = sum([job.size for job in decodes])
        slack = self._slack(decodes)
        part, load, late = PrefillPlan(decodes), self.load, list(self.late)
        most = plan.view.pool.step_tokens - len(decodes)
        free, seats, refused = self.free, self.seats, 0
        due = math.inf  # when the step must be over for the prompts that end in it
        for job, row in zip(self.waiting, self.rows, strict=True):
            if (seats < 1 and not late) or most - part.tokens < 1 or refused == REFUSALS:
                break
            size, own = min(job.size, most - part.tokens), plan.due(job) - now
            seconds = plan.seconds(part.step(reading, job, size))
            if size < job.size or seconds > min(slack, due, own) + TICK:
                size = self._begin(part, job, reading, slack, min(slack, due)) if decodes else 0.0
            need = plan.model.blocks(job, size)
            if not size or need > free + sum([other.num_blocks for other in late]):
                continue
            if not job.computed and not self.horizon.fits(load + row):
                refused += 1
                continue
            while need > free or seats < 1:
                part.instead.append(late.pop())
                free, seats = free + part.instead[-1].num_blocks, seats + 1
            part.add(job, size)
            load, free, seats = load + row, free - need, seats - 1
            due = min(due, own) if size == job.size else due
        return part

    def _slack(self, decodes: list[Job]) -> float:
        """Seconds that a step with `decodes` may take, so that all generations stay in time."""
        plan, now = self.plan, self.plan.view.now
        slack = min([plan.due(job) for job in decodes], default=math.inf) - now
        if len(decodes) < len(plan.alive):
            within = set(decodes)
            outside = next(job for job in plan.alive if job not in within)  # the most urgent
            slack = min(slack, plan.due(outside) - now - plan.together)
        return slack

    def _begin(
        self, part: PrefillPlan, job: Job, reading: float, slack: float, limit: float
    ) -> float:
        """Tokens of a prompt for this step if the rest of it can follow in time; else 0."""
        plan = self.plan
        low = self._tokens_within(part, job, reading, limit)
        if low < 1:
            return 0.0
        now = plan.seconds(part.step(reading, job, low))
        step = plan.seconds(part.step(reading, job, 1.0))  # decodes, and what any prompt adds
        whole = plan.seconds(part.step(reading, job, job.size))
        each = (whole - step) / job.size  # what a token of it adds
        rest = job.size - low
        if rest <= 0:
            return float(low)
        if self.pace <= step:
            return 0.0
        left = max(slack - now, 0.0)
        steps = math.ceil(rest / low)
        if self.pace < math.inf:
            steps = max(steps, math.ceil((each * rest - left) / (self.pace - step)))
        in_time = steps * step + each * rest <= plan.due(job) - plan.view.now - now
        return float(low) if in_time else 0.0

    def _tokens_within(self, part: PrefillPlan, job: Job, reading: float, limit: float) -> int:
        """The most tokens of a prompt with which the step ends within `limit`."""
        plan = self.plan
        budget = plan.view.pool.step_tokens - len(part.decodes) - part.tokens
        low, high = 0, int(min(job.size, budget))
        while low < high:
            middle = (low + high + 1) // 2
            if plan.seconds(part.step(reading, job, middle)) <= limit + TICK:
                low = middle
            else:
                high = middle - 1
        return low
