"""The open nodes around a job: what is behind of them, and how they begin and end."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neustream.core.budget import asked_rounds, expected_rounds
from neustream.core.graph import LEARNT, Ask, Loop, Node, Par, Seq, Switch, answer, raised
from neustream.errors import GraphError, shown

if TYPE_CHECKING:
    from neustream.core.job import Job


def over(until: Ask, job: Job) -> bool:
    try:
        return bool(until(job))
    except BaseException as error:
        raise raised(job, "a loop's until", error) from error


@dataclass(slots=True)
class Frame:
    """One open node: how many children or rounds are behind, of how many.

    Of a call also `since`, when the job got to it (nan: just now), the params `outer` of it, and
    its number `entry` among the calls that the job came to, and the outputs that it `told` of,
    where they are kept.
    """

    node: Seq | Loop | Par
    done: int
    total: int  # exact for `Seq` and `times`, expected for `until`
    since: float = math.nan
    outer: Mapping[str, Any] | None = None
    entry: int = 0
    told: list[Mapping[str, Any]] | None = None


def opened(node: Seq | Loop, job: Job) -> Frame:
    """A sequence or loop that a job gets to."""
    if isinstance(node, Seq):
        return Frame(node, -1, len(node.nodes))
    if node.times is not None:
        return Frame(node, -1, asked_rounds(node.times, job, "times"))
    return Frame(node, -1, expected_rounds(node, job))


def chosen(node: Switch, job: Job) -> Node:
    """The branch that a job takes."""
    choice = answer(node.on, job, "a switch")
    try:
        branch = node.cases.get(choice) if isinstance(choice, Hashable) else None
    except BaseException as error:
        raise raised(job, "comparing what a switch chose", error) from error
    if branch is None:
        cases = sorted(map(str, node.cases))
        raise GraphError(f"request {job.id!r}: switch chose {shown(choice)}; its cases are {cases}")
    if node.likely is LEARNT:
        job.history.chose(node, choice)
    return branch


def keep_result(frame: Frame, told: Sequence[Mapping[str, Any]], job: Job) -> None:
    """Put what came of a call into the state."""
    assert isinstance(frame.node, Seq) and frame.node.call is not None
    call = frame.node.call
    assert call.result is not None
    try:
        job.state[call.name] = call.result(job, told)
    except BaseException as error:
        raise raised(job, f"result of call {call.name!r}", error) from error


def ends(frame: Frame, node: Loop, until: Ask, job: Job, likely: bool) -> bool:
    """Whether a loop with a condition is over after a round."""
    if likely:
        return frame.done == frame.total
    learnt = node.expect is None
    if over(until, job):
        if learnt:
            job.history.looped(node, frame.done)
        return True
    if frame.done >= node.most:
        raise GraphError(
            f"request {job.id!r}: a loop did not end within {node.most} rounds (most=...)"
        )
    if learnt and frame.done >= frame.total:
        frame.total = job.history.rounds(node, frame.done)
    return False
