"""What a scheduler tells of: frozen values with ids and numbers. No live job is in them.

`member`, of all of them, names the instance that the scheduler is part of (the engine does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from neustream.core.job import Job, Status
from neustream.core.record import record
from neustream.core.types import SLO, TICK

Update = Mapping[str, Any]
Code = Literal["done", "unattainable", "late", "crowded", "failed", "cancelled"]
"""How a request ended.

Of those that a policy gave up: alone it would have been late (unattainable), it ran and would be
late (late), or others took its time (crowded).
"""


@record()
class Submitted:
    """A request was accepted. `due`: its deadline, inf without one.

    `steps`: calls of looped stages that it is expected to take, of all stages where none is looped.
    """

    id: str
    graph: str
    arrival: float
    due: float
    slo: SLO
    steps: int
    at: float
    member: str = ""


@record()
class Emitted:
    """A request produced output number `index` (from 0); `late`: after that one's deadline.

    `age`: seconds since the request came; `branch` of its `par`, and `leg` (call),
    that made it; `place`: its number (from 0) among the outputs of that leg.
    """

    id: str
    index: int
    update: Update
    at: float
    age: float
    late: bool = False
    member: str = ""
    branch: str = ""
    leg: str = ""
    place: int = 0


@record()
class Ended:
    """A request is over. `output`: its last one, None unless done; `latency_s`: since it came.

    `waited_s`: from then until it first ran, None: it never did; `attainable`: whether its promise
    could have been kept, had it been alone; `outputs`: how many it made.
    """

    id: str
    status: Status
    reason: str
    output: Update | None
    on_time: bool
    arrival: float
    at: float
    slo: SLO
    steps: int
    member: str = ""
    waited_s: float | None = None
    attainable: bool = True
    outputs: int = 0

    @property
    def latency_s(self) -> float:
        return self.at - self.arrival

    @property
    def started(self) -> bool:
        """Whether it ever ran."""
        return self.waited_s is not None

    @property
    def code(self) -> Code:
        """What became of it, for programs."""
        if self.status == "dropped":
            if not self.attainable:
                return "unattainable"
            return "late" if self.started else "crowded"
        return cast(Code, self.status)


@record()
class LegEnded:
    """A request is through a part of its graph that has a promise of its own (`Graph.legs`).

    `began`: when it got there; `due`: by when it should have been through, so that what follows can
    be in time; `first_at`: when its first output came, None without; `late`: whether it broke a
    promise, or its request did not go on; `status`: "done", or how its request ended in it; `job`:
    what its steps called it; `freed`: whether it kept something in a KV cache that is free now.
    """

    id: str
    leg: str
    began: float
    due: float
    first_at: float | None
    outputs: int
    late: bool
    status: Status
    at: float
    branch: str = ""
    member: str = ""
    job: str = ""
    freed: bool = False


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A branch of a request's `par` is over.

    `branch`: its name, "a/b" of a branch in another; `job`: what its steps call it; `late`: whether
    it broke a promise; `decided`: whether the par was over by it.
    """

    id: str
    branch: str
    job: str
    status: Status
    reason: str
    late: bool
    decided: bool
    at: float
    member: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """A request that is in a step ends once that is over: what it makes is of no use to anybody.

    `job`: what the step calls it, or the branch of it that ends; `pool`: where that runs.
    """

    id: str
    job: str
    pool: str
    at: float
    member: str = ""


@dataclass(frozen=True, slots=True)
class Corrected:
    """A profile was corrected. `factors`: observed over profiled seconds at batches near 2**key."""

    stage: str
    factors: Mapping[int, float]
    at: float
    member: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """A request waits at a step boundary and can be given; it is in no view."""

    id: str
    at: float
    member: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """A request's next stage is served elsewhere: it waits to be given."""

    id: str
    stage: str
    at: float
    member: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """A request left for another scheduler; here it is forgotten."""

    id: str
    at: float
    member: str = ""


Event = (
    Submitted | Emitted | LegEnded | BranchEnded | Ending | Ended | Corrected | Held | Left | Given
)


def planned_steps(job: Job) -> int:
    """Calls of looped stages that were ahead of a request when it came; of all, if none loops."""
    looped = job.request.graph.looped
    return sum(calls for stage, calls in job.planned_calls.items() if stage in looped or not looped)


def submitted(job: Job, now: float) -> Submitted:
    """The record of a job that was just accepted."""
    return Submitted(
        job.id, job.request.graph.name, job.arrival, job.due, job.slo, planned_steps(job), now
    )


def ended(job: Job, now: float) -> Ended:
    """The record of a job that has just ended."""
    output = job.output if job.status == "done" else None
    return Ended(
        job.id,
        job.status,
        job.reason,
        output,
        job.on_time,
        job.arrival,
        now,
        job.request.slo,
        planned_steps(job),
        waited_s=None if job.started_at is None else job.started_at - job.arrival,
        attainable=attainable(job),
        outputs=job.outputs,
    )


def attainable(job: Job) -> bool:
    """Whether it could have kept its promise alone, as far as can be told of one that ended."""
    if job.alone_s > job.slo.total + TICK:
        return False
    if job.started_at is not None:  # what it had ahead when it came is not known any more
        return True
    return job.next_output_s <= job.slo.first + TICK
