"""The nouns: what was promised (SLO), what was asked (Request), how it goes (Job), one step (Batch).

`Job` is the only mutable one, and only `Scheduler` writes it. Times are seconds: `arrival`,
`*_at` and `now` are instants on the engine's clock, `due*` are deadlines, plain words durations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.core.graph import Cursor, Graph, Stage
from neustream.errors import RequestError

Status = Literal["waiting", "running", "done", "dropped", "failed", "cancelled"]
TICK = 1e-9
"""Seconds by which an instant may pass a deadline: sums of latencies are no finer than this."""


@dataclass(frozen=True, slots=True)
class SLO:
    """What a request was promised, as durations from its arrival; `inf` promises nothing.

    Output k (from 0) is due at `arrival + first + k * step`, so that an early token buys slack;
    everything is due at `arrival + total`. A request of `weight` 10 is worth ten. `name` is the
    SLO class that reports group by.
    """

    total: float = math.inf
    first: float = math.inf
    step: float = math.inf
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        for what in ("total", "first", "step", "weight"):
            value = getattr(self, what)
            if not value > 0:
                raise RequestError(f"SLO: {what} must be greater than 0, got {value!r}")
        if math.isinf(self.weight):
            raise RequestError("SLO: weight must be finite, got inf")
        if self.step < math.inf and self.first == math.inf:
            raise RequestError(f"SLO: step={self.step!r} needs first: output k is due at first + k * step")


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for. `params` is the caller's own; graphs and modules read it, core never."""

    id: str
    graph: Graph
    arrival: float = 0.0
    slo: SLO = SLO()
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival) and self.arrival >= 0):
            raise RequestError(f"request {self.id!r}: arrival must be a finite time >= 0, got {self.arrival!r}")


class Job:
    """A request on its way through its graph.

    What policies read:
        stage: the stage it waits for or runs in (None once it has ended).
        left: expected calls ahead, by stage name, the current one included.
        work, work_next: seconds of those calls run alone (batch 1), to the end and to the next output.
        total, solo: what `left` and `work` were when it came.
        due, due_next: deadlines of the end and of the next output.
        progress, share: how much of a step in parts is done (chunked prefill), and how much of it the step
            under way does.
        first_at: when the first output of that call came.
        run: outputs of the model call that it is in (of all, for graphs with one); `outputs` counts all.
        held: blocks of its pool's memory that it holds.
        joined_at: when it came to its stage; skipped: steps of that stage that ran without it since.
        started_at: when it first ran (None: never).
        worker: the worker of its present pool that ran it last (-1: none yet).
    """

    __slots__ = (
        "arrival",
        "base",
        "cursor",
        "due",
        "due_next",
        "ended_at",
        "ending",
        "first_at",
        "held",
        "id",
        "joined_at",
        "late",
        "left",
        "output",
        "outputs",
        "params",
        "progress",
        "queue",
        "reason",
        "request",
        "round",
        "run",
        "share",
        "slo",
        "solo",
        "stage",
        "started_at",
        "state",
        "status",
        "total",
        "unit",
        "unit_size",
        "weight",
        "work",
        "work_next",
        "worker",
    )

    def __init__(self, request: Request) -> None:
        slo = request.slo
        self.request = request
        self.id = request.id
        self.params = request.params
        self.arrival = request.arrival
        self.slo = slo
        self.weight = slo.weight
        self.due = request.arrival + slo.total
        self.due_next = min(self.due, request.arrival + slo.first)
        self.status: Status = "waiting"
        self.reason = ""
        self.state: dict[str, Any] = {}
        self.output: Mapping[str, Any] | None = None
        self.outputs = 0
        self.late = False
        self.ending: tuple[Status, str] | None = None  # how it ends once the step under way is over
        self.run = 0
        self.first_at = -math.inf
        self.held = 0
        self.stage: Stage | None = None
        self.total: Mapping[str, int] = {}
        self.left: dict[str, int] = {}
        self.solo = 0.0
        self.work = 0.0
        self.work_next = 0.0
        self.unit = 0.0  # seconds of one call of its stage alone, for a step of `unit_size`
        self.unit_size = -1.0  # not asked yet
        self.progress = 0.0
        self.share = 0.0
        self.joined_at = request.arrival
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.worker = -1
        self.queue: Queue = _NOWHERE
        self.base = 0  # rounds of the queue that do not count as skipped
        self.round = -1  # the queue's round that it last ran in
        self.cursor: Cursor | None = None

    @property
    def skipped(self) -> int:
        """Steps of its stage that ran without it since it joined that stage's queue."""
        return self.queue.rounds - self.base

    @property
    def ran_last(self) -> bool:
        """Whether it was in the latest step of its stage."""
        return self.round == self.queue.rounds

    @property
    def size(self) -> float:
        """Its share of the profile's second axis in its next step (0 for stages without one)."""
        if self.stage is None or self.stage.size is None:
            return 0.0
        return (self.unit_size if self.unit_size >= 0 else self.stage.size_of(self)) - self.progress

    @property
    def on_time(self) -> bool:
        """Whether it ended with every promise kept."""
        return self.status == "done" and not self.late

    @property
    def deadline(self) -> float:
        """By when it has to be over so that no promise is broken: the last output's, if each has its own."""
        if self.due_next >= self.due:
            return self.due
        rest = self.work - self.work_next
        if self.slo.step < math.inf:
            stages = self.request.graph.stages
            outputs = sum(calls for name, calls in self.left.items() if stages[name].emits)
            rest = max(rest, self.slo.step * (outputs - 1))
        return min(self.due, self.due_next + rest)

    def slack(self, now: float) -> float:
        """Seconds it can still idle, were each of its steps run alone; negative: hopeless."""
        return min(self.due - self.work, self.due_next - self.work_next) - now

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.status}, {self.stage})"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a request asked for when it came: `calls` by stage of `graph`, within `budget` seconds from `at`.

    Its first output was promised within `first` seconds.

    `sizes` are those of its steps in stages that have sizes, as far as they could be told then.
    """

    at: float
    budget: float
    weight: float
    graph: Graph
    calls: Mapping[str, int]
    sizes: Mapping[str, float] = field(default_factory=dict)
    first: float = math.inf


class Queue:
    """The jobs that are at one stage, in the order they came; `rounds` counts the stage's steps."""

    __slots__ = ("jobs", "rounds")

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.rounds = 0


_NOWHERE = Queue()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step: these jobs, each at its own `stage`, together on one worker.

    `stage` names the stage, or the `fuse` label when several stages share the step. `sizes` holds
    how much of the profile's second axis each job gets in this step. `expected` is the profile's
    latency in seconds, `started_at + expected` when it should end. `evicted` lost their memory to it:
    what they kept is to be forgotten before it runs. `profiled` are the seconds that the profile as it
    was given says, where `expected` is from what was learnt since; 0 if that is the same.
    """

    id: int
    pool: str
    worker: int
    stage: str
    jobs: tuple[Job, ...]
    sizes: tuple[float, ...]
    started_at: float
    expected: float
    evicted: tuple[Job, ...] = ()
    profiled: float = 0.0

    def __len__(self) -> int:
        return len(self.jobs)
