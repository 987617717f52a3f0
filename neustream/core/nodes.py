"""Nodes of agents' graphs: calls, tools, and branches that run at the same time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from neustream.core.graph import Ask, Call, Graph, Node, Par, Seq, Stage, Tool, has_legs, nodes_of
from neustream.core.job import Job
from neustream.core.node import CallResult
from neustream.core.types import SLO
from neustream.errors import GraphError, shown

Params = Mapping[str, Any] | Ask
"""What a call's stages read as `job.params`: as it is, or asked when the job gets there."""


def call(
    what: Node | Graph,
    name: str | None = None,
    *,
    slo: SLO | None = None,
    params: Params | None = None,
    expect: Params | None = None,
    result: Callable[[Job, CallResult], Any] | None = None,
    apart: bool = False,
) -> Seq:
    """`what` as a part with a promise of its own, and a name in events and reports.

    `SLO.first` and `SLO.step` count from the moment that a job gets there, of each call anew. What
    it returns stays in the state. The same stages may be called at several places.

    Args:
        what: a graph (a model), or any node.
        name: default: the graph's.
        slo: what this call is promised in place of what the request is: `first` and `step` of its
            outputs, `total` from its start to its end. What the request was promised in `total`
            holds beside it.
        params: what its stages read as `job.params`; default: the request's.
        expect: what `params` are expected to be while they cannot be asked.
        result: what the state gets under `name` when it is over: asked with the job and what came
            of the call (a `CallResult`). The request's output is then its whole state.
        apart: whether what its stages return is a state of their own, which begins empty and ends
            with the call: names in it mean nothing to others.

    Raises:
        GraphError: a node without a name.
    """
    body = what.root if isinstance(what, Graph) else what
    name = what.name if name is None and isinstance(what, Graph) else name
    if not isinstance(name, str) or not name:
        raise GraphError(f"a call needs a name, got {shown(name)}")
    if slo is not None and not isinstance(slo, SLO):
        raise GraphError(f"call {name!r}: slo must be an SLO, got {shown(slo)}")
    if expect is not None and params is None:
        raise GraphError(f"call {name!r}: expect says what params are expected to be; give params")
    given, expected = _asked(name, params), _asked(name, expect)
    described = Call(name, slo, given, expected, _is_whole(body), result, apart)
    return Seq((body,), described)


def _asked(name: str, params: Params | None) -> Ask | None:
    if params is None or callable(params):
        return params
    if not isinstance(params, Mapping):
        raise GraphError(f"call {name!r}: params must be a mapping, got {shown(params)}")
    kept = dict(params)
    return lambda job: kept


def _is_whole(body: Node) -> bool:
    """Whether a call is one leg: at most one model call is in it, and nothing forks."""
    return not has_legs(body) and not any(isinstance(node, Par) for node in nodes_of(body))


def tool(
    name: str,
    function: Callable[[Any], Any] | None = None,
    *,
    concurrency: int = 64,
    timeout_s: float | None = None,
    retries: int = 0,
    expect_s: float = 1.0,
) -> Stage:
    """A function as a node: it just starts when a job gets there, in a pool without a policy.

    It is called with a `StepInput` and returns an update of the state, or is an `async def`. What
    it raises, a result that is no mapping, and a call that takes too long fail its request.

    Args:
        name: of its stage.
        function: None: it is simulated alone.
        concurrency: calls at once; others wait in the order in which they came.
        timeout_s: seconds that a call may take; None: any number.
        retries: how often a call that failed, or took too long, is made anew.
        expect_s: seconds that it is expected to take until calls were seen.

    Raises:
        GraphError: for what is no such value.
    """
    if function is not None and not callable(function):
        raise GraphError(f"tool {name!r}: a tool is a function, got {shown(function)}")
    _check_count(name, "concurrency", concurrency, 1)
    _check_count(name, "retries", retries, 0)
    limit = math.inf if timeout_s is None else timeout_s
    for what, value in (("timeout_s", limit), ("expect_s", expect_s)):
        if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
            raise GraphError(f"tool {name!r}: {what} must be above 0, got {shown(value)}")
    return Stage(name, tool=Tool(function, concurrency, float(limit), retries, float(expect_s)))


def _check_count(name: str, what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GraphError(f"tool {name!r}: {what} must be {least} or more, got {shown(value)}")


def par(*nodes: Node, policy: str | int = "all", **named: Node) -> Par:
    """Run `nodes` at the same time, and join them.

    What the steps of a branch return is its result. At the join the state gets the results by the
    names of the branches; a branch sees the state as it was at the fork, and its own. A branch is
    called after its stage or call, or by its number where that is no name of its own.

    Args:
        policy: "all": every branch has to be done, and one that fails (or is given up) ends the
            request. "first": one of them, whose result is the only one. A number: so many of them.
            The others are cancelled.
        named: branches by name.

    Raises:
        GraphError: no branch, two of one name, or a policy that is none.
    """
    branches: dict[str, Node] = {}
    names = [_name_of(node) for node in nodes]
    times = Counter(names)
    for number, (name, node) in enumerate(zip(names, nodes, strict=True)):
        branches[name if name and times[name] == 1 else str(number)] = node
    for name, node in named.items():
        if name in branches:
            raise GraphError(f"par: two branches named {name!r}")
        branches[name] = node
    if not branches:
        raise GraphError("a par needs at least one branch")
    return Par(branches, needed(policy, len(branches)))


def needed(policy: str | int, count: int) -> int:
    """Of so many branches those that have to be done; GraphError for a policy that is none."""
    if policy == "all":
        return count
    if policy == "first":
        return 1
    if isinstance(policy, int) and not isinstance(policy, bool) and 1 <= policy <= count:
        return policy
    raise GraphError(
        f"par: policy must be 'all', 'first' or a number from 1 to {count}, got {shown(policy)}"
    )


def _name_of(node: Node) -> str:
    """What a branch is called that is given no name."""
    if isinstance(node, Stage):
        return node.name
    if isinstance(node, Seq) and node.call is not None:
        return node.call.name
    return ""
