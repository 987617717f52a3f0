"""Models as graphs of stages: `seq`, `loop`, `switch`, and named calls.

Control flow is data, so that a scheduler can see how much work a job has ahead of it. This file
describes graphs; `cursor.py` walks them, `work.py` turns calls of stages into seconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from neustream.errors import GraphError, shown, told

if TYPE_CHECKING:
    from neustream.core.job import Job
    from neustream.core.types import SLO

Ask = Callable[["Job"], Any]
"""A question that control flow asks about a job; it reads `job.params` and `job.state`."""


Phase = Literal["step", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("step", "prefill", "decode")

MOST_ROUNDS = 10**9
"""Rounds of a counted loop; more are a slip, and sums of their seconds would overflow."""

MOST_UNTIL = 1_000_000
"""Rounds of a loop with a condition: one that is never true ends there, as a fault."""


class _Learnt(Enum):
    """What stands for a case that is learnt."""

    LEARNT = "learnt"


LEARNT = _Learnt.LEARNT


@dataclass(frozen=True, eq=False)
class Stage:
    """A stream module's place in a graph.

    Args:
        name: unique among the stages that one scheduler serves; profiles are found by it.
        max_batch: the most jobs in one step.
        emits: each step of this stage is an output for the caller (an image, a token).
        size: this job's share of the profile's second axis in its next step (tokens, pixels).
        model: stages of one model may share a step (chunked prefill beside decode).
        phase: "prefill" and "decode" keep their `size` tokens in the pool's KV cache from step to
            step. A prefill may be done in parts. A decode reads `size` tokens of context and
            computes one; it cannot be parted.
    """

    name: str
    max_batch: int = 1
    emits: bool = False
    size: Callable[[Job], float] | None = None
    model: str = ""
    phase: Phase = "step"

    def __post_init__(self) -> None:
        if not self.name:
            raise GraphError("a stage needs a name, got ''")
        if self.max_batch < 1:
            raise GraphError(
                f"stage {self.name!r}: max_batch must be 1 or more, got {self.max_batch}"
            )
        if self.phase not in PHASES:
            raise GraphError(
                f"stage {self.name!r}: phase must be one of {', '.join(PHASES)}, got {self.phase!r}"
            )
        if self.caches and (self.size is None or not self.model):
            raise GraphError(f"stage {self.name!r}: phase {self.phase!r} needs size= and model=")

    @property
    def leg(self) -> str:
        """The name of its part of a graph, where it is in no call."""
        return self.model if self.caches else self.name

    @property
    def caches(self) -> bool:
        """Whether its steps keep something in the pool's KV cache."""
        return self.phase != "step"

    def size_of(self, job: Job) -> float:
        """The size of `job`'s step, 0 for stages without one; GraphError for what is no size."""
        if self.size is None:
            return 0.0
        try:
            size = self.size(job)
            whole = float(size) if isinstance(size, Real) else math.nan
        except BaseException as error:
            raise raised(job, f"size of stage {self.name!r}", error) from error
        if not 0 <= whole < math.inf:
            raise GraphError(
                f"request {job.id!r}: size of stage {self.name!r} must be a number >= 0, "
                f"got {shown(size)}"
            )
        return whole

    def __repr__(self) -> str:
        return f"Stage({self.name!r})"


@dataclass(frozen=True, eq=False)
class Call:
    """What makes a sequence a call; see `nodes.call`.

    Args:
        name: what events and reports call it.
        slo: what it is promised in place of what the request is; None: the same.
        params: what its stages read as `job.params`; None: the request's own.
        expect: what they are expected to be, where `params` cannot be asked yet.
        whole: whether it is one leg; else those inside of it are (see `legs.py`).
    """

    name: str
    slo: SLO | None = None
    params: Ask | None = None
    expect: Ask | None = None
    whole: bool = True


@dataclass(frozen=True, eq=False)
class Seq:
    """Nodes one after the other; with `call`, a part with a promise of its own."""

    nodes: tuple[Node, ...]
    call: Call | None = None


@dataclass(frozen=True, eq=False)
class Loop:
    """A body that runs `times`, or until a condition that is asked after each round.

    Without `expect` what was seen says how many rounds to expect. More than `most` are a fault.
    """

    body: Node
    times: Ask | None
    until: Ask | None
    expect: Ask | None
    most: int


