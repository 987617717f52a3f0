"""How a request enters an instance: from its start, behind its outputs, or on the move."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from neustream.cluster.messages import Parcel, Send
from neustream.core.carry import Carry
from neustream.core.graph import Graph
from neustream.core.types import SLO, Request
from neustream.core.work import Walk
from neustream.engine.executor import Mover
from neustream.engine.member import Drive
from neustream.errors import RequestError, told

ENVELOPE = 2000.0
"""Bytes of a request without its KV cache."""


def fresh(drive: Drive, order: Send, graph: Graph, arrival: float, now: float) -> None:
    """Begin a request, behind the outputs that its caller has.

    Args:
        arrival: on the loop's clock; before 0 for one that came before that began.

    Raises:
        NeustreamError: it cannot be served here.
    """
    if order.made:
        _go_on(drive, order, graph, arrival, now)
        return
    slo = order.slo if arrival >= 0 else _shorter(order.slo, -arrival)
    drive.accept(Request(order.id, graph, max(arrival, 0.0), slo, order.params), now)


def _shorter(slo: SLO, seconds: float) -> SLO:
    """A promise of which some seconds are over; RequestError if all of it is."""
    total, first = slo.total - seconds, slo.first - seconds
    if total <= 0 or first <= 0:
        raise RequestError(f"its promise was over {seconds - min(slo.total, slo.first):.3f} s ago")
    return replace(slo, total=total, first=first)


def _go_on(drive: Drive, order: Send, graph: Graph, arrival: float, now: float) -> None:
    """Begin a request whose outputs are all that was computed: prefilled anew, it goes on."""
    slo, age = order.slo, now - arrival
    walk = Walk(Request(order.id, graph, max(arrival, 0.0), slo, order.params))
    planned: dict[str, int] = {}
    alone_s = 0.0
    for stage, calls in walk.ahead():
        planned[stage.name] = planned.get(stage.name, 0) + calls
        alone_s += calls * drive.scheduler.times.alone(stage, stage.size_of(walk.job))
    for update in order.made:
        if walk.stage is None:
            break
        walk.advance(update)
    job, saved = walk.job, walk.saved()
    pace = math.inf
    if slo.step < math.inf:
        pace = slo.first + len(order.made) * slo.step
    carry = Carry(
        id=order.id,
        graph=graph.name,
        print=graph.print,
        slo=slo,
        params=order.params,
        age=age,
        due_in=slo.total - age,
        due_next_in=min(slo.total, pace) - age,
        saved=saved,
        state=job.state,
        output=job.output,
        outputs=job.outputs,
        call_outputs=job.call_outputs,
        first_ago=0.0,
        late=False,
        computed=0.0,
        started_ago=0.0,
        alone_s=alone_s,
        planned_calls=planned,
        skipped=0,
        kept=0.0,
        calls_ago=(0.0,) * len(saved.outer),  # when they began is not known here
    )
    drive.scheduler.take(carry, graph, now)


def take(
    drive: Drive, parcel: Parcel, graph: Graph, now: float, unfit: Callable[[str], None]
) -> None:
    """Let a request go on, with what was kept of it or, where KV blocks lack, without.

    Raises:
        NeustreamError: it cannot be had.
    """
    _check_room(drive, parcel)
    stage = graph.stages.get(parcel.carry.saved.stage or "")
    kept = parcel.copied or bool(parcel.pieces)
    cached = kept
    try:
        drive.scheduler.take(parcel.carry, graph, now, cached=kept)
    except RequestError:
        if not kept:
            raise
        cached = False
        drive.scheduler.take(parcel.carry, graph, now)
    if cached or stage is None or not stage.caches:
        for pool, pieces in parcel.pieces.items():
            executor = drive.executors[pool]
            assert isinstance(executor, Mover)
            executor.adopt(parcel.carry.input(), pieces).add_done_callback(_unless_fit(unfit))


def _check_room(drive: Drive, parcel: Parcel) -> None:
    """RequestError if what was kept would not find the worker that asks for it."""
    pools = drive.scheduler.pools
    for name in parcel.pieces:
        if name not in pools or pools[name].workers != 1:
            raise RequestError(f"not movable: no pool {name!r} of one worker here")
        if not isinstance(drive.executors[name], Mover):
            raise RequestError(f"not movable: pool {name!r} here cannot go on with it")


def _unless_fit(unfit: Callable[[str], None]) -> Callable[[Future[None]], None]:
    def done(adopted: Future[None]) -> None:
        error = adopted.exception()
        if error is not None:
            unfit(told(error))

    return done


def size_of(carry: Carry, copied: float | None, token_bytes: float) -> float:
    """Bytes of a request on the move. `copied`: tokens of its KV cache there; None: none goes."""
    if copied is None:
        return ENVELOPE
    return ENVELOPE + max(carry.kept - copied, 0.0) * token_bytes
