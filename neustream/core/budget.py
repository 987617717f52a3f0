"""What lies behind a node that a job has not come to: expected calls, rounds, params."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neustream.core.graph import (
    LEARNT,
    MOST_ROUNDS,
    Ask,
    Call,
    Loop,
    Node,
    Par,
    Seq,
    Stage,
    Switch,
    answer,
)
from neustream.core.stretch import Stretch, parts
from neustream.errors import GraphError, shown

if TYPE_CHECKING:
    from neustream.core.job import Job


def asked_rounds(ask: Ask, job: Job, what: str) -> int:
    rounds = answer(ask, job, f"a loop's {what}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= MOST_ROUNDS:
        raise GraphError(
            f"request {job.id!r}: a loop's {what} must be a whole number from 0 to {MOST_ROUNDS}, "
            f"got {shown(rounds)}"
        )
    return rounds


def expected_rounds(node: Loop, job: Job) -> int:
    """Rounds of a loop that `job` has not come to."""
    if node.expect is None:
        return job.history.rounds(node)
    return min(asked_rounds(node.expect, job, "expect"), node.most)


def likely_case(node: Switch, job: Job) -> Node:
    """The branch that `job` should take."""
    return node.cases[job.history.likely(node) if node.likely is LEARNT else node.likely]


@contextmanager
def inside(call: Call | None, job: Job) -> Iterator[None]:
    """`job.params` and `job.state` as they should be inside of a call that is ahead of `job`."""
    if call is None or not (call.params or call.apart):
        yield
        return
    outer, around = job.params, job.state
    if call.params is not None:
        job.params = asked_params(call, call.expect or call.params, job)
    if call.apart:
        job.state = {}
    try:
        yield
    finally:
        job.params, job.state = outer, around


def asked_params(call: Call, ask: Ask, job: Job) -> Mapping[str, Any]:
    """What a call's `params` or `expect` say."""
    params = answer(ask, job, f"params of call {call.name!r}")
    if not isinstance(params, Mapping):
        raise GraphError(
            f"request {job.id!r}: params of call {call.name!r} must be a mapping, "
            f"got {shown(params)}"
        )
    return params


def calls_of(node: Node | Stretch, job: Job) -> Iterator[tuple[Stage | Stretch, int]]:
    """Expected calls of stages when `job` enters `node`, in order (see `Cursor.calls_ahead`)."""
    match node:
        case Stage() | Stretch():
            yield node, 1
        case Seq():
            with inside(node.call, job):
                for child in parts(node):
                    yield from calls_of(child, job)
        case Loop():
            yield from repeated(node.body, job, expected_rounds(node, job))
        case Switch():
            yield from calls_of(likely_case(node, job), job)
        case Par():
            for child in node.branches.values():
                yield from calls_of(child, job)


def repeated(body: Node | Stretch, job: Job, rounds: int) -> Iterator[tuple[Stage | Stretch, int]]:
    if rounds <= 0:
        return
    if isinstance(body, Stage):
        yield body, rounds
        return
    yield from calls_of(body, job)
    if rounds > 1:
        for part, count in calls_of(body, job):
            yield part, count * (rounds - 1)
