"""A job on the move between two schedulers, as plain data.

Everything in it is relative (ages, budgets): instants mean nothing on another clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.cursor import Cursor, Saved
from neustream.core.graph import Graph
from neustream.core.job import Entry
from neustream.core.types import SLO, Request
from neustream.errors import GraphError


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

    def input(self) -> StepInput:
        """What the modules are given that are to adopt it."""
        stage = self.saved.stage or ""
        outputs, computed = self.call_outputs, self.computed
        return StepInput(
            self.id, self.params, self.state, stage, computed=computed, outputs=outputs
        )


def pack(job: Entry, now: float) -> Carry:
    """What leaves with a waiting, held or away job."""
    assert job.cursor is not None
    graph = job.request.graph
    return Carry(
        id=job.id,
        graph=graph.name,
        print=graph.print,
        slo=job.request.slo,
        params=job.params,
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
        computed=job.computed,
        started_ago=None if job.started_at is None else now - job.started_at,
        alone_s=job.alone_s,
        planned_calls=dict(job.planned_calls),
        skipped=job.skipped,
        kept=job.kept if job.num_blocks else 0.0,
        released=job.request.slo.promises and not job.promised,
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
    )


def unpack(carry: Carry, graph: Graph, now: float) -> Entry:
    """The job again, in no queue yet; GraphError if `graph` is not the one that it left."""
    if graph.print != carry.print:
        raise GraphError(
            f"request {carry.id!r} comes from graph {carry.graph!r} with print {carry.print}; "
            f"graph {graph.name!r} here has print {graph.print}"
        )
    arrival = now - carry.age
    job = Entry(Request(carry.id, graph, max(arrival, 0.0), carry.slo, carry.params))
    job.arrival = arrival
    job.due, job.due_next = now + carry.due_in, now + carry.due_next_in
    job.cursor = Cursor.load(graph, carry.saved)
    job.state = dict(carry.state)
    job.output, job.outputs, job.call_outputs = carry.output, carry.outputs, carry.call_outputs
    job.first_at = now - carry.first_ago
    if carry.released:
        job.release()
    job.late = carry.late
    job.computed = carry.computed
    job.alone_s, job.planned_calls = carry.alone_s, dict(carry.planned_calls)
    if carry.started_ago is not None:
        job.started_at = now - carry.started_ago
    return job
