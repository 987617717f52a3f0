"""A job on the move between two schedulers, as plain data.

Everything in it is relative (ages, budgets): instants mean nothing on another clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.cursor import Cursor, Saved
from neustream.core.entry import Entry
from neustream.core.graph import Graph
from neustream.core.seen import Seen
from neustream.core.types import SLO, Request
from neustream.errors import GraphError


@dataclass(frozen=True, slots=True)
class LegCarry:
    """A leg on the move; see the attributes of `Job`."""

    name: str
    since_ago: float
    began_ago: float
    base: int
    due_in: float
    latest_in: float
    until_in: float
    late: bool
    asked: SLO
    later: Mapping[str, int]

    def aged(self, seconds: float) -> LegCarry:
        """The same some seconds later."""
        return replace(
            self,
            since_ago=self.since_ago + seconds,
            began_ago=self.began_ago + seconds,
            due_in=self.due_in - seconds,
            latest_in=self.latest_in - seconds,
            until_in=self.until_in - seconds,
        )


@dataclass(frozen=True, slots=True)
class Carry:
    """A job that left a scheduler at a step boundary. Seconds.

    Args:
        graph: its name; `print` has to be that of the graph on the other side.
        age: since it arrived; `due_in`, `due_next_in`: until its deadlines; `first_ago`: since the
            first output of its call; `started_ago`: since it first ran, None: never.
        saved: its place in the graph.
        kept: tokens that it had in the KV cache it left.
        released: whether its promise was given up, and it goes on without one.
        leg: the part of its graph that it is in, where those have promises of their own.
        inner: the params of the call that it is in; None: the request's.
        left: expected calls ahead of it by stage, for who sends it on.
        calls_ago: since each of its open calls began.
    """

    id: str
    graph: str
    print: str
    slo: SLO
    params: Mapping[str, Any]
    age: float
    due_in: float
    due_next_in: float
    saved: Saved
    state: Mapping[str, Any]
    output: Mapping[str, Any] | None
    outputs: int
    call_outputs: int
    first_ago: float
    late: bool
    computed: float
    started_ago: float | None
    alone_s: float
    planned_calls: Mapping[str, int]
    skipped: int
    kept: float
    released: bool = False
    leg: LegCarry | None = None
    inner: Mapping[str, Any] | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    calls_ago: tuple[float, ...] = ()

    def input(self) -> StepInput:
        """What the modules are given that are to adopt it."""
        stage = self.saved.stage or ""
        outputs, computed = self.call_outputs, self.computed
        params = self.params if self.inner is None else self.inner
        return StepInput(self.id, params, self.state, stage, computed=computed, outputs=outputs)


def pack(job: Entry, now: float) -> Carry:
    """What leaves with a waiting, held or away job."""
    assert job.cursor is not None
    graph = job.request.graph
    return Carry(
        id=job.id,
        graph=graph.name,
        print=graph.print,
        slo=job.request.slo,
        params=job.request.params,
        age=now - job.arrival,
        due_in=job.due - now,
        due_next_in=job.due_next - now,
        saved=job.cursor.save(graph),
        state=dict(job.state),
        output=job.output,
        outputs=job.outputs,
        call_outputs=job.call_outputs,
        first_ago=now - job.first_at,
        late=job.late,
        computed=0.0 if job.host_blocks else job.computed,  # what is aside does not come along
        started_ago=None if job.started_at is None else now - job.started_at,
        alone_s=job.alone_s,
        planned_calls=dict(job.planned_calls),
        skipped=job.skipped,
        kept=job.kept if job.num_blocks else 0.0,
        released=job.released,
        leg=_leg(job, now) if job.leg else None,
        inner=None if job.params is job.request.params else job.params,
        left=dict(job.calls_left),
        calls_ago=tuple([now - call.since for call in job.cursor.calls]),
    )


def _leg(job: Entry, now: float) -> LegCarry:
    assert job.cursor is not None
    return LegCarry(
        job.leg,
        now - job.leg_since,
        now - job.leg_at,
        job.leg_base,
        job.leg_due - now,
        job.leg_latest - now,
        job.leg_until - now,
        job.leg_late,
        job.asked,
        dict(job.later),
    )


def later(carry: Carry, seconds: float) -> Carry:
    """The same job after so many seconds on its way: its deadlines did not wait."""
    started_ago = carry.started_ago
    return replace(
        carry,
        age=carry.age + seconds,
        due_in=carry.due_in - seconds,
        due_next_in=carry.due_next_in - seconds,
        first_ago=carry.first_ago + seconds,
        started_ago=None if started_ago is None else started_ago + seconds,
        leg=None if carry.leg is None else carry.leg.aged(seconds),
        calls_ago=tuple([ago + seconds for ago in carry.calls_ago]),
    )


def unpack(carry: Carry, graph: Graph, now: float, seen: Seen) -> Entry:
    """The job again, in no queue yet; GraphError if `graph` is not the one that it left."""
    if graph.print != carry.print:
        raise GraphError(
            f"request {carry.id!r} comes from graph {carry.graph!r} with print {carry.print}; "
            f"graph {graph.name!r} here has print {graph.print}"
        )
    arrival = now - carry.age
    job = Entry(Request(carry.id, graph, max(arrival, 0.0), carry.slo, carry.params))
    job.history = seen
    job.arrival = job.leg_since = job.leg_at = arrival
    job.due, job.due_next = now + carry.due_in, now + carry.due_next_in
    job.leg_due = job.leg_latest = job.due
    if carry.inner is not None:
        job.params = carry.inner
    job.cursor = Cursor.load(graph, carry.saved)
    for call, ago in zip(job.cursor.calls, carry.calls_ago, strict=True):
        call.since = now - ago
    job.state = dict(carry.state)
    job.output, job.outputs, job.call_outputs = carry.output, carry.outputs, carry.call_outputs
    job.first_at = now - carry.first_ago
    if carry.leg is not None:
        _take_leg(job, carry.leg, now)
    if carry.released:
        job.release()
    job.late = carry.late
    job.computed = carry.computed
    job.alone_s, job.planned_calls = carry.alone_s, dict(carry.planned_calls)
    if carry.started_ago is not None:
        job.started_at = now - carry.started_ago
    return job


def _take_leg(job: Entry, leg: LegCarry, now: float) -> None:
    assert job.cursor is not None
    job.leg, job.leg_base, job.leg_late = leg.name, leg.base, leg.late
    call = job.cursor.leg
    job.leg_entry = call.entry if call else 0
    job.leg_since, job.leg_at = now - leg.since_ago, now - leg.began_ago
    job.leg_due, job.leg_latest = now + leg.due_in, now + leg.latest_in
    job.leg_until = now + leg.until_in
    job.slo = job.asked = leg.asked
    job.later = dict(leg.later)
