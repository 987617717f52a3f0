"""What graphs are made of: stages, and the nodes that join them. `graph.py` has what they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

LONG = 8
"""Settled stages in a row whose sum is worth keeping: fewer are added up anew as fast."""

MOST_UNTIL = 1_000_000
"""Rounds of a loop with a condition: one that is never true ends there, as a fault."""


class _Learnt(Enum):
    """What stands for a case that is learnt."""

    LEARNT = "learnt"


LEARNT = _Learnt.LEARNT


@dataclass(frozen=True, eq=False)
class Tool:
    """What makes a stage a tool: a function that just starts, in a pool without a policy.

    Args:
        call: the function; called with a `StepInput`, returns an update. None: simulated alone.
        concurrency: calls at once.
        timeout_s: a call that takes longer has failed.
        retries: how often a call that failed is made anew.
        expect_s: seconds that it is expected to take until calls were seen.
    """

    call: Callable[[Any], Any] | None
    concurrency: int = 64
    timeout_s: float = math.inf
    retries: int = 0
    expect_s: float = 1.0


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
        tool: what it calls, where it is a tool (see `neustream.tool`).
        known: units of a prefill that are done when a job comes to it (a prefix in the cache).

    Raises:
        GraphError: it has no name, `max_batch` is less than 1, the phase is none that there is, or
            it comes without `size` and `model`. While serving: a size or `known` out of bounds.
    """

    name: str
    max_batch: int = 1
    emits: bool = False
    size: Callable[[Job], float] | None = None
    model: str = ""
    phase: Phase = "step"
    tool: Tool | None = None
    known: Callable[[Job], float] | None = None

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
            if type(size) is int and 0 <= size < MOST_ROUNDS:  # as nearly all are
                return float(size)
            plain = type(size) is int or type(size) is float or isinstance(size, Real)
            whole = float(size) if plain else math.nan
        except BaseException as error:
            raise raised(job, f"size of stage {self.name!r}", error) from error
        if not 0 <= whole < math.inf:
            raise GraphError(
                f"request {job.id!r}: size of stage {self.name!r} must be a number >= 0, "
                f"got {shown(size)}"
            )
        return whole

    def known_of(self, job: Job) -> float:
        """Units that are done when `job` comes; GraphError if nothing would be left to do."""
        if self.known is None:
            return 0.0
        try:
            known = float(self.known(job))
        except BaseException as error:
            raise raised(job, f"known of stage {self.name!r}", error) from error
        if known == 0:
            return 0.0
        whole = self.size_of(job)
        if not 0 < known < whole:
            raise GraphError(
                f"request {job.id!r}: known of stage {self.name!r} must be 0 or more and below "
                f"its size {whole:g}, got {shown(known)}"
            )
        return known

    def __repr__(self) -> str:
        return f"Stage({self.name!r})"


@dataclass(frozen=True, slots=True)
class CallResult:
    """What came of a call. Seconds count from its start.

    Args:
        outputs: the updates that its stages emitted, in order; ages_s: when each came.
        seconds: that it took; waited_s: until a step of it first began, None: none did.
        on_time: whether all that was promised of it was kept.
    """

    outputs: Sequence[Mapping[str, Any]]
    ages_s: Sequence[float]
    seconds: float
    waited_s: float | None
    on_time: bool


@dataclass(frozen=True, eq=False)
class Call:
    """What makes a sequence a call; see `nodes.call`.

    Args:
        name: what events and reports call it.
        slo: what it is promised in place of what the request is; None: the same.
        params: what its stages read as `job.params`; None: the request's own.
        expect: what they are expected to be, where `params` cannot be asked yet.
        whole: whether it is one leg; else those inside of it are (see `legs.py`).
        result: what the state gets under its name, from the job and what came of the call.
        apart: whether its stages have a state of their own, of which only the result is left.
    """

    name: str
    slo: SLO | None = None
    params: Ask | None = None
    expect: Ask | None = None
    whole: bool = True
    result: Callable[[Job, CallResult], Any] | None = None
    apart: bool = False


