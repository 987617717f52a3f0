"""Where a job stands in its graph: the cursor that walks `seq`, `loop` and `switch`.

It counts calls of stages and knows nothing about time. A cursor can leave: `save` gives plain data,
`load` finds the same place in a graph that was built by the same code elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from neustream.core.graph import Ask, Graph, Loop, Node, Seq, Stage, Switch, answer, raised
from neustream.errors import GraphError, shown

if TYPE_CHECKING:
    from neustream.core.job import Job


MOST_ROUNDS = 10**9
"""Rounds of a loop; more are a slip, and sums of their seconds would overflow."""


def _over(until: Ask, job: Job) -> bool:
    try:
        return bool(until(job))
    except BaseException as error:
        raise raised(job, "a loop's until", error) from error


def _rounds(ask: Ask, job: Job, what: str) -> int:
    rounds = answer(ask, job, f"a loop's {what}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= MOST_ROUNDS:
        raise GraphError(
            f"request {job.id!r}: a loop's {what} must be a whole number from 0 to {MOST_ROUNDS}, "
            f"got {shown(rounds)}"
        )
    return rounds


def _budget(node: Node, job: Job) -> Iterator[tuple[Stage, int]]:
    """Expected calls of stages when `job` enters `node`, in order (see `Cursor.ahead`)."""
    match node:
        case Stage():
            yield node, 1
        case Seq():
            for child in node.nodes:
                yield from _budget(child, job)
        case Loop():
            yield from _repeat(node.body, job, _rounds(node.expect, job, "expect"))
        case Switch():
            yield from _budget(node.cases[node.likely], job)


def _repeat(body: Node, job: Job, rounds: int) -> Iterator[tuple[Stage, int]]:
    if rounds <= 0:
        return
    if isinstance(body, Stage):
        yield body, rounds
        return
    yield from _budget(body, job)
    if rounds > 1:
        for stage, count in _budget(body, job):
            yield stage, count * (rounds - 1)


@dataclass(slots=True)
class _Frame:
    """One open `Seq` or `Loop`: how many children or rounds are behind, of how many."""

    node: Seq | Loop
    done: int
    total: int  # exact for `Seq` and `times`, expected for `until`


def _opened(node: Seq | Loop, job: Job) -> _Frame:
    """A sequence or loop that a job gets to."""
    if isinstance(node, Seq):
        return _Frame(node, -1, len(node.nodes))
    if node.times is not None:
        return _Frame(node, -1, _rounds(node.times, job, "times"))
    return _Frame(node, -1, _rounds(node.expect, job, "expect"))


def _chosen(node: Switch, job: Job) -> Node:
    """The branch that a job takes."""
    choice = answer(node.on, job, "a switch")
    try:
        branch = node.cases.get(choice) if isinstance(choice, Hashable) else None
    except BaseException as error:
        raise raised(job, "comparing what a switch chose", error) from error
    if branch is None:
        cases = sorted(map(str, node.cases))
        raise GraphError(f"request {job.id!r}: switch chose {shown(choice)}; its cases are {cases}")
    return branch


class Saved(NamedTuple):
    """A cursor's place: its stage, and (number, done, total) of each open node."""

    frames: tuple[tuple[int, int, int], ...]
    stage: str | None


