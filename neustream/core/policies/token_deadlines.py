"""Our rule for the steps of a language model: which prompts ride along, whom to admit, whom to give up.

A generation is on time if each of its outputs is, and an output that comes early buys slack for those
behind it. So a running generation has `slack + n * TPOT` seconds for its next n outputs, and what a
prompt's prefill takes comes out of everybody's slack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from neustream.core.demand import Demand
from neustream.core.job import Job
from neustream.core.policies.horizon import Horizon
from neustream.core.policies.model_queues import ModelQueues, has_progress
from neustream.core.policy import Decision, View
from neustream.core.reasons import due, span
from neustream.core.steps import Step
from neustream.core.types import TICK
from neustream.errors import ConfigError

WEIGHED = 32
"""Waiting prompts that are weighed in one decision, the shortest first."""
REFUSALS = 4
"""Prompts for whom there is no lasting room, after which longer ones are not tried."""


SAFE = 3.0
"""Times the median error of predictions that is kept as slack: nearly all steps are within it."""
VAIN = 0.95
"""A step of prompts and decodes that takes more than this share of the two apart is not worth it."""
CATCH = 0.25
"""Of the outputs expected ahead, the share by which `steady` lets a generation catch up with its pace."""


@dataclass(frozen=True, slots=True)
class TokenDeadlines:
    """Before each step:

    1. Waiting requests that cannot have their first output in time are given up. Of the others, those
       whose prefill has begun come first, then the shortest prompts (by weight), then those that were
       promised nothing.
    2. Prompts join this step as long as everyone in it, and every running generation, still has its
       next output in time; and as long as all admitted generations are expected to keep pace and to
       have memory until they end (`horizon.py`). A prompt that is too long for this step begins with a
       part, if the rest can follow in time.
    3. Three kinds of steps are compared: prompts beside all decodes, beside only those decodes that would
       be late otherwise, or alone. The one that takes most prompts in wins; at equality, prompts run
       alone where requests are promised so little that they could not wait for a longer step, or where
       a common step saves nothing.
    4. In such times decodes with slack to spare also leave the device free until their slack is down
       to `pause` prefills: who comes then need not wait for a step to end.
    5. Who was late already runs where that makes nobody else late, and is given up once others need
       its memory or its seat.

    Args:
        margin: share of a step's expected seconds that is kept as slack. Where steps are learnt, three
            times the median error of the latest predictions comes on top.
        memory: share of the memory that admitted generations are expected to fill at most.
        pause: see 4; 0 never leaves the device free.
        steady: whether outputs are also to come at their TPOT from the first one on, as far as that is
            possible, so that a request's mean TPOT keeps to its SLO (what client-side harnesses count)
            although its first output came early.
    """

    margin: float = 0.0
    memory: float = 1.0
    pause: float = 2.0
    steady: bool = False

    def __post_init__(self) -> None:
        for name in ("margin", "pause"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"tokens: {name} must be 0 or more and finite, got {getattr(self, name)}"
                )
        if not 0 < self.memory <= 1:
            raise ConfigError(f"tokens: memory must be above 0 and at most 1, got {self.memory}")

    def decide(self, view: View, model: ModelQueues) -> Decision:
        plan = _Plan(view, model, self)
        plan.keep()
        plan.admit()
        return plan.decision()


@dataclass(slots=True)
class _Part:
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


@dataclass(slots=True)
class _Plan:
    """One decision in the making."""

    view: View
    model: ModelQueues
    rule: TokenDeadlines
    alive: list[Job] = field(
        default_factory=list
    )  # decodes that can still be on time, most urgent first
    broken: list[Job] = field(default_factory=list)  # those that cannot
    waiting: list[Job] = field(default_factory=list)
    drop: dict[Job, str] = field(default_factory=dict)
    part: _Part | None = None  # the prompts of this step
    margin: float = 1.0  # times an expectation: what is counted with
    together: float = 0.0  # seconds of a decode of all that are alive
    tight: dict[Job, float] = field(
        default_factory=dict
    )  # when the next output of some is due, for their last one

    def keep(self) -> None:
        """Sort out who can still be on time."""
        view, model = self.view, self.model
        self.margin = 1 + self.rule.margin + SAFE * model.steps.error
        now, least = view.now, model.seconds(Step(decodes=1, context=1.0))
        self._whole_generations(least)
        if self.rule.steady and model.decodes:
            self._steady(least)
        for job in model.decodes:
            lost = job.late or self.due(job) - now < least - TICK
            (self.broken if lost else self.alive).append(job)
        for job in model.prefills:
            need, time = model.speed * job.next_output_s, self.due(job) - now
            if time >= need - TICK and not job.late:
                self.waiting.append(job)
            elif job.late or job.call_outputs:
                self.broken.append(job)
            else:
                what = (
                    "next output"
                    if job not in self.tight
                    else "next output, for all to be in time,"
                )
                self.drop[job] = f"hopeless: its {what} needs {span(need)}, {due(time)}"
        if (
            hasattr(model.steps, "error")
            and self.drop
            and not (self.alive or self.broken or self.waiting)
        ):
            self._try_one()
        self.alive.sort(key=self.due)
        self.waiting.sort(
            key=lambda job: (
                not has_progress(job),
                self.due(job) == math.inf,
                job.size / job.weight,
            )
        )
        self.together = self._decode(self.alive) if self.alive else 0.0

    def _try_one(self) -> None:
        """Keep the one with most hope of those that a learnt latency calls hopeless, on an idle device.

        What is learnt may be wrong (the device was slow for a while), and only steps that run tell.
        """
        hope = [job for job in self.drop if self.due(job) > self.view.now]
        if hope:
            best = max(hope, key=lambda job: self.due(job) - self.model.speed * job.next_output_s)
            del self.drop[best]
            self.waiting.append(best)

    def due(self, job: Job) -> float:
        """When its next output is due."""
        return self.tight.get(job, job.due_next)

    def _steady(self, least: float) -> None:
        """Outputs come at their TPOT from the first one on, after some more of those expected at the latest."""
        model, label = self.model, f"{self.model.label}.decode"
        step = self._decode(model.decodes)
        lengths = self.view.lengths.get(model.label)
        for job in model.decodes:
            gain = job.slo.step - step
            if not 0 < gain < math.inf:
                gain = 0.0
            ahead = float(job.calls_left.get(label, 0))
            if lengths is not None:
                ahead = min(ahead, lengths.median(job.call_outputs))
            due = job.first_at + job.call_outputs * job.slo.step + gain * ahead * CATCH
            if self.view.now + least <= due < self.due(job):
                self.tight[job] = due

    def _whole_generations(self, least: float) -> None:
        """Where the whole is due by an instant, the next output is, with time for those that usually follow."""
        view, label = self.view, f"{self.model.label}.decode"
        jobs = [job for job in (*self.model.decodes, *self.model.prefills) if job.due < math.inf]
        if not jobs:
            return
        lengths = view.lengths.get(self.model.label)
        for job in jobs:
            most = float(
                max(
                    job.calls_left.get(label, 0) - bool(job.stage and job.stage.phase == "decode"),
                    0,
                )
            )
            seen = lengths.median(job.call_outputs) if lengths is not None else math.inf
            rest = (
                min(most, seen) if seen < math.inf else 0.0
            )  # nobody knows: no reason to give it up
            self.tight[job] = min(job.due_next, job.due - rest * least)

    def _seconds(self, step: Step) -> float:
        return self.margin * self.model.seconds(step)

    def _decode(self, jobs: Sequence[Job]) -> float:
        return self._seconds(Step(decodes=len(jobs), context=sum([job.size for job in jobs])))

    # -- prompts --------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Choose the prompts of this step, and the decodes that they run beside."""
        if not self.waiting:
            return
        filler = _Filler(self)
        best = filler.fill(self.alive)
        if self.alive:
            hurried = bool(best.chosen) and (self._hurried(best) or self._in_vain(best))
            if len(best.chosen) < len(self.waiting) and (urgent := self._urgent()) is not None:
                some = filler.fill(urgent)
                best = some if some.worth > best.worth else best
            alone = filler.fill([])
            if alone.worth > best.worth or (hurried and alone.worth == best.worth):
                best = alone
        if best.chosen:
            self.part = best

    def _urgent(self) -> list[Job] | None:
        """The decodes without which a step as long as the most urgent one can bear makes somebody late."""
        until = self.due(self.alive[0]) + self.together
        some = [job for job in self.alive if self.due(job) < until]
        return some if len(some) < len(self.alive) else None

    def _hurried(self, part: _Part) -> bool:
        """Whether who comes during this step is likely to be late for it."""
        step = self._seconds(part.step(sum([job.size for job in part.decodes])))
        return patience(self.view.recent, self.model) < step

    def _in_vain(self, part: _Part) -> bool:
        """Whether prompts and decodes take as long together as one after the other (two calls, on some backends)."""
        alone = self._seconds(_Part([], part.chosen, part.tokens, part.square).step(0.0))
        both = self._seconds(part.step(sum([job.size for job in part.decodes])))
        return both >= VAIN * (alone + self.together)

    # -- the step -------------------------------------------------------------------------------------

    def decision(self) -> Decision:
        if self.part is None:
            if not self.waiting and not self.broken and (wake := self._pause()) is not None:
                return Decision(drop=self.drop, wake_at=wake)
            jobs = self._decoding()
            if not jobs and self.waiting:  # nobody runs: what is there is better than nothing
                self.part = _Part([], {self.waiting[0]: self._whole(self.waiting[0])})
                jobs = self.waiting[:1]
        else:
            jobs = [*self.part.decodes, *self.part.chosen]
        sizes = {} if self.part is None else dict(self.part.chosen)
        if self.broken:
            self._late(jobs, sizes)
        return Decision(jobs, self.drop, sizes=sizes)

    def _whole(self, job: Job) -> float:
        """As much of a prompt as a step may have."""
        return min(job.size, float(self.view.pool.step_tokens))

    def _pause(self) -> float | None:
        """When the decodes go on, if until then it is better to be ready for who may come."""
        if not self.alive or self.due(self.alive[0]) == math.inf or not self.rule.pause:
            return None
        if patience(self.view.recent, self.model) >= self.together:
            return None
        _, size = _typical(self.view.recent, f"{self.model.label}.prefill")
        reserve = self.rule.pause * self.model.seconds(Step(1, size, size * size))
        wake = self.due(self.alive[0]) - self.together - reserve
        return wake if wake > self.view.now + TICK else None

    def _decoding(self) -> list[Job]:
        """The running generations that decode: all, unless that would make the most urgent ones late."""
        now, alive = self.view.now, self.alive
        if alive and self.together <= self.due(alive[0]) - now + TICK:
            return list(alive)
        while alive:
            time = self.due(alive[0]) - now
            low, high = 0, len(alive)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (
                    (middle, high)
                    if self._decode(alive[:middle]) <= time + TICK
                    else (low, middle - 1)
                )
            if low:
                return alive[:low]
            alive = alive[1:]  # even alone it may be late
        return list(self.alive[:1])

    def _late(self, jobs: list[Job], sizes: dict[Job, float]) -> None:
        """Who is late goes along where that makes nobody else late, and is given up where room is scarce."""
        view, part = self.view, self.part or _Part([])
        for job in part.instead:
            self.drop[job] = "gave way: it cannot be in time any more, and others had no room"
        if self.part is not None and len(part.decodes) < len(self.alive):
            return
        time = min([self.due(job) for job in (*self.alive, *sizes)], default=math.inf) - view.now
        time = min(
            [time, *(job.slo.step for job in self.alive)]
        )  # nor does it eat up anybody's slack
        decodes = [job for job in jobs if job not in sizes]
        reading = sum([job.size for job in decodes])
        staying = [job for job in self.broken if job not in self.drop]
        for job in [
            job for job in staying if job.stage is not None and job.stage.phase == "decode"
        ]:
            step = Step(len(sizes), part.tokens, part.square, len(decodes) + 1, reading + job.size)
            if len(jobs) >= self.model.seats or (jobs and self._seconds(step) > time):
                break
            jobs.append(job)
            decodes.append(job)
            reading += job.size
        for job in [
            job for job in staying if job.stage is not None and job.stage.phase != "decode"
        ]:
            if not jobs:
                jobs.append(job)
                sizes[job] = self._whole(job)
            elif self.waiting:
                self.drop[job] = (
                    "gave way: it lost its memory and cannot be in time any more, and others wait"
                )


