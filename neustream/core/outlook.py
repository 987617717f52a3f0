"""What a scheduler tells of itself, and what a router knows of a request. Pure.

An `Outlook` is a frozen value with numbers, no jobs. All times in it are relative to `sent_at`.
`forecasts.py` says what would become of a request there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import field
from typing import Any

from neustream.core.demand import Calls
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.rates import Rates
from neustream.core.record import record
from neustream.core.scheduler import Scheduler
from neustream.core.step_times import StepTimes
from neustream.core.types import SLO, TICK

FOREVER = 1e6
"""Seconds within which a request without a deadline is planned to be done."""


@record()
class Asked:
    """What a router knows of a request.

    Args:
        calls: expected calls ahead by stage, in their order. `stage`: the next one.
        due_in, first_in: seconds until its end and its first output are due; inf: never.
        step: seconds that it was promised between outputs; inf: nothing.
        tokens: of its context, what it keeps in the KV cache once it is prefilled; 0: it has none.
        params: the caller's.
    """

    id: str
    calls: Mapping[str, Calls]
    stage: str = ""
    due_in: float = math.inf
    first_in: float = math.inf
    step: float = math.inf
    weight: float = 1.0
    tokens: float = 0.0
    slo: SLO = field(default_factory=SLO)
    params: Mapping[str, Any] = field(default_factory=dict)

    def steps(self, graph: Graph) -> int:
        """Expected calls of looped stages of `graph`; of all stages, where none is looped."""
        looped = graph.looped
        return sum(
            [each.count for name, each in self.calls.items() if name in looped or not looped]
        )

    def aged(self, seconds: float) -> Asked:
        """The same some seconds later."""
        due_in, first_in = self.due_in - seconds, self.first_in - seconds
        return Asked(
            self.id,
            self.calls,
            self.stage,
            due_in,
            first_in,
            self.step,
            self.weight,
            self.tokens,
            self.slo,
            self.params,
        )


@record()
class LineOutlook:
    """The requests with a promise that have a looped stage ahead, in order of the steps left.

    `due_in`: seconds until their loops must be over; `behind`: seconds of what comes after.
    """

    stage: str
    left: tuple[float, ...]
    due_in: tuple[float, ...]
    behind: tuple[float, ...]
    weight: tuple[float, ...]


@record()
class TextOutlook:
    """A language model at an instance.

    Args:
        decodes, context: requests that decode, and the tokens of context that they read.
        prompts, prompt_tokens: requests in front of or in their prefill, and tokens left of them.
        evicted: those of them that decoded before and lost their KV blocks.
        blocks, free: all KV blocks, and those that nobody holds; 0: memory is no limit.
        waiting_blocks: that the prompts which hold none yet will need.
        block_size: tokens of a block.
        spare: per decode, the least seconds that a step may take so that each output is in time.
    """

    model: str
    decodes: int = 0
    context: float = 0.0
    prompts: int = 0
    prompt_tokens: float = 0.0
    evicted: int = 0
    blocks: int = 0
    free: int = 0
    waiting_blocks: int = 0
    block_size: int = 16
    spare: float = math.inf


@record()
class Outlook:
    """What an instance tells of itself.

    Args:
        sent_at: on the cluster's clock.
        heard: the number of the latest request sent there that it knows of.
        until: seconds until the step under way ends, by what is expected of it.
        backlog: device seconds of all calls of the live requests, in efficient batches.
        live, waiting: requests there, and those that have not begun.
        speed: how many times their profiled latency steps of a stage take.
        failing: stages whose steps there fail, one after the other.
    """

    instance: str
    sent_at: float = 0.0
    heard: int = 0
    until: float = 0.0
    backlog: float = 0.0
    live: int = 0
    waiting: int = 0
    lines: tuple[LineOutlook, ...] = ()
    texts: tuple[TextOutlook, ...] = ()
    speed: Mapping[str, float] = field(default_factory=dict)
    failing: tuple[str, ...] = ()


# -- made ------------------------------------------------------------------------------------------


def outlook_of(
    scheduler: Scheduler,
    instance: str,
    rates: Rates,
    now: float,
    *,
    heard: int,
    sent_at: float,
    failing: tuple[str, ...] = (),
) -> Outlook:
    """What a scheduler has to tell at `now` on its own clock."""
    jobs = list(scheduler.jobs.values())
    times = scheduler.times
    speed = times.speed
    ends = [times.over_at(batch) for batch in scheduler.running]
    return Outlook(
        instance,
        sent_at,
        heard,
        max(max(ends, default=now) - now, 0.0),
        _backlog(jobs, rates, speed, scheduler.away),
        len(jobs),
        len([job for job in jobs if job.started_at is None]),
        _lines(jobs, times, now),
        tuple(_texts(scheduler, jobs, now)),
        {stage: value for stage, value in speed.items() if abs(value - 1.0) > 0.01},
        failing,
    )


def _backlog(
    jobs: Iterable[Job], rates: Rates, speed: Mapping[str, float], away: Set[str]
) -> float:
    """Seconds of all that lies ahead of jobs, but for stages that are served elsewhere."""
    calls: dict[str, float] = {}
    first: dict[str, Job] = {}
    for job in jobs:
        for name, count in job.calls_left.items():
            if name in calls:
                calls[name] += count
            else:
                calls[name], first[name] = count, job
    seconds = 0.0
    for name, job in first.items():
        if name in rates.profiles and name not in away:
            stage = job.request.graph.stages[name]
            size = 0.0 if stage.size is None else job.size_ahead(stage)
            each = rates.efficient(name, stage.max_batch, size)
            seconds += calls[name] * each * speed.get(name, 1.0)
    return seconds


def _lines(jobs: Iterable[Job], times: StepTimes, now: float) -> tuple[LineOutlook, ...]:
    """The promised jobs by the looped stage that they are at or get to, but for generations."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    hopeless, forever = now - TICK, now + FOREVER
    for job in jobs:
        due, remaining_s = job.due, job.remaining_s
        late = due - remaining_s < hopeless or job.due_next - job.next_output_s < hopeless
        if late or not job.promised:
            continue
        stage = _line_of(job)
        if stage is None:
            continue
        left = float(job.calls_left[stage.name])
        size = 0.0 if stage.size is None else job.size_ahead(stage)
        behind = max(remaining_s - left * times.alone(stage, size), 0.0)
        due = min(due if due <= job.due_next else job.deadline, forever)
        row = left, due - now - behind, behind, job.weight
        if stage.name in rows:
            rows[stage.name].append(row)
        else:
            rows[stage.name] = [row]
    lines = []
    for name, found in rows.items():
        found.sort()
        lines.append(LineOutlook(name, *zip(*found, strict=True)))
    return tuple(lines)


