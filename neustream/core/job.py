"""A request on its way through its graph, as policies and graph conditions may read it.

Only the scheduler (and `work.Walk`, which walks one job alone) writes a job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

from neustream.core.graph import Stage
from neustream.core.seen import UNSEEN, Seen
from neustream.core.types import SLO, TICK, Request

Status = Literal[
    "waiting",
    "running",
    "held",
    "away",
    "forked",
    "done",
    "dropped",
    "failed",
    "cancelled",
    "gone",
]


class Job:
    """A request on its way through its graph.

    Attributes:
        stage: the stage it waits for or runs in; None once it has ended, and while it is forked.
        state: what its steps returned, merged; `output`: the latest output; `outputs`: how many.
        calls_left: expected calls ahead by stage, the current one included.
        remaining_s, next_output_s: seconds of those calls run alone (batch 1), to the end and to
            the next output.
        unit_s: seconds of one whole call of its stage alone.
        planned_calls, alone_s: what `calls_left` and `remaining_s` were when it came.
        due, due_next: deadlines of the end and of the next output.
        computed: units of a step in parts that are done (chunked prefill).
        call_outputs: outputs of the model call that it is in; first_at: when the first of them
            came.
        leg: the part of its graph that it is in, where parts have promises of their own; "": the
            whole is the only one.
        leg_since, leg_base: when that began, by what is promised, and the outputs before it.
        leg_due: by when it should be over, so that what follows can be in time; leg_latest: by
            when it has to be, if that ran alone, with generations as short as the shortest that
            were seen; both as `due` where there are no legs.
        leg_until: by when it has to be over by the SLOs of the calls that it is in.
        leg_late: whether an output of it was late.
        asked: what its SLO, and that of the call that it is in, promise of outputs.
        later: of `calls_left`, those of other legs.
        sizes_ahead: expected sizes of stages in calls with params of their own, by stage.
        history: what its scheduler has seen of graphs.
        num_blocks: blocks of its pool's KV cache that it holds; host_blocks: of those that it lost,
            kept in the host's memory.
        slo: what it is promised; nothing from the moment that its promise was given up.
        promised: whether it is promised anything.
        joined_at: when it came to its stage; skipped: steps of that stage that ran without it
            since.
        started_at: when it first ran; worker: who ran it last in its present pool; -1: nobody yet.
    """

    __slots__ = (
        "alone_s",
        "arrival",
        "asked",
        "call_outputs",
        "calls_left",
        "computed",
        "due",
        "due_next",
        "ended_at",
        "first_at",
        "history",
        "host_blocks",
        "id",
        "joined_at",
        "late",
        "later",
        "leg",
        "leg_base",
        "leg_due",
        "leg_late",
        "leg_latest",
        "leg_since",
        "leg_until",
        "next_output_s",
        "num_blocks",
        "output",
        "outputs",
        "params",
        "planned_calls",
        "promised",
        "reason",
        "remaining_s",
        "request",
        "sizes_ahead",
        "slo",
        "stage",
        "started_at",
        "state",
        "status",
        "unit_s",
        "weight",
        "worker",
    )

    def __init__(self, request: Request) -> None:
        slo = self.asked = request.slo
        self.request = request
        self.history: Seen = UNSEEN
        self.id = request.id
        self.params = request.params
        self.arrival = request.arrival
        self.slo = slo
        self.weight = slo.weight
        self.promised = slo.promises or request.graph.promises
        self.due = self.leg_due = self.leg_latest = request.arrival + slo.total
        self.due_next = min(self.due, request.arrival + slo.first)
        self.leg = ""
        self.leg_since = request.arrival
        self.leg_base = 0
        self.leg_until = math.inf
        self.leg_late = False
        self.later: Mapping[str, int] = {}
        self.sizes_ahead: Mapping[str, float] = {}
        self.status: Status = "waiting"
        self.reason = ""
        self.state: MutableMapping[str, Any] = {}
        self.output: Mapping[str, Any] | None = None
        self.outputs = 0
        self.late = False
        self.call_outputs = 0
        self.first_at = -math.inf
        self.num_blocks = 0
        self.host_blocks = 0
        self.stage: Stage | None = None
        self.planned_calls: Mapping[str, int] = {}
        self.calls_left: MutableMapping[str, int] = {}
        self.alone_s = 0.0
        self.remaining_s = 0.0
        self.next_output_s = 0.0
        self.unit_s = 0.0
        self.computed = 0.0
        self.joined_at = request.arrival
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.worker = -1

    @property
    def skipped(self) -> int:
        """Steps of its stage that ran without it since it joined that stage's queue."""
        return 0

    @property
    def begun(self) -> bool:
        """Whether any of its request has run."""
        return self.started_at is not None

    @property
    def joins(self) -> Job | None:
        """What goes on once this branch of it and others are over; None: it is no branch."""
        return None

    @property
    def needed_by(self) -> Job:
        """The job that cannot be done without this one: itself, or that of which it is a branch."""
        return self

    @property
    def ran_last(self) -> bool:
        """Whether it was in the latest step of its stage."""
        return False

    @property
    def size(self) -> float:
        """Its share of the profile's second axis in its next step; 0 for stages without sizes."""
        if self.stage is None or self.stage.size is None:
            return 0.0
        return self.stage.size_of(self) - self.computed

    def size_ahead(self, stage: Stage) -> float:
        """The size of a step of `stage`, which may be in a call that it has not come to."""
        size = self.sizes_ahead.get(stage.name)
        return stage.size_of(self) if size is None else size

    @property
    def kept(self) -> float:
        """Tokens that it keeps in its pool's KV cache while it waits."""
        if self.stage is None or not self.stage.caches:
            return 0.0
        return self.size - 1 if self.stage.phase == "decode" else self.computed

    @property
    def released(self) -> bool:
        """Whether it was promised something, and goes on without that."""
        return not self.promised and (self.request.slo.promises or self.request.graph.promises)

    def release(self) -> None:
        """Its promise will not be kept: what is left of it is served without one."""
        self.late = True
        self.promised = False
        self.slo = SLO(weight=self.slo.weight, name=self.slo.name)
        self.due = self.due_next = math.inf
        self.leg_due = self.leg_latest = self.leg_until = math.inf

    @property
    def on_time(self) -> bool:
        """Whether it ended with every promise kept."""
        return self.status == "done" and not self.late

    @property
    def deadline(self) -> float:
        """By when it must end to keep every promise: when its last output is due, if each is."""
        if self.due_next >= self.due:
            return self.due
        rest = self.remaining_s - self.next_output_s
        if self.slo.step < math.inf:
            stages = self.request.graph.stages
            outputs = sum(n for name, n in self.calls_left.items() if stages[name].emits)
            rest = max(rest, self.slo.step * (outputs - 1))
        return min(self.due, self.due_next + rest)

    def slack(self, now: float) -> float:
        """Seconds it can still idle, were each of its steps run alone; negative: hopeless."""
        return min(self.due - self.remaining_s, self.due_next - self.next_output_s) - now

    def take_output(self, update: Mapping[str, Any], now: float) -> bool:
        """Note that its stage emitted `update`; whether that was late."""
        due = self.due_next if self.promised else self._output_due()
        late = now > due + TICK
        if late:
            self.late = self.leg_late = True
        self.output = update
        self.outputs += 1
        if not self.call_outputs:
            self.first_at = now
        self.call_outputs += 1
        due = self.due if self.due < self.leg_until else self.leg_until
        if self.slo.step < math.inf:
            due = min(due, self.output_due(self.outputs))
        self.due_next = due
        return late

    def take_end(self, now: float) -> None:
        """Note that it came to the end of its graph; its state is the answer if nothing else is."""
        if self.request.graph.collects:
            self.output = dict(self.state)
        if self.output is None:
            self.output = dict(self.state)
            self.late = self.late or now > self.due_next + TICK
        self.late = self.late or now > self.due + TICK

    def _output_due(self) -> float:
        """When its next output is due by what its caller was promised, kept up or not."""
        if not self.released:
            return self.due_next
        index = self.outputs - self.leg_base
        due = self.arrival + self.request.slo.total
        if not index:
            return min(due, self.leg_since + self.asked.first)
        if self.asked.step == math.inf:
            return due
        return min(due, self.leg_since + self.asked.first + index * self.asked.step)

    def output_due(self, index: int) -> float:
        """When output `index` (from 0) is due by the promise of a pace; inf without one."""
        if self.slo.step == math.inf:
            return math.inf
        return self.leg_since + self.slo.first + (index - self.leg_base) * self.slo.step

    @property
    def first_due(self) -> float:
        """When the first output of the leg that it is in is due, came it or not."""
        return min(self.due, self.leg_since + self.slo.first)

    def calls_here(self, stage: str) -> int:
        """Expected calls of a stage that are left of the leg that it is in."""
        return self.calls_left.get(stage, 0) - self.later.get(stage, 0)

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.status}, {self.stage})"
