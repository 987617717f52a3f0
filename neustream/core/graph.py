"""Models as graphs of stages: `seq`, `loop`, `switch`, `par`, and named calls.

Control flow is data, so that a scheduler can see how much work a job has ahead of it. `node.py` has
the nodes, this file what they make together; `cursor.py` walks graphs, `work.py` turns calls of
stages into seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from neustream.core.node import (
    LEARNT,
    MOST_ROUNDS,
    Ask,
    Call,
    Loop,
    Node,
    Par,
    Phase,
    Seq,
    Stage,
    Switch,
    Tool,
    answer,
    loop,
    raised,
    seq,
    switch,
)
from neustream.errors import GraphError

__all__ = [
    "LEARNT",
    "MOST_ROUNDS",
    "Ask",
    "Call",
    "Graph",
    "Loop",
    "Node",
    "Par",
    "Phase",
    "Seq",
    "Stage",
    "Switch",
    "Tool",
    "answer",
    "has_legs",
    "leg_names",
    "loop",
    "model_calls",
    "nodes_of",
    "raised",
    "seq",
    "switch",
]


def nodes_of(node: Node) -> Iterator[Node]:
    """`node` and all nodes below it, each parent before its children."""
    yield node
    match node:
        case Seq():
            children: tuple[Node, ...] = node.nodes
        case Loop():
            children = (node.body,)
        case Switch():
            children = tuple(node.cases.values())
        case Par():
            children = tuple(node.branches.values())
        case _:
            children = ()
    for child in children:
        yield from nodes_of(child)


def _shape(node: Node) -> str:
    """The structure below `node` as text: kinds, cases and stages, but no callbacks."""
    match node:
        case Stage():
            return f"{node.name}:{node.model}:{node.phase}:{int(node.emits)}"
        case Seq():
            kind = "seq" if node.call is None else f"call:{node.call.name}"
            return f"{kind}({','.join(map(_shape, node.nodes))})"
        case Loop():
            kind = "times" if node.until is None else "until"
            return f"{kind}({_shape(node.body)})"
        case Switch():
            cases = ",".join(f"{key!r}={_shape(child)}" for key, child in node.cases.items())
            return f"switch({cases})"
        case Par():
            cases = ",".join(f"{key}={_shape(child)}" for key, child in node.branches.items())
            return f"par{node.need}({cases})"
    raise AssertionError(node)


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
        case Par():
            for child in node.branches.values():
                yield from _stages(child)
        case _:
            nodes = "Stage, seq, loop, switch, par, call or tool"
            raise GraphError(f"not a graph node: {node!r}; use {nodes}")


def model_calls(node: Node) -> int:
    """Model calls on the way through `node`; those of a loop count twice: there may be several."""
    match node:
        case Stage():
            return int(node.phase == "prefill")
        case Seq():
            found = sum([model_calls(child) for child in node.nodes])
            return max(found, 1) if node.call is not None else found
        case Loop():
            return 2 * model_calls(node.body)
        case Switch():
            return max([model_calls(child) for child in node.cases.values()])
        case Par():
            return sum([model_calls(child) for child in node.branches.values()])
    raise AssertionError(node)


def has_legs(root: Node) -> bool:
    """Whether parts below `root` have promises of their own.

    They do where there are several model calls, one beside tools, or one with an SLO of its own.
    """
    calls = model_calls(root)
    if calls > 1:
        return True
    for node in nodes_of(root):
        if isinstance(node, Seq) and node.call is not None and node.call.slo is not None:
            return True
        if calls and isinstance(node, Stage) and node.tool is not None:
            return True
    return False


def _legs(root: Node) -> dict[str, bool]:
    """The legs of a graph of several calls: their names, and whether they make outputs."""
    if not has_legs(root):
        return {}
    legs: dict[str, bool] = {}
    _name_legs(root, None, legs)
    return legs


def leg_names(node: Node) -> Iterable[str]:
    """The legs below a node that is in no call that is one leg."""
    legs: dict[str, bool] = {}
    _name_legs(node, None, legs)
    return legs


def _name_legs(node: Node, call: str | None, legs: dict[str, bool]) -> None:
    """Take down the legs below `node`, which is in the call `call`, if in any."""
    match node:
        case Stage():
            name = node.leg if call is None else call
            legs[name] = legs.get(name, False) or node.emits
        case Seq():
            own = node.call.name if node.call is not None and node.call.whole else None
            for child in node.nodes:
                _name_legs(child, call or own, legs)
        case Loop():
            _name_legs(node.body, call, legs)
        case Switch():
            for child in node.cases.values():
                _name_legs(child, call, legs)
        case Par():
            for child in node.branches.values():
                _name_legs(child, call, legs)


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: a name and the node that a job starts at.

    `stages` maps stage names to stages in graph order, `position` to their place in it; `looped`
    names those inside a loop. `legs` are the parts with a promise of their own, by name, and
    whether they make outputs; none where the whole request is the only one (see `legs.py`).
    `promises`: whether a call has an SLO of its own; `forks`: whether it has a `par`;
    `collects`: whether a call keeps its outputs. `nodes` are all nodes in preorder: the same
    numbers wherever the same code built the graph. `print` is a
    hash of structure and stage names: two sides whose prints differ cannot exchange jobs. Callbacks
    are not part of it.

    Raises:
        GraphError: it has no stage, two different ones of one name, or something that is no node.
    """

    name: str
    root: Node
    stages: Mapping[str, Stage] = field(init=False)
    position: Mapping[str, int] = field(init=False)
    looped: frozenset[str] = field(init=False)
    legs: Mapping[str, bool] = field(init=False, repr=False)
    promises: bool = field(init=False, repr=False)
    forks: bool = field(init=False, repr=False)
    collects: bool = field(init=False, repr=False)
    nodes: tuple[Node, ...] = field(init=False, repr=False)
    print: str = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, Stage] = {}
        looped: set[str] = set()
        for stage, inside in _stages(self.root):
            if found.setdefault(stage.name, stage) is not stage:
                raise GraphError(
                    f"graph {self.name!r} has two different stages named {stage.name!r}"
                )
            if inside:
                looped.add(stage.name)
        if not found:
            raise GraphError(f"graph {self.name!r} has no stage")
        object.__setattr__(self, "stages", found)
        object.__setattr__(self, "position", {name: place for place, name in enumerate(found)})
        object.__setattr__(self, "looped", frozenset(looped))
        nodes = tuple(nodes_of(self.root))
        calls = [node.call for node in nodes if isinstance(node, Seq) and node.call is not None]
        promised = any(call.slo is not None and call.slo.promises for call in calls)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "promises", promised)
        object.__setattr__(self, "collects", any(call.result is not None for call in calls))
        object.__setattr__(self, "forks", any(isinstance(node, Par) for node in nodes))
        object.__setattr__(self, "legs", _legs(self.root))
        digest = hashlib.sha256(f"{self.name}|{_shape(self.root)}".encode())
        object.__setattr__(self, "print", digest.hexdigest()[:16])

    def __repr__(self) -> str:
        return f"Graph({self.name!r})"