class _Filler:
    """Fills steps of different kinds with prompts, for one decision."""

    def __init__(self, plan: _Plan) -> None:
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

    def fill(self, decodes: list[Job]) -> _Part:
        """The prompts that can be prefilled now, and how much of each, with `decodes` in the same step."""
        plan, now = self.plan, self.plan.view.now
        reading = sum([job.size for job in decodes])
        slack = min([plan.due(job) for job in decodes], default=math.inf) - now
        if len(decodes) < len(plan.alive):
            within = set(decodes)
            others = next(job for job in plan.alive if job not in within)  # the most urgent of them
            slack = min(slack, plan.due(others) - now - plan.together)
        part, load, late = _Part(decodes), self.load, list(self.late)
        most, free, seats, refused = (
            plan.view.pool.step_tokens - len(decodes),
            self.free,
            self.seats,
            0,
        )
        due = math.inf  # when the step must be over for the prompts that end in it
        for job, row in zip(self.waiting, self.rows, strict=True):
            if (seats < 1 and not late) or most - part.tokens < 1 or refused == REFUSALS:
                break
            size, own = min(job.size, most - part.tokens), plan.due(job) - now
            seconds = plan._seconds(part.step(reading, job, size))
            if size < job.size or seconds > min(slack, due, own) + TICK:
                size = self._begin(part, job, reading, slack, min(slack, due)) if decodes else 0.0
            need = plan.model.blocks(job, size)
            if not size or need > free + sum([other.num_blocks for other in late]):
                continue
            if not job.computed and not self.horizon.bears(load + row):
                refused += 1
                continue
            while need > free or seats < 1:
                part.instead.append(late.pop())
                free, seats = free + part.instead[-1].num_blocks, seats + 1
            part.add(job, size)
            load, free, seats = load + row, free - need, seats - 1
            due = min(due, own) if size == job.size else due
        return part

    def _begin(self, part: _Part, job: Job, reading: float, slack: float, limit: float) -> float:
        """Tokens of a prompt that fit into this step so that the rest still gets done in time; 0 if it does not."""
        plan = self.plan
        low, high = (
            0,
            int(min(job.size, plan.view.pool.step_tokens - len(part.decodes) - part.tokens)),
        )
        while low < high:
            middle = (low + high + 1) // 2
            fits = plan._seconds(part.step(reading, job, middle)) <= limit + TICK
            low, high = (middle, high) if fits else (low, middle - 1)
        if low < 1:
            return 0.0
        now = plan._seconds(part.step(reading, job, low))
        step = plan._seconds(part.step(reading, job, 1.0))  # decodes, and what any prompt adds
        each = (
            plan._seconds(part.step(reading, job, job.size)) - step
        ) / job.size  # what a token of it adds
        rest = job.size - low
        if rest <= 0 or self.pace <= step:
            return float(low) if rest <= 0 else 0.0
        left = max(slack - now, 0.0)
        steps = math.ceil(rest / low)
        if self.pace < math.inf:
            steps = max(steps, math.ceil((each * rest - left) / (self.pace - step)))
        return (
            float(low) if steps * step + each * rest <= plan.due(job) - plan.view.now - now else 0.0
        )


def _typical(recent: tuple[Demand, ...], stage: str) -> tuple[float, float]:
    """Of the latest requests: the median time to their first output that was promised, and the median prompt."""
    some = [(demand.first, demand.calls[stage].size) for demand in recent if stage in demand.calls]
    if not some:
        return math.inf, 0.0
    middle = len(some) // 2
    return sorted(first for first, _ in some)[middle], sorted(size for _, size in some)[middle]


def patience(recent: tuple[Demand, ...], model: ModelQueues) -> float:
    """Seconds that requests like the latest can wait before their prefill; inf if they were promised nothing."""
    first, size = _typical(recent, f"{model.label}.prefill")
    return first - model.seconds(Step(1, size, size * size)) if first < math.inf else math.inf
