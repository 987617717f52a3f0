"""The open nodes around a job: what is behind of them, and how they begin and end."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neustream.core.budget import asked_rounds, expected_rounds
from neustream.core.graph import LEARNT, Ask, Loop, Node, Par, Seq, Switch, answer, raised
from neustream.core.node import CallResult
from neustream.core.types import TICK
from neustream.errors import GraphError, shown

if TYPE_CHECKING:
    from neustream.core.job import Job


def over(until: Ask, job: Job) -> bool:
    try:
        return bool(until(job))
    except BaseException as error:
        raise raised(job, "a loop's until", error) from error


@dataclass(slots=True)
class Told:
    """What is kept of an open call that has a result. Seconds count from its start.

    `outputs` came at `ages_s`; `waited_s`: until a step of it first began, None: none did so far;
    `late`: whether an output was.
    """

    outputs: list[Mapping[str, Any]] = field(default_factory=list)
    ages_s: list[float] = field(default_factory=list)
    waited_s: float | None = None
    late: bool = False

    def copy(self) -> Told:
        """Another one, which goes on by itself."""
        return Told(list(self.outputs), list(self.ages_s), self.waited_s, self.late)


@dataclass(slots=True)
class Frame:
    """One open node: how many children or rounds are behind, of how many.

    Of a call also `since`, when the job got to it (nan: just now), the params `outer` of it, and
    its number `entry` among the calls that the job came to, what it `told` so far, where that is
    kept, and the state `around` it, where it has one of its own.
    """

    node: Seq | Loop | Par
    done: int
    total: int  # exact for `Seq` and `times`, expected for `until`
    since: float = math.nan
    outer: Mapping[str, Any] | None = None
    entry: int = 0
    told: Told | None = None
    around: MutableMapping[str, Any] | None = None


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


def keep_result(frame: Frame, told: Told, job: Job, now: float, until: float) -> None:
    """Put what came of a call into the state. `until`: by when it had to be over."""
    assert isinstance(frame.node, Seq) and frame.node.call is not None
    call = frame.node.call
    assert call.result is not None
    kept = not (told.late or job.released or now > until + TICK)
    came = CallResult(told.outputs, told.ages_s, now - frame.since, told.waited_s, kept)
    around = job.state if frame.around is None else frame.around
    try:
        around[call.name] = call.result(job, came)
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
