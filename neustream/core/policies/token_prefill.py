"""Which prompts a step of a language model prefills, and how much of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

from neustream.core.job import Job
from neustream.core.policies.model_queues import at_decode, in_part
from neustream.core.policies.prefill_plan import PrefillPlan
from neustream.core.policies.token_admission import Admission, admission
from neustream.core.steps import Step
from neustream.core.types import TICK

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

REFUSALS = 4
"""Prompts that may not be promised, after which those behind them are not tried."""
SOON = 3.0
"""Times for which room for one comes by: who can wait no longer than that comes back at once."""


@dataclass(slots=True)
class _Room:
    """Blocks and seats for prompts. Late requests, the largest last, lose theirs if need be."""

    free: int
    seats: int
    late: list[Job]

    @property
    def full(self) -> bool:
        """Whether there is no seat for anybody."""
        return self.seats < 1 and not self.late

    def has(self, blocks: int) -> bool:
        """Whether there are so many blocks."""
        return blocks <= self.free + sum([job.num_blocks for job in self.late])

    def take(self, blocks: int) -> list[Job]:
        """Take a seat and so many blocks; the late requests that lose theirs for it."""
        losers = []
        while blocks > self.free or self.seats < 1:
            loser = self.late.pop()
            losers.append(loser)
            self.free += loser.num_blocks
            self.seats += 1
        self.free -= blocks
        self.seats -= 1
        return losers


class PrefillFiller:
    """Fills steps of different kinds with prompts, for one decision."""

    def __init__(self, plan: StepPlan) -> None:
        model = plan.model
        self.plan = plan
        self.free = model.room() - self._growth(plan.promised)
        late = [job for job in plan.broken if job.num_blocks or at_decode(job)]
        self.late = sorted(late, key=attrgetter("num_blocks"))
        self.seats = model.seats - len(plan.alive) - len(self.late)
        self._short = False  # somebody found no room
        self._spares: dict[Job, int] = {}
        self.pace = min([job.slo.step for job in plan.alive], default=math.inf)

    @cached_property
    def admission(self) -> Admission:
        """Who may be promised to be on time."""
        return admission(self.plan)

    def finds_any(self) -> bool:
        """Whether there are blocks and a seat for any part of any prompt."""
        room = _Room(self.free, self.seats, self.late)
        return not room.full and any(self._finds(room, job) for job in self.plan.waiting)

    def _growth(self, decodes: Sequence[Job]) -> int:
        """Blocks that generations need for their next outputs."""
        memory = self.plan.model.memory
        if memory is None:
            return 0
        sizes, block = self.plan.sizes, memory.block_size
        blocks = sum([math.ceil(sizes[job] / block) for job in decodes])
        return blocks - sum([job.num_blocks for job in decodes])

    def fill(self, decodes: list[Job]) -> PrefillPlan:
        """The prompts that fit into a step with `decodes`, and how much of each."""
        part = PrefillPlan(decodes, self._slack(decodes), context=self._context(decodes))
        if self._too_long(part):
            return part
        room = _Room(self.free, self.seats, list(self.late))
        self.admission.begin(part)
        in_time = self._all_in_time(part)
        refused = 0
        passed = False  # somebody who was promised something stays outside
        for index, job in enumerate(self.admission.waiting):
            left = self._tokens_left(part)
            if room.full or left < 1 or refused == REFUSALS:
                break
            whole, time = self.plan.sizes[job], self._time(job)
            promised = time < math.inf
            if passed and not promised and not in_part(job):
                continue
            size = 0.0
            if in_time and whole <= left:
                size = whole
            elif not self._short or self._finds(room, job):
                size = self._size(part, job, min(whole, left), time)
            if not size or not self._fits(room, job, size):
                passed = passed or promised
                continue
            if not self.admission.takes(index, part, size):
                refused += 1
                passed = passed or promised
                continue
            part.instead += room.take(self.plan.model.blocks(job, size))
            part.add(job, size)
            if size == whole:
                part.due = min(part.due, time)
        return part

    def _too_long(self, part: PrefillPlan) -> bool:
        """Whether the decodes have no slack for one token of any prompt."""
        if part.slack == math.inf:
            return False
        step = Step(1, 1.0, 1.0, len(part.decodes), part.context)
        return self.plan.seconds(step) > part.slack + TICK

    def _all_in_time(self, part: PrefillPlan) -> bool:
        """Whether a step with all who are tried is in time for each of them, and for the decodes:
        then none of them has to be tried alone."""
        plan, jobs = self.plan, self.admission.waiting
        if not 1 < len(jobs) <= plan.model.seats - len(part.decodes):
            return False
        sizes = [plan.sizes[job] for job in jobs]
        if sum(sizes) > self._tokens_left(part):
            return False
        pairs = zip(jobs, sizes, strict=True)
        square = sum([(2 * job.computed + size) * size for job, size in pairs])
        step = Step(len(jobs), sum(sizes), square, len(part.decodes), part.context)
        expected, seconds = plan.expected_and_safe(step)
        time = min(map(self._time, jobs))
        return expected <= time + TICK and seconds <= min(part.slack, time) + TICK

    def _fits(self, room: _Room, job: Job, size: float) -> bool:
        """Whether there are blocks for so much of a prompt, and those that stay free beside it."""
        fits = room.has(self.plan.model.blocks(job, size) + self._spare(job))
        self._short = self._short or not fits
        return fits

    def _finds(self, room: _Room, job: Job) -> bool:
        """The same of the least part of a prompt."""
        need = self.plan.model.blocks(job, 1.0)
        return room.has(need) and room.has(need + self._spare(job))

    def _spare(self, job: Job) -> int:
        """`_stays_free` of a job, found once."""
        spare = self._spares.get(job)
        if spare is None:
            spare = self._spares[job] = self._stays_free(job)
        return spare

    def _stays_free(self, job: Job) -> int:
        """Blocks that stay free beside a job, so that nobody loses them soon.

        One that would be the next to lose its memory leaves a block for each that decodes at least,
        for those and for arrivals. One that lost its own leaves more: its prompt delays all that
        decode, and one more of them makes up for that in as many steps as decode, times the steps
        that the prompt takes. Until then there has to be memory for all that are expected to go on.
        One that has hardly time to wait for room comes back at once, and so does one whose prompt
        is under way: room comes by as those that decode grow, and take it from the one with the
        most slack.
        """
        plan = self.plan
        count = len(plan.alive)
        if not count or plan.model.memory is None:
            return 0
        spare = count if self._loses_next(job) else 0
        if not job.call_outputs:
            return spare
        prompt = plan.prompt_seconds(job)
        room = plan.sizes[job] / count * plan.together
        if in_part(job) or self._time_to_wait(job) <= SOON * (room + prompt):
            return spare
        growth = plan.outlook.growth(count * prompt / plan.together)
        return max(spare, plan.model.memory.blocks_of(growth))

    def _loses_next(self, job: Job) -> bool:
        """Whether a job would be the next to lose its memory, once its prompt is done.

        One that has made no output so far has a pace to keep from then on, or its end alone. If
        nothing is promised to it any more then, it may lose it.
        """
        plan = self.plan
        due = plan.due(job)
        if not job.call_outputs:
            due = min(plan.view.now + job.slo.step, job.leg_latest)
            if due == math.inf:
                return False
        return due >= plan.due(plan.alive[-1])

    def _time_to_wait(self, job: Job) -> float:
        """Seconds for which a job may stay without memory, if it gets as long as it may."""
        plan = self.plan
        behind = job.calls_here(f"{plan.model.label}.decode") * plan.together
        return min(self._time(job), job.leg_latest - plan.view.now - behind)

    def _time(self, job: Job) -> float:
        """Seconds until the next output of a job is due."""
        return self.plan.due(job) - self.plan.view.now

    def _tokens_left(self, part: PrefillPlan) -> float:
        """Tokens that a step may still compute."""
        return self.plan.view.pool.step_tokens - len(part.decodes) - part.tokens

    def _context(self, decodes: Sequence[Job]) -> float:
        """Tokens that they read."""
        plan = self.plan
        return plan.context if len(decodes) == len(plan.alive) else plan.read_by(decodes)

    def _slack(self, decodes: Sequence[Job]) -> float:
        """Seconds that a step with `decodes`, the most urgent, may take.

        So that all generations stay in time: those outside of it decode after it.
        """
        plan, now = self.plan, self.plan.view.now
        slack = plan.due(decodes[0]) - now if decodes else math.inf
        if len(decodes) < len(plan.alive):
            slack = min(slack, plan.due(plan.alive[len(decodes)]) - now - plan.together)
        return min(slack, plan.view.reserved.room)

    def _size(self, part: PrefillPlan, job: Job, size: float, time: float) -> float:
        """Tokens of a prompt for this step: all, or a first part of them, or 0.

        `size` of them may be in it, and its output is due in `time` seconds.
        """
        in_time = False
        if size == self.plan.sizes[job]:
            others = min(part.slack, part.due)
            if time == others == math.inf:
                return size
            expected, seconds = self.plan.expected_and_safe(part.step_with(job, size))
            in_time = expected <= time + TICK
            if in_time and seconds <= others + TICK:
                return size
        begun = self._begin(part, job) if part.decodes else 0.0
        if in_time and not begun:
            part.outside.append(job)
        return begun

    def _begin(self, part: PrefillPlan, job: Job) -> float:
        """Tokens of a prompt for this step if the rest of it can follow in time; else 0."""
        plan = self.plan
        step = plan.seconds(part.step_with(job, 1.0))  # decodes, and what any prompt adds
        if self.pace <= step or step > min(part.slack, part.due) + TICK:
            return 0.0
        first = self._tokens_within(part, job)
        rest = job.size - first
        if first < 1 or rest <= 0:  # 0: the step is too long for its own output's deadline
            return 0.0
        now = plan.seconds(part.step_with(job, first))
        whole = plan.seconds(part.step_with(job, job.size))
        each = (whole - step) / job.size  # what a token of it adds
        left = max(part.slack - now, 0.0)
        steps = math.ceil(rest / first)
        if self.pace < math.inf:
            steps = max(steps, math.ceil((each * rest - left) / (self.pace - step)))
        time = self.plan.view.reserved.left(self._time(job))
        in_time = steps * step + each * rest <= time - now
        return float(first) if in_time else 0.0

    def _tokens_within(self, part: PrefillPlan, job: Job) -> int:
        """The most tokens of a prompt with which the step ends within its limit."""
        limit = min(part.slack, part.due) + TICK
        low, high = 0, int(min(job.size, self._tokens_left(part)))
        while low < high:
            middle = (low + high + 1) // 2
            if self.plan.seconds(part.step_with(job, middle)) <= limit:
                low = middle
            else:
                high = middle - 1
        return low
