"""Our rule for the steps of a language model: which prompts ride along, whom to admit, whom to give up.

A generation is on time if each of its outputs is, and an output that comes early buys slack for those
behind it. So a running generation has, for its next n outputs, `slack + n * TPOT` seconds, and what a
prompt's prefill takes comes out of everybody's slack. How long generations get is not known; how many
are still there in n steps is estimated from those that have ended (`Lengths`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neustream.core.lengths import Lengths
from neustream.core.policies.generation import Generation, begun
from neustream.core.policy import Decision, View
from neustream.core.steps import Step
from neustream.core.types import TICK, Asked, Job

Floats = NDArray[np.float64]
POINTS = np.array([0.0, 4.0, 12.0, 28.0, 60.0, 124.0, 252.0, 508.0, 1020.0])
"""Steps ahead at which load and memory are looked at."""
FOREVER = 1e6
"""Seconds in which a generation without a deadline is planned to be over."""
WEIGHED = 32
"""Waiting prompts that are weighed in one decision."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The rule's parameters.

    Args:
        margin: share of a step's expected seconds that is kept as slack, since steps take longer at times.
        memory: share of the memory that admitted generations are expected to fill at most.
    """

    margin: float = 0.0
    memory: float = 1.0
    pause: float = 2.0

    def decide(self, view: View, model: Generation) -> Decision:
        plan = _Plan(view, model, self)
        plan.keep()
        plan.admit()
        return plan.decision()


@dataclass(slots=True)
class _Plan:
    """One decision in the making."""

    view: View
    model: Generation
    rule: Tokens
    alive: list[Job] = field(default_factory=list)  # decodes that can still be on time
    broken: list[Job] = field(default_factory=list)  # those that cannot
    waiting: list[Job] = field(default_factory=list)
    drop: dict[Job, str] = field(default_factory=dict)
    chosen: dict[Job, float] = field(default_factory=dict)  # prompts in this step, and their tokens
    beside: list[Job] | None = None  # the decodes that they run with; None: to be found
    refused: int = 0

    def keep(self) -> None:
        """Sort out who can still be on time."""
        view, model = self.view, self.model
        now, least = view.now, model.seconds(Step(decodes=1, context=1.0))
        for job in model.decodes:
            (self.broken if job.late or job.due_next - now < least - TICK else self.alive).append(job)
        for job in model.prefills:
            if job.due_next - now >= model.speed * job.work_next - TICK and not job.late:
                self.waiting.append(job)
            elif begun(job) and job.late:
                self.broken.append(job)
            else:
                self.drop[job] = (
                    f"hopeless: its next output needs {job.work_next:.3f} s, due in {job.due_next - now:.3f} s"
                )
        self.alive.sort(key=lambda job: job.due_next)
        self.waiting.sort(key=lambda job: (not begun(job), job.size / job.weight))

    # -- the future -----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Choose the prompts of this step."""
        if not self.waiting:
            return
        future = _Future(self)
        together = self._fill(future, self.alive)
        best, value = (self.alive, together), _worth(together)
        if self.alive:
            hurried = bool(together) and self._hurried(together)
            if len(together) < len(self.waiting) and (urgent := self._urgent()) is not None:
                some = self._fill(future, urgent)
                if _worth(some) > value:
                    best, value = (urgent, some), _worth(some)
            apart = self._fill(future, [])
            if apart and (_worth(apart) > value or (hurried and _worth(apart) == value)):
                best = [], apart
        self.chosen = best[1]
        if self.chosen:
            self.beside = best[0]
        self.refused = len(self.waiting) - len(self.chosen)

    def _urgent(self) -> list[Job] | None:
        """The decodes without which a step as long as the most urgent one can bear makes somebody late."""
        until = self.alive[0].due_next + (1 + self.rule.margin) * self._decode(self.alive)
        some = [job for job in self.alive if job.due_next < until]
        return some if len(some) < len(self.alive) else None

    def _hurried(self, together: dict[Job, float]) -> bool:
        """Whether who comes during a step of prompts and decodes is likely to be late for it."""
        model = self.model
        square = sum((2 * job.progress + size) * size for job, size in together.items())
        reading = sum(job.size for job in self.alive)
        step = model.seconds(Step(len(together), sum(together.values()), square, len(self.alive), reading))
        return _patience(self.view.recent, model) < step

    def _fill(self, future: _Future, decodes: list[Job]) -> dict[Job, float]:
        """The prompts that can be prefilled now, and how much of each, with `decodes` in the same step."""
        view, model = self.view, self.model
        future = future.copy()
        now, margin = view.now, 1 + self.rule.margin
        reading = sum(job.size for job in decodes)
        slack = min((job.due_next for job in decodes), default=math.inf) - now
        if len(decodes) < len(self.alive):
            within = set(decodes)
            others = min(job.due_next for job in self.alive if job not in within)
            slack = min(slack, others - now - self._decode(self.alive) * margin)
        tokens_left = view.pool.step_tokens - len(decodes)
        free = model.room() - sum(model.blocks(job, 1) for job in self.alive)
        seats = model.seats - len(self.alive)
        chosen: dict[Job, float] = {}
        tokens = square = 0.0
        first = math.inf  # when the step must be over for the prompts in it
        for job in self.waiting[:WEIGHED]:
            if seats < 1 or tokens_left < 1:
                break
            size = min(job.size, tokens_left)
            due = min(first, job.due_next - now)
            grown = square + (2 * job.progress + size) * size
            seconds = margin * model.seconds(Step(len(chosen) + 1, tokens + size, grown, len(decodes), reading))
            if seconds > min(slack, due) + TICK or size < job.size:
                limit = min(first, slack)
                size = self._part(job, len(chosen), tokens, square, decodes, slack, limit) if decodes else 0.0
                if not size:
                    continue
                seconds = 0.0
                grown = square + (2 * job.progress + size) * size
            need = model.blocks(job, size)
            if need > free or not future.takes(job, begun(job)):
                continue
            chosen[job] = size
            tokens, square = tokens + size, grown
            tokens_left -= int(size)
            free -= need
            seats -= 1
            first = due if size == job.size else first
        return chosen

    def _part(
        self,
        job: Job,
        prompts: int,
        tokens: float,
        square: float,
        decodes: list[Job],
        slack: float,
        limit: float,
    ) -> float:
        """Tokens of a prompt that fit into this step so that the rest still gets done in time; 0 if it does not."""
        model, margin = self.model, 1 + self.rule.margin
        count, reading = len(decodes), sum(some.size for some in decodes)

        def seconds(size: float) -> float:
            grown = square + (2 * job.progress + size) * size
            return margin * model.seconds(Step(prompts + 1, tokens + size, grown, count, reading))

        low, high = 0, int(min(job.size, self.view.pool.step_tokens - count - tokens))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if seconds(middle) <= limit + TICK else (low, middle - 1)
        if low < 1:
            return 0.0
        step = margin * model.seconds(Step(decodes=count, context=reading))
        each = (seconds(job.size) - step) / job.size  # seconds that a token of the prompt adds
        pace = min(some.slo.step for some in self.alive)
        rest, time = job.size - low, job.due_next - self.view.now - seconds(low)
        if rest <= 0:
            return float(low)
        if pace <= step:
            return 0.0
        left = max(slack - seconds(low), 0.0)
        steps = max(math.ceil((each * rest - left) / (pace - step)), 1) if pace < math.inf else 1
        return float(low) if steps * step + each * rest <= time else 0.0

    # -- the step ---------------------------------------------------------------------------------

    def decision(self) -> Decision:
        jobs: list[Job] = []
        jobs += self._decoding() if self.beside is None else self.beside
        jobs += self.chosen
        if not self.waiting and not self.broken and (wake := self._pause()) is not None:
            return Decision(drop=self.drop, wake_at=wake)
        if not jobs and self.waiting:  # nobody runs: what is there is better than nothing
            job = self.waiting[0]
            jobs, self.chosen = [job], {job: min(job.size, float(self.view.pool.step_tokens))}
        self._late(jobs)
        return Decision(jobs, self.drop, sizes=self.chosen)

    def _pause(self) -> float | None:
        """When the decodes go on, if until then it is better to be ready for who may come.

        Where requests cannot wait for a decode to end before they prefill, and everyone who runs has
        slack for some prefills, the device is left free until a prefill's worth of slack is left.
        """
        if not self.alive or self.alive[0].due_next == math.inf or self.rule.pause <= 0:
            return None
        step = self._decode(self.alive)
        patience = _patience(self.view.recent, self.model)
        if patience >= step:
            return None
        stage = f"{self.model.label}.prefill"
        sizes = [asked.sizes[stage] for asked in self.view.recent if stage in asked.sizes]
        size = sum(sizes) / len(sizes)
        reserve = self.rule.pause * self.model.seconds(Step(1, size, size * size))
        wake = self.alive[0].due_next - (1 + self.rule.margin) * step - reserve
        return wake if wake > self.view.now + TICK else None

    def _decoding(self) -> list[Job]:
        """The running generations that decode: all, unless that would make the most urgent ones late."""
        now, alive = self.view.now, self.alive
        while alive:
            time = alive[0].due_next - now
            count = len(alive)
            if self._decode(alive) <= time + TICK:
                return alive
            low = 1
            while low < count:
                middle = (low + count + 1) // 2
                low, count = (middle, count) if self._decode(alive[:middle]) <= time + TICK else (low, middle - 1)
            first = self._decode(alive[:low])
            if first <= time + TICK:
                return alive[:low]
            alive = alive[1:]
        return []

    def _decode(self, jobs: Sequence[Job]) -> float:
        return self.model.seconds(Step(decodes=len(jobs), context=sum(job.size for job in jobs)))

    def _late(self, jobs: list[Job]) -> None:
        """Who is late goes along where that makes nobody else late, and is given up where room is scarce."""
        if not self.broken:
            return
        now, model = self.view.now, self.model
        scarce = bool(self.refused) or (self.view.pool.memory is not None and self.view.free == 0)
        if scarce:
            for job in self.broken:
                self.drop[job] = "gave way: it was late already, and others had no room"
            return
        late = [job for job in self.broken if job.stage is not None and job.stage.reads]
        again = [job for job in self.broken if job.stage is not None and not job.stage.reads]
        time = min((job.due_next for job in [*self.alive, *self.chosen]), default=math.inf) - now
        decodes = [job for job in jobs if job.stage is not None and job.stage.reads]
        if self.beside is not None and len(self.beside) < len(self.alive):
            return
        square = sum((2 * job.progress + size) * size for job, size in self.chosen.items())
        tokens, prompts = sum(self.chosen.values()), len(self.chosen)
        reading = sum(job.size for job in decodes)
        for job in late[: max(model.seats - len(jobs), 0)]:
            step = Step(prompts, tokens, square, len(decodes) + 1, reading + job.size)
            if jobs and model.seconds(step) > time:
                break
            jobs.append(job)
            decodes.append(job)
            reading += job.size
        if again and not jobs:
            jobs.append(again[0])
            self.chosen[again[0]] = min(again[0].size, float(self.view.pool.step_tokens))