class Cursor:
    """Where one job stands in its graph. `stage` is the next one to run, None at the end."""

    __slots__ = ("_frames", "stage")

    def __init__(self, graph: Graph, job: Job) -> None:
        self._frames: list[_Frame] = []
        self.stage: Stage | None = self._descend(graph.root, job)

    def again(self, job: Job, likely: bool = False) -> bool:
        """Move on by one round if the current stage is alone in a loop with (expected) rounds left.

        This is the common step of a denoising or decoding loop, made cheap. False: nothing has
        changed, and `advance` must be called. `likely`: see there.
        """
        if not self._frames:
            return False
        frame = self._frames[-1]
        node = frame.node
        if node.__class__ is not Loop or node.body is not self.stage:
            return False
        done = frame.done + 1
        if done >= frame.total:
            return False
        if node.until is not None and not likely and _over(node.until, job):
            return False
        frame.done = done
        return True

    def advance(self, job: Job, likely: bool = False) -> Stage | None:
        """Move past the current stage; asks `until`, `times` and `on` as they come up.

        `likely`: where the job will probably go, before its step has returned anything: `until` is
        taken to hold after the expected rounds, and switches take their likely branch.
        """
        self.stage = self._descend(None, job, likely)
        return self.stage

    def copy(self) -> Cursor:
        """Another cursor at the same place."""
        twin = Cursor.__new__(Cursor)
        twin._frames = [_Frame(frame.node, frame.done, frame.total) for frame in self._frames]
        twin.stage = self.stage
        return twin

    def rewind(self) -> Stage | None:
        """Go back to the prefill that fills the KV cache which the current stage reads.

        That is the nearest stage of the same `model` in front of it, in a sequence around it. None,
        and nothing has changed, if there is no such stage.
        """
        model = self.stage.model if self.stage is not None else ""
        if not model:
            return None
        for depth in range(len(self._frames) - 1, -1, -1):
            frame = self._frames[depth]
            if not isinstance(frame.node, Seq):
                continue
            for index in range(frame.done - 1, -1, -1):
                node = frame.node.nodes[index]
                if isinstance(node, Stage) and node.model == model:
                    del self._frames[depth + 1 :]
                    frame.done = index
                    self.stage = node
                    return node
        return None

    # -- leaving and arriving ---------------------------------------------------------------------

    def save(self, graph: Graph) -> Saved:
        """The place as plain data: nodes by their number in `graph.nodes`."""
        number = {id(node): index for index, node in reversed(list(enumerate(graph.nodes)))}
        frames = tuple((number[id(f.node)], f.done, f.total) for f in self._frames)
        return Saved(frames, None if self.stage is None else self.stage.name)

    @classmethod
    def load(cls, graph: Graph, saved: Saved) -> Cursor:
        """The same place in `graph`; GraphError if it has no such place."""
        cursor = cls.__new__(cls)
        cursor._frames = []
        for index, done, total in saved.frames:
            node = graph.nodes[index] if 0 <= index < len(graph.nodes) else None
            if not isinstance(node, Seq | Loop) or done < 0 or total < 0:
                raise GraphError(
                    f"graph {graph.name!r} has no sequence or loop {index} at {done} of {total}"
                )
            cursor._frames.append(_Frame(node, done, total))
        if saved.stage is not None and saved.stage not in graph.stages:
            raise GraphError(f"graph {graph.name!r} has no stage {saved.stage!r}")
        cursor.stage = None if saved.stage is None else graph.stages[saved.stage]
        return cursor

    # -- walking ----------------------------------------------------------------------------------

    def _descend(self, node: Node | None, job: Job, likely: bool = False) -> Stage | None:
        """Open nodes from `node` down to a stage; from None, go on behind what has just ended."""
        turned: list[_Frame] = []  # loops that began a round without a stage having run since
        while True:
            while isinstance(node, Switch):
                node = node.cases[node.likely] if likely else _chosen(node, job)
            if isinstance(node, Stage):
                return node
            if node is not None:
                self._frames.append(_opened(node, job))
            node = None
            while node is None:
                if not self._frames:
                    return None
                node = self._next_child(self._frames[-1], job, turned, likely)
                if node is None:
                    self._frames.pop()

    @staticmethod
    def _next_child(frame: _Frame, job: Job, turned: list[_Frame], likely: bool) -> Node | None:
        node = frame.node
        frame.done += 1
        if isinstance(node, Seq):
            return node.nodes[frame.done] if frame.done < frame.total else None
        if node.until is None:
            return node.body if frame.done < frame.total else None
        if frame.done > 0:
            over = frame.done == frame.total if likely else _over(node.until, job)
            if over:
                return None
        if any(frame is other for other in turned):
            raise GraphError(
                f"request {job.id!r}: a round of a loop ran no stage, so it would never end"
            )
        turned.append(frame)
        return node.body

    def ahead(self, job: Job) -> Iterator[tuple[Stage, int]]:
        """Calls that lie ahead, the current one first, as (stage, count) in order.

        Counts are exact for `times` and expected for `until` and `switch`. A loop over several
        stages is given as one round in order and then the other rounds added up.
        """
        if self.stage is None:
            return
        inner = self._frames[-1] if self._frames else None
        if inner is not None and type(inner.node) is Loop and inner.node.body is self.stage:
            yield self.stage, max(1, inner.total - inner.done)
            outer = self._frames[:-1]
        else:
            yield self.stage, 1
            outer = self._frames
        for frame in reversed(outer):
            node = frame.node
            if isinstance(node, Seq):
                for child in node.nodes[frame.done + 1 :]:
                    yield from _budget(child, job)
            else:
                yield from _repeat(node.body, job, frame.total - frame.done - 1)
