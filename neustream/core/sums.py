"""What stretches of a graph take: sums that are kept, and refreshed where something changed.

The sums of a sequence are a tree: a job asks for what is left of a stretch, and gets it from few of
its nodes. Of a leg that ended the leaves with its name are taken out, and all sums with them: who
asks next adds those up anew. A sum never depends on what it was before, so nothing drifts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from neustream.core.entry import Ahead, Entry
from neustream.core.graph import Graph, Node, Seq, leg_names
from neustream.core.step_times import StepTimes
from neustream.core.stretch import Stretch, stages_of


class Total(NamedTuple):
    """Seconds of nodes in a row.

    `ahead`: one after the other, of branches the longest; `calls`: of all calls; `to_output`: of
    those up to the first output, None if there is none.
    """

    ahead: Ahead
    calls: float
    to_output: float | None

    def then(self, other: Total) -> Total:
        """These and what follows them."""
        to_output = self.to_output
        if to_output is None and other.to_output is not None:
            to_output = self.calls + other.to_output
        return Total(self.ahead.plus(other.ahead), self.calls + other.calls, to_output)


class _Tree:
    """Totals of the children of a sequence; leaf `i` is at `width + i`, its parent at the half."""

    def __init__(self, count: int) -> None:
        self.width = 1 << (count - 1).bit_length()
        self.totals: list[Total | None] = [None] * (2 * self.width)

    def change(self, child: int) -> None:
        """The total of a child, and all sums that it is in, are no longer known."""
        at = self.width + child
        while at and self.totals[at] is not None:
            self.totals[at] = None
            at //= 2

    def of(self, start: int, stop: int, leaf: Callable[[int], Total]) -> Total:
        """The total of children `start` to `stop` (not included, at least one)."""
        left: list[int] = []
        right: list[int] = []
        low, high = start + self.width, stop + self.width
        while low < high:
            if low % 2:
                left.append(low)
                low += 1
            if high % 2:
                high -= 1
                right.append(high)
            low, high = low // 2, high // 2
        whole, *rest = [self._at(at, leaf) for at in left + right[::-1]]
        for part in rest:
            whole = whole.then(part)
        return whole

    def _at(self, at: int, leaf: Callable[[int], Total]) -> Total:
        total = self.totals[at]
        if total is None:
            if at >= self.width:
                total = leaf(at - self.width)
            else:
                total = self._at(2 * at, leaf).then(self._at(2 * at + 1, leaf))
            self.totals[at] = total
        return total


class _Known:
    """The trees of one graph, and where each leg is in them."""

    def __init__(self) -> None:
        self.trees: dict[Seq, _Tree] = {}
        self.places: dict[str, list[tuple[_Tree, int]]] = {}

    def tree(self, node: Seq) -> _Tree:
        tree = self.trees.get(node)
        if tree is None:
            tree = self.trees[node] = _Tree(len(node.nodes))
            for index, child in enumerate(node.nodes):
                for leg in leg_names(child):
                    self.places.setdefault(leg, []).append((tree, index))
        return tree


class Sums:
    """The totals of stretches, for all jobs of a scheduler.

    Args:
        times: what steps take.
        seconds: those of a node, as legs took lately.
    """

    def __init__(self, times: StepTimes, seconds: Callable[[Node, Entry], Ahead]) -> None:
        self._times = times
        self._seconds = seconds
        self._version = times.version
        self._known: WeakKeyDictionary[Graph, _Known] = WeakKeyDictionary()

    def of(self, stretch: Stretch, job: Entry) -> Total:
        """What a stretch of the graph of `job` takes."""
        if self._version != self._times.version:
            self._known.clear()
            self._version = self._times.version
        known = self._known.get(job.request.graph)
        if known is None:
            known = self._known[job.request.graph] = _Known()
        nodes = stretch.node.nodes
        tree = known.tree(stretch.node)
        return tree.of(stretch.start, stretch.stop, lambda index: self._leaf(nodes[index], job))

    def changed(self, graph: Graph, leg: str) -> None:
        """A leg of a graph is expected to take something else from now on."""
        known = self._known.get(graph)
        if known is not None:
            for tree, index in known.places.get(leg, ()):
                tree.change(index)

    def _leaf(self, node: Node, job: Entry) -> Total:
        calls, to_output = 0.0, None
        for stage in stages_of(node):
            calls += self._times.alone(stage, 0.0)
            if stage.emits and to_output is None:
                to_output = calls
        return Total(self._seconds(node, job), calls, to_output)
