"""One step: the jobs that run in it, and what stream modules and observers are told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neustream.core.job import Job
from neustream.core.record import record
from neustream.core.steps import Step
from neustream.errors import NeustreamError, StageFailed, told


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a stream module is given of one request in a step; plain data, so it can leave the
    process.

    Args:
        id: the request's.
        params: the caller's; `state`: what earlier steps returned, merged. Both are read, not
            written.
        stage: the stage that the request is at (several stages of one model may share a step).
        size: tokens (or other units) that this step does of it; 0 for stages without sizes.
        computed: units of the step's whole that earlier parts did; `whole`: all of them. The step
            is complete if `computed + size == whole`.
        outputs: outputs of this model call so far.
    """

    id: str
    params: Mapping[str, Any]
    state: Mapping[str, Any]
    stage: str
    size: float = 0.0
    computed: float = 0.0
    whole: float = 0.0
    outputs: int = 0


@record()
class StepInfo:
    """A step as observers see it: ids and numbers, no live jobs. Seconds.

    `profiled_s`: what the profile as it was given says; `expected_s`: what was learnt since.
    `preempted`: requests that lost their KV blocks to it. `planned`: decided while the step before
    it ran. `aside`: of those that lost their blocks, requests whose KV went to the host's memory.
    """

    id: int
    pool: str
    worker: int
    stage: str
    ids: tuple[str, ...]
    sizes: tuple[float, ...]
    started_at: float
    expected_s: float
    profiled_s: float
    preempted: tuple[str, ...] = ()
    planned: bool = False
    aside: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@record(eq=False)
class Batch:
    """One step: these jobs, each at its own `stage`, together on one worker.

    Args:
        stage: the stage's name, or the `model` of several stages that share the step.
        sizes: how much of the profile's second axis each job gets in this step.
        expected: seconds that it should take; `started_at + expected` is when it should end.
        preempted: jobs that lost their KV blocks to it; modules forget theirs before it runs.
        profiled: seconds by the profile as it was given, where `expected` is from what was learnt.
        planned: whether it was decided while the step before it ran.
        aside: of the preempted, those whose tokens modules keep in the host's memory.
        step: what a language model computes in it, where that is known.
        since: when the step before it ended, if some of its jobs waited then; inf: its worker had
            nothing to do. What is decided and handed over in between is part of what it takes.
        quiet: whether it was said beforehand that it returns nothing (`Scheduler.foresee`). Its
            jobs, but for their ids, are then as they were some steps ago.
    """

    id: int
    pool: str
    worker: int
    stage: str
    jobs: tuple[Job, ...]
    sizes: tuple[float, ...]
    started_at: float
    expected: float
    preempted: tuple[Job, ...] = ()
    profiled: float = 0.0
    planned: bool = False
    aside: tuple[Job, ...] = ()
    step: Step | None = None
    since: float = math.inf
    quiet: bool = False

    @property
    def begun_at(self) -> float:
        """`since`, or if that is not known when it started."""
        since, started_at = self.since, self.started_at
        return since if since < started_at else started_at

    def __len__(self) -> int:
        return len(self.jobs)

    def info(self) -> StepInfo:
        """The same without live jobs."""
        return StepInfo(
            self.id,
            self.pool,
            self.worker,
            self.stage,
            tuple([job.id for job in self.jobs]),
            self.sizes,
            self.started_at,
            self.expected,
            self.profiled or self.expected,
            tuple([job.id for job in self.preempted]),
            self.planned,
            tuple([job.id for job in self.aside]),
        )

    def inputs(self) -> tuple[StepInput, ...]:
        """What the stream module of this step is given, in the order of `jobs`."""
        return tuple([input_of(job, size) for job, size in zip(self.jobs, self.sizes, strict=True)])


def input_of(job: Job, size: float | None = None) -> StepInput:
    """What a module is given of `job`: `size` units of its step, by default all that is left."""
    stage = job.stage
    assert stage is not None
    left = job.size
    return StepInput(
        job.id,
        job.params,
        job.state,
        stage.name,
        left if size is None else size,
        job.computed,
        job.computed + left,
        job.call_outputs,
    )


def no_update(stage: str, update: object) -> str:
    """Why a request fails whose step returned `update`, which is no mapping."""
    if isinstance(update, NeustreamError):
        return str(update)
    return f"stage {stage!r} must return one dict per job, got {type(update).__name__}"


def read_update(job: Job, stage: str, update: Mapping[str, Any]) -> None:
    """Merge an update of a class of its own into the state; StageFailed if that raises."""
    try:
        job.state.update(update)
    except BaseException as error:
        text = f"stage {stage!r}: what it returned cannot be read: {told(error)}"
        raise StageFailed(text) from error
