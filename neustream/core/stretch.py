"""Pieces of long sequences: stretches, whose calls are settled before a job comes, and tails.

A stage without sizes takes the same for every job at any time. What many of them take together is
kept (see `sums.py`), so a job that moves along them need not look at each of them again. What the
others take depends on the job: of those far ahead it keeps what it asked (see `tails.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple

from neustream.core.node import Node, Par, Seq, Stage

NEAR = 6
"""Nodes of a sequence in front of a job that are never in a tail."""
EVERY = 4
"""Tails begin at each so many of them."""


class Stretch(NamedTuple):
    """The children `start` to `stop` (not included) of a sequence, all of them settled."""

    node: Seq
    start: int
    stop: int

    @property
    def children(self) -> tuple[Node, ...]:
        return self.node.nodes[self.start : self.stop]

    @property
    def first(self) -> Stage:
        """The first stage of it."""
        return next(stages_of(self.node.nodes[self.start]))

    def stages(self) -> Iterator[Stage]:
        """Its stages in order, one for each call."""
        for child in self.children:
            yield from stages_of(child)


class Tail(NamedTuple):
    """The children of a sequence from `start` on, far ahead of a job that is at child `at`."""

    node: Seq
    at: int
    start: int

    @property
    def children(self) -> tuple[Node, ...]:
        return self.node.nodes[self.start :]


def ahead_of(node: Seq, at: int) -> Iterator[Node | Stretch | Tail]:
    """The children of a sequence behind that which a job is at: near ones, and the tail."""
    count = len(node.nodes)
    start = at + 1
    far = -(-(start + NEAR) // EVERY) * EVERY
    if far + EVERY > count or (node.stops and node.stops[start] == count):
        yield from parts(node, start)
        return
    yield from node.nodes[start:far]
    yield Tail(node, at, far)


def parts(node: Seq, start: int = 0) -> Iterator[Node | Stretch]:
    """The children of a sequence from `start` on, long settled rows of them in one piece."""
    if not node.stops:
        yield from node.nodes[start:]
        return
    while start < len(node.nodes):
        stop = node.stops[start]
        if stop > start:
            yield Stretch(node, start, stop)
            start = stop
        else:
            yield node.nodes[start]
            start += 1


def stages_of(node: Node) -> Iterator[Stage]:
    """The stages of a settled node in order."""
    if isinstance(node, Stage):
        yield node
        return
    assert isinstance(node, Seq | Par)
    children = node.nodes if isinstance(node, Seq) else node.branches.values()
    for child in children:
        yield from stages_of(child)


class Tally(MutableMapping[str, int]):
    """Calls by stage, in the order in which they come; stretches are counted once it is read."""

    __slots__ = ("_counts", "_parts")

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts
        self._parts: list[tuple[Stage | Stretch, int]] = []

    def add(self, part: Stage | Stretch, calls: int) -> None:
        """`calls` more of a stage, or of each stage of a stretch."""
        self._parts.append((part, calls))

    def _read(self) -> dict[str, int]:
        counts = self._counts
        for part, calls in self._parts:
            for stage in (part,) if isinstance(part, Stage) else part.stages():
                counts[stage.name] = counts.get(stage.name, 0) + calls
        self._parts.clear()
        return counts

    def __getitem__(self, stage: str) -> int:
        return self._read()[stage]

    def __setitem__(self, stage: str, calls: int) -> None:
        self._read()[stage] = calls

    def __delitem__(self, stage: str) -> None:
        del self._read()[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def added(counts: MutableMapping[str, int], more: Mapping[str, int]) -> MutableMapping[str, int]:
    """`counts` with more calls by stage."""
    for name, calls in more.items():
        counts[name] = counts.get(name, 0) + calls
    return counts


def tallied(
    counts: MutableMapping[str, int], part: Stage | Stretch, calls: int
) -> MutableMapping[str, int]:
    """`counts` with more calls; a `Tally` from the first stretch on."""
    if isinstance(counts, dict):
        if isinstance(part, Stage):
            counts[part.name] = counts.get(part.name, 0) + calls
            return counts
        counts = Tally(counts)
    assert isinstance(counts, Tally)
    counts.add(part, calls)
    return counts