def _line_of(job: Job) -> Stage | None:
    """The looped stage that a job is at or gets to; None: a generation's, or none."""
    graph = job.request.graph
    looped = graph.looped
    for name in job.calls_left:
        if name in looped:
            stage = graph.stages[name]
            return None if stage.caches else stage
    return None


def _texts(scheduler: Scheduler, jobs: Sequence[Job], now: float) -> Iterable[TextOutlook]:
    caches = scheduler.kv_caches
    by_model: dict[str, list[Job]] = {model: [] for model in caches}
    for job in jobs:
        stage = job.stage
        if stage is not None and stage.phase != "step":
            by_model.setdefault(stage.model, []).append(job)
    if not by_model:
        return
    used = scheduler.kv_blocks
    for model, found in by_model.items():
        yield _text(model, found, caches.get(model), used.get(model, (0, 0)), now)


def _text(
    model: str, jobs: Sequence[Job], cache: KVCache | None, blocks: tuple[int, int], now: float
) -> TextOutlook:
    decodes = [job for job in jobs if job.stage is not None and job.stage.phase == "decode"]
    prompts = [job for job in jobs if job.stage is not None and job.stage.phase == "prefill"]
    size = 16 if cache is None else cache.block_size
    waiting = 0
    for job in prompts:
        if not job.num_blocks and job.status != "running":
            waiting += -int(-job.size // size)
    paces = [job.due_next - now for job in decodes if job.due_next < math.inf]
    return TextOutlook(
        model,
        len(decodes),
        sum([job.size for job in decodes]),
        len(prompts),
        sum([job.size for job in prompts]),
        sum([job.call_outputs > 0 for job in prompts]),
        blocks[1],
        blocks[1] - blocks[0],
        waiting,
        size,
        min(paces, default=math.inf),
    )