@dataclass(frozen=True, eq=False)
class Seq:
    """Nodes one after the other; with `call`, a part with a promise of its own.

    `settled`: how many stages are in it, if no job changes what it asks for; else 0. `stops`: by
    child, where the settled ones from there on end; none where they are few (see `stretch.py`).
    """

    nodes: tuple[Node, ...]
    call: Call | None = None
    settled: int = field(init=False, repr=False)
    stops: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [settled(node) for node in self.nodes]
        known = self.call is None or self.call.params is None
        object.__setattr__(self, "settled", sum(counts) if known and all(counts) else 0)
        object.__setattr__(self, "stops", _stops(counts))


@dataclass(frozen=True, eq=False)
class Loop:
    """A body that runs `times`, or until a condition that is asked after each round.

    Without `expect` what was seen says how many rounds to expect. More than `most` are a fault.
    `steady`: see `loop`.
    """

    body: Node
    times: Ask | None
    until: Ask | None
    expect: Ask | None
    most: int
    steady: bool = False


@dataclass(frozen=True, eq=False)
class Switch:
    """One of several branches, chosen when the job gets there.

    Without a `likely` case (`LEARNT`) the scheduler budgets with the one that was taken most.
    """

    on: Ask
    cases: Mapping[Any, Node]
    likely: Any


@dataclass(frozen=True, eq=False)
class Par:
    """Branches that run at the same time, by name; it is over once `need` of them are done."""

    branches: Mapping[str, Node]
    need: int
    settled: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [settled(node) for node in self.branches.values()]
        object.__setattr__(self, "settled", sum(counts) if all(counts) else 0)


Node = Stage | Seq | Loop | Switch | Par


def settled(node: Node) -> int:
    """Stages below `node`, if neither a job nor what was learnt changes its calls; else 0."""
    if isinstance(node, Stage):
        return int(node.size is None)
    return node.settled if isinstance(node, Seq | Par) else 0


def _stops(counts: Sequence[int]) -> tuple[int, ...]:
    """By child where a stretch from it on ends; the child itself where none begins."""
    stops = list(range(len(counts)))
    stop, stages = len(counts), 0
    for index in range(len(counts) - 1, -1, -1):
        if not counts[index]:
            stop, stages = index, 0
            continue
        stages += counts[index]
        if stages >= LONG:
            stops[index] = stop
    return tuple(stops) if any(stop > index for index, stop in enumerate(stops)) else ()


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
    steady: bool = False,
) -> Loop:
    """Run `body` again and again.

    Args:
        times: how often; asked once, when the job reaches the loop. 0 skips it.
        until: asked after each round; the loop ends when it is true.
        expect: rounds that the scheduler budgets with while `times` cannot be asked yet, or with
            `until`. Without it the mean of what loops took lately: one round before any ended.
        most: with `until`, rounds after which the request fails; default: 1,000,000.
        steady: a promise about rounds that return nothing (`{}`), before the last one that is
            expected: `until` does not hold after them, and the size of a decode is one more after
            each. Simulations then ask neither.

    Raises:
        GraphError: `times` and `until` are both given or neither is, or a number is out of bounds.
    """
    if (times is None) == (until is None):
        raise GraphError("a loop takes either times=... or until=..., not both and not neither")
    counted = None if times is None else _ask(times)
    budget = counted if expect is None else _ask(expect)
    if most is None:
        return Loop(body, counted, until, budget, MOST_UNTIL if until else MOST_ROUNDS, steady)
    if until is None:
        raise GraphError("a loop with times=... ends by itself: most=... is for until=...")
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_ROUNDS:
        raise GraphError(
            f"a loop's most must be a whole number from 1 to {MOST_ROUNDS}, got {shown(most)}"
        )
    return Loop(body, counted, until, budget, most, steady)


def switch(on: Ask, cases: Mapping[Any, Node], *, likely: Any = LEARNT) -> Switch:
    """Run one of several nodes: `cases[on(job)]`.

    Until the job is there the scheduler budgets with the case `likely`; without it with the one
    that was taken most lately, the first before any was.

    Raises:
        GraphError: there are no cases, or `likely` is none of them.
    """
    if not cases:
        raise GraphError("a switch needs at least one case")
    if likely is not LEARNT and likely not in cases:
        raise GraphError(
            f"switch: likely={likely!r} is not one of its cases {sorted(map(str, cases))}"
        )
    return Switch(on, dict(cases), likely)


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
