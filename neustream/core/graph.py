"""Models as graphs of stages: `seq`, `loop`, `switch`, and the cursor that walks them.

Control flow is data, so that a scheduler can see how much work a job has ahead of it. This file
knows nothing about time: it counts calls of stages; `scheduler.py` turns the counts into seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from neustream.errors import GraphError

if TYPE_CHECKING:
    from neustream.core.types import Job

Ask = Callable[["Job"], Any]
"""A question that control flow asks about a job; it reads `job.params` and `job.state`."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A stream module's place in a graph.

    Args:
        name: unique among the stages that one scheduler serves; profiles are found by it.
        max_batch: the most jobs in one step.
        emits: each step of this stage is an output for the caller (an image, a token).
        size: this job's share of the profile's second axis in its next step (tokens, pixels).
        fuse: stages with the same label may share one step (chunked prefill beside decode).
        keeps: what its steps compute stays in the pool's memory, `size` units of it after the step (the
            KV cache of so many tokens), until the job leaves the stages that keep something.
        reads: the size is what a step reads (the context of a decode); it computes one unit, and cannot
            be done in parts.
    """

    name: str
    max_batch: int = 1
    emits: bool = False
    size: Callable[[Job], float] | None = None
    fuse: str = ""
    keeps: bool = False
    reads: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise GraphError("a stage needs a name, got ''")
        if self.max_batch < 1:
            raise GraphError(f"stage {self.name!r}: max_batch must be 1 or more, got {self.max_batch}")
        if (self.keeps or self.reads) and self.size is None:
            raise GraphError(f"stage {self.name!r}: keeps and reads are about its size, which it has none of")

    def size_of(self, job: Job) -> float:
        """The size of `job`'s step here, 0 for stages without one; GraphError if it is no such number."""
        if self.size is None:
            return 0.0
        try:
            size = self.size(job)
        except Exception as error:
            raise _raised(job, f"size of stage {self.name!r}", error) from error
        if type(size) is int and size >= 0:  # the common case, asked at each step of a decode
            return float(size)
        whole = float(size) if isinstance(size, Real) else math.nan
        if not 0 <= whole < math.inf:
            raise GraphError(f"request {job.id!r}: size of stage {self.name!r} must be a number >= 0, got {size!r}")
        return whole

    def __repr__(self) -> str:
        return f"Stage({self.name!r})"


@dataclass(frozen=True, eq=False)
class Seq:
    """Nodes one after the other."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Loop:
    """A body that runs `times`, or until a condition that is asked after each round."""

    body: Node
    times: Ask | None
    until: Ask | None
    expect: Ask


@dataclass(frozen=True, eq=False)
class Switch:
    """One of several branches, chosen when the job gets there."""

    on: Ask
    cases: Mapping[Any, Node]
    likely: Any


Node = Stage | Seq | Loop | Switch


def seq(*nodes: Node) -> Seq:
    """Run `nodes` one after the other; `seq()` does nothing (an empty branch of a switch)."""
    return Seq(nodes)


def _ask(value: int | Ask) -> Ask:
    return value if callable(value) else lambda job: value


def loop(
    body: Node,
    *,
    times: int | Ask | None = None,
    until: Ask | None = None,
    expect: int | Ask | None = None,
) -> Loop:
    """Run `body` again and again.

    Args:
        times: how often; asked once, when the job reaches the loop. 0 skips it.
        until: asked after each round; the loop ends when it is true. Needs `expect`.
        expect: rounds that the scheduler budgets with, where `times` is not given, or where
            `times` cannot be asked yet while the job is in front of the loop.
    """
    if (times is None) == (until is None):
        raise GraphError("a loop takes either times=... or until=..., not both and not neither")
    if until is not None and expect is None:
        raise GraphError("loop(until=...) depends on data, so it needs expect=... for the scheduler's budget")
    counted = None if times is None else _ask(times)
    budget = counted if expect is None else _ask(expect)
    assert budget is not None
    return Loop(body, counted, until, budget)


def switch(on: Ask, cases: Mapping[Any, Node], *, likely: Any) -> Switch:
    """Run `cases[on(job)]`; the scheduler budgets with the case `likely` until the job is there."""
    if not cases:
        raise GraphError("a switch needs at least one case")
    if likely not in cases:
        raise GraphError(f"switch: likely={likely!r} is not one of its cases {sorted(map(str, cases))}")
    return Switch(on, dict(cases), likely)


def _stages(node: Node) -> Iterator[tuple[Stage, bool]]:
    """Each stage below `node` in order, and whether the node just around it is a loop."""
    match node:
        case Stage():
            yield node, False
        case Seq():
            for child in node.nodes:
                yield from _stages(child)
        case Loop():
            for stage, _ in _stages(node.body):
                yield stage, True
        case Switch():
            for child in node.cases.values():
                yield from _stages(child)
        case _:
            raise GraphError(f"not a graph node: {node!r}; use Stage, seq, loop or switch")


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: a name and the node that a job starts at.

    `stages` maps stage names to stages in graph order, `position` to their place in it; `looped`
    names those inside a loop.
    """

    name: str
    root: Node
    stages: Mapping[str, Stage] = field(init=False)
    position: Mapping[str, int] = field(init=False)
    looped: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, Stage] = {}
        looped: set[str] = set()
        for stage, inside in _stages(self.root):
            if found.setdefault(stage.name, stage) is not stage:
                raise GraphError(f"graph {self.name!r} has two different stages named {stage.name!r}")
            if inside:
                looped.add(stage.name)
        if not found:
            raise GraphError(f"graph {self.name!r} has no stage")
        object.__setattr__(self, "stages", found)
        object.__setattr__(self, "position", {name: at for at, name in enumerate(found)})
        object.__setattr__(self, "looped", frozenset(looped))

    def __repr__(self) -> str:
        return f"Graph({self.name!r})"


