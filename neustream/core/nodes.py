"""Nodes of agents' graphs: a graph or a node as a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neustream.core.graph import Ask, Call, Graph, Node, Seq, has_legs
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
    described = Call(name, slo, _asked(name, params), _asked(name, expect), not has_legs(body))
    return Seq((body,), described)


def _asked(name: str, params: Params | None) -> Ask | None:
    if params is None or callable(params):
        return params
    if not isinstance(params, Mapping):
        raise GraphError(f"call {name!r}: params must be a mapping, got {shown(params)}")
    kept = dict(params)
    return lambda job: kept