def _worth(some: dict[Job, float]) -> float:
    return sum(job.weight for job in some)


def _patience(recent: tuple[Asked, ...], model: Generation) -> float:
    """Seconds that half of the latest requests could wait before their prefill; inf if they were promised nothing."""
    stage = f"{model.label}.prefill"
    spare = sorted(
        asked.first - model.seconds(Step(1, size, size * size))
        for asked in recent
        if (size := asked.sizes.get(stage)) is not None
    )
    return spare[len(spare) // 2] if spare else math.inf


class _Future:
    """The generations that are promised, some steps ahead: how many are left, what they read, what time they have."""

    def __init__(self, plan: _Plan) -> None:
        view, model = plan.view, plan.model
        self.plan = plan
        lengths = view.lengths.get(model.label)
        self.lengths = lengths if lengths is not None else Lengths()
        most = max((job.left.get(f"{model.label}.decode", 1) for job in [*plan.alive, *plan.waiting]), default=1)
        self.points = POINTS[: int(np.searchsorted(POINTS, most)) + 1]
        memory = view.pool.memory
        self.units = math.inf if memory is None else memory.units * plan.rule.memory
        self.block = 0 if memory is None else memory.block
        alive = plan.alive
        self.count, self.context, self.time = self._of(
            alive, np.array([job.due_next - view.now - job.slo.step for job in alive])
        )

    def _of(self, jobs: Sequence[Job], slack: Floats) -> tuple[Floats, Floats, Floats]:
        """How many of `jobs` are left at each point, their tokens, and the least time that one of them has."""
        points = self.points
        if not jobs:
            return np.zeros(len(points)), np.zeros(len(points)), np.full(len(points), math.inf)
        label = self.plan.model.label
        run = np.array([float(job.run) for job in jobs])
        left = np.array([float(self._left(job, label)) for job in jobs])
        size = np.array([job.size + job.progress for job in jobs])
        pace = np.array([job.slo.step for job in jobs])
        there = self.lengths.ahead(run, points)
        there[points[None, :] > left[:, None]] = 0.0
        steps = points[None, :] + 1
        with np.errstate(invalid="ignore"):
            time = np.where(there >= 0.5, slack[:, None] + pace[:, None] * steps, math.inf)
        return there.sum(0), (there * (size[:, None] + points)).sum(0), np.nan_to_num(time, nan=math.inf).min(0)

    @staticmethod
    def _left(job: Job, label: str) -> int:
        return max(job.left.get(f"{label}.decode", 1), 1)

    def copy(self) -> _Future:
        other: _Future = object.__new__(_Future)
        for name in ("plan", "lengths", "points", "units", "block", "count", "context", "time"):
            setattr(other, name, getattr(self, name))
        return other

    def takes(self, job: Job, committed: bool) -> bool:
        """Take in one more generation if all keep pace and have memory; one that is `committed` always."""
        view = self.plan.view
        slack = np.array([job.due_next - view.now])
        count, context, time = self._of([job], slack)
        count, context, time = self.count + count, self.context + context, np.minimum(self.time, time)
        if not committed and not (self._memory(count, context) and self._pace(count, context, time)):
            return False
        self.count, self.context, self.time = count, context, time
        return True

    def _memory(self, count: Floats, context: Floats) -> bool:
        return bool((context + count * self.block / 2 <= self.units).all())

    def _pace(self, count: Floats, context: Floats, time: Floats) -> bool:
        """Whether steps of all that are left, one after the other, keep to the time that there is."""
        model = self.plan.model
        margin = 1 + self.plan.rule.margin
        seconds = [
            margin * model.seconds(Step(decodes=max(round(n), 1), context=max(c, 1.0)))
            for n, c in zip(count.tolist(), context.tolist(), strict=True)
        ]
        spent = before = 0.0
        for at, (one, limit) in enumerate(zip(seconds, time.tolist(), strict=True)):
            steps = float(self.points[at] - self.points[at - 1]) if at else 1.0
            spent += steps * (one + (before or one)) / 2
            before = one
            if spent > limit + TICK:
                return False
        return True