@dataclass(frozen=True, eq=False)
class Switch:
    """One of several branches, chosen when the job gets there.

    Without a `likely` case (`LEARNT`) the scheduler budgets with the one that was taken most.
    """

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
    most: int | None = None,
) -> Loop:
    """Run `body` again and again.

    Args:
        times: how often; asked once, when the job reaches the loop. 0 skips it.
        until: asked after each round; the loop ends when it is true.
        expect: rounds that the scheduler budgets with while `times` cannot be asked yet, or with
            `until`. Without it the mean of what loops took lately: one round before any ended.
        most: with `until`, rounds after which the request fails; default: 1,000,000.
    """
    if (times is None) == (until is None):
        raise GraphError("a loop takes either times=... or until=..., not both and not neither")
    counted = None if times is None else _ask(times)
    budget = counted if expect is None else _ask(expect)
    if most is None:
        return Loop(body, counted, until, budget, MOST_UNTIL if until else MOST_ROUNDS)
    if until is None:
        raise GraphError("a loop with times=... ends by itself: most=... is for until=...")
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_ROUNDS:
        raise GraphError(
            f"a loop's most must be a whole number from 1 to {MOST_ROUNDS}, got {shown(most)}"
        )
    return Loop(body, counted, until, budget, most)


def switch(on: Ask, cases: Mapping[Any, Node], *, likely: Any = LEARNT) -> Switch:
    """Run one of several nodes: `cases[on(job)]`.

    Until the job is there the scheduler budgets with the case `likely`; without it with the one
    that was taken most lately, the first before any was.
    """
    if not cases:
        raise GraphError("a switch needs at least one case")
    if likely is not LEARNT and likely not in cases:
        raise GraphError(
            f"switch: likely={likely!r} is not one of its cases {sorted(map(str, cases))}"
        )
    return Switch(on, dict(cases), likely)


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
        case _:
            raise GraphError(f"not a graph node: {node!r}; use Stage, seq, loop or switch")


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
    raise AssertionError(node)


def has_legs(root: Node) -> bool:
    """Whether parts below `root` have promises of their own: several calls, or one with an SLO."""
    if model_calls(root) > 1:
        return True
    return any(isinstance(node, Seq) and node.call and node.call.slo for node in nodes_of(root))


def _legs(root: Node) -> dict[str, bool]:
    """The legs of a graph of several calls: their names, and whether they make outputs."""
    if not has_legs(root):
        return {}
    legs: dict[str, bool] = {}
    _name_legs(root, None, legs)
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


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: a name and the node that a job starts at.

    `stages` maps stage names to stages in graph order, `position` to their place in it; `looped`
    names those inside a loop. `legs` are the parts with a promise of their own, by name, and
    whether they make outputs; none where the whole request is the only one (see `legs.py`).
    `promises`: whether a call has an SLO of its own. `nodes` are all nodes in preorder: the same
    numbers wherever the same code built the graph. `print` is a hash of structure and stage names:
    two sides whose prints differ cannot exchange jobs. Callbacks are not part of it.
    """

    name: str
    root: Node
    stages: Mapping[str, Stage] = field(init=False)
    position: Mapping[str, int] = field(init=False)
    looped: frozenset[str] = field(init=False)
    legs: Mapping[str, bool] = field(init=False, repr=False)
    promises: bool = field(init=False, repr=False)
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
        object.__setattr__(self, "legs", _legs(self.root))
        digest = hashlib.sha256(f"{self.name}|{_shape(self.root)}".encode())
        object.__setattr__(self, "print", digest.hexdigest()[:16])

    def __repr__(self) -> str:
        return f"Graph({self.name!r})"


def answer(ask: Ask, job: Job, what: str) -> Any:
    """Ask a user's callback about a job; whatever it raises becomes a GraphError that names it."""
    try:
        return ask(job)
    except BaseException as error:
        raise raised(job, what, error) from error


def raised(job: Job, what: str, error: BaseException) -> GraphError:
    """The error that names the request and the user's callback that raised `error`."""
    text = f"request {job.id!r}: {what} raised {told(error)}"
    if isinstance(error, KeyError) and job.stage is not None:
        text += (
            f"; it is no parameter, and no step returned it so far (at stage {job.stage.name!r})"
        )
    return GraphError(text)