def answer(ask: Ask, job: Job, what: str) -> Any:
    """Ask a user's callback about a job; whatever it raises becomes a GraphError that names it."""
    try:
        return ask(job)
    except Exception as error:
        raise _raised(job, what, error) from error


def _raised(job: Job, what: str, error: Exception) -> GraphError:
    return GraphError(f"request {job.id!r}: {what} raised {type(error).__name__}: {error}")


def _over(until: Ask, job: Job) -> bool:
    try:
        return bool(until(job))
    except Exception as error:
        raise _raised(job, "a loop's until", error) from error


def _rounds(ask: Ask, job: Job, what: str) -> int:
    rounds = answer(ask, job, f"a loop's {what}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise GraphError(f"request {job.id!r}: a loop's {what} must be a whole number >= 0, got {rounds!r}")
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


class Cursor:
    """Where one job stands in its graph. `stage` is the next one to run, None at the end."""

    __slots__ = ("_frames", "stage")

    def __init__(self, graph: Graph, job: Job) -> None:
        self._frames: list[_Frame] = []
        self.stage: Stage | None = self._descend(graph.root, job)

    def again(self, job: Job) -> bool:
        """Move on by one round if the current stage is alone in a loop with (expected) rounds left.

        This is the common step of a denoising or decoding loop, made cheap. False: nothing has
        changed, and `advance` must be called.
        """
        frame = self._frames[-1] if self._frames else None
        if frame is None or frame.node.__class__ is not Loop or frame.node.body is not self.stage:
            return False
        if frame.done + 1 >= frame.total:
            return False
        if frame.node.until is not None and _over(frame.node.until, job):
            return False
        frame.done += 1
        return True

    def advance(self, job: Job) -> Stage | None:
        """Move past the current stage; asks `until`, `times` and `on` as they come up."""
        self.stage = self._descend(None, job)
        return self.stage

    def rewind(self) -> Stage | None:
        """Go back to the stage that makes again what the current one reads, and what came of it.

        That is the nearest one in front of it, in a sequence around it, with its `fuse` label (the
        prefill of a decode loop). None, and nothing has changed, if there is no such stage.
        """
        label = self.stage.fuse if self.stage is not None else ""
        for depth in range(len(self._frames) - 1, -1, -1):
            frame = self._frames[depth]
            if not label or not isinstance(frame.node, Seq):
                continue
            for at in range(frame.done - 1, -1, -1):
                node = frame.node.nodes[at]
                if isinstance(node, Stage) and node.fuse == label:
                    del self._frames[depth + 1 :]
                    frame.done = at
                    self.stage = node
                    return node
        return None

    def _descend(self, node: Node | None, job: Job) -> Stage | None:
        """Open nodes from `node` down to a stage; from None, go on behind what has just ended."""
        turned: list[_Frame] = []  # loops that began a round without a stage having run since
        while True:
            while isinstance(node, Switch):
                choice = answer(node.on, job, "a switch")
                if not isinstance(choice, Hashable) or choice not in node.cases:
                    cases = sorted(map(str, node.cases))
                    raise GraphError(f"request {job.id!r}: switch chose {choice!r}; its cases are {cases}")
                node = node.cases[choice]
            if isinstance(node, Stage):
                return node
            if isinstance(node, Seq):
                self._frames.append(_Frame(node, -1, len(node.nodes)))
            elif isinstance(node, Loop):
                counted = node.times is not None
                total = _rounds(node.times or node.expect, job, "times" if counted else "expect")
                self._frames.append(_Frame(node, -1, total))
            node = None
            while node is None:
                if not self._frames:
                    return None
                node = self._next_child(self._frames[-1], job, turned)
                if node is None:
                    self._frames.pop()

    @staticmethod
    def _next_child(frame: _Frame, job: Job, turned: list[_Frame]) -> Node | None:
        node = frame.node
        frame.done += 1
        if isinstance(node, Seq):
            return node.nodes[frame.done] if frame.done < frame.total else None
        if node.until is None:
            return node.body if frame.done < frame.total else None
        if frame.done > 0 and _over(node.until, job):
            return None
        if any(frame is other for other in turned):
            raise GraphError(f"request {job.id!r}: a round of a loop ran no stage, so it would never end")
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
