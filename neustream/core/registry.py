"""Which graphs a scheduler can serve: their stages are in its pools, and are each one stage."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Set

from neustream.core.graph import Graph, Stage
from neustream.core.pool_state import PoolState
from neustream.errors import GraphError


class Registry:
    """The graphs that were looked at; none is kept alive by it.

    `pool_of`: the pool that serves a stage; `away`: stages that others serve.
    """

    def __init__(self, pool_of: Mapping[str, PoolState], away: Set[str]) -> None:
        self._pool_of = pool_of
        self._away = away
        self._stages: weakref.WeakValueDictionary[str, Stage] = weakref.WeakValueDictionary()
        self._checked: weakref.WeakSet[Graph] = weakref.WeakSet()

    def check(self, graph: Graph) -> None:
        """GraphError for a graph that cannot be served."""
        if graph in self._checked:
            return
        for name, stage in graph.stages.items():
            if name not in self._pool_of and name not in self._away:
                served = sorted([*self._pool_of, *self._away])
                raise GraphError(
                    f"graph {graph.name!r}: stage {name!r} is in no pool; stages served: {served}"
                )
            if name not in self._pool_of and graph.forks:
                raise GraphError(
                    f"graph {graph.name!r}: stage {name!r} is served elsewhere, and a branch of a "
                    "par cannot leave: serve all stages of it in one place"
                )
            if self._stages.get(name, stage) is not stage:
                raise GraphError(
                    f"graph {graph.name!r}: another graph already has a stage named {name!r}"
                )
            if name in self._pool_of:
                self._pool_of[name].check_cache(graph, stage)
        self._stages.update(graph.stages)
        self._checked.add(graph)
