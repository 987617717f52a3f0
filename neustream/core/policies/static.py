"""Whole-request batches."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.graph import Graph
from neustream.core.policies.batching import continued
from neustream.core.policy import Decision, View
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Static:
    """Whole-request batches, first come first served, run to completion.

    What servers with dynamic batching do with a pipeline (Triton, TorchServe): whoever waits when a
    worker is free forms the next batch, and nobody joins it later. Requests of unequal step counts
    may share a batch; those with fewer steps wait at the end of the loop for the rest. A batch is
    as large as the looped stages allow (all stages, where none is looped) and at most `max_batch`;
    other stages take it in several steps if they must. `drop_hopeless` gives up requests that
    cannot be on time any more before they start.

    Raises:
        ConfigError: a parameter is out of bounds.
    """

    max_batch: int | None = None
    drop_hopeless: bool = False

    def __post_init__(self) -> None:
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(f"static: max_batch must be 1 or more, got {self.max_batch}")

    def decide(self, view: View) -> Decision:
        if batch := continued(view):
            return Decision(batch)
        drop = view.hopeless() if self.drop_hopeless else {}
        fresh = [job for job in view.jobs if job.worker < 0 and job not in drop]
        if not fresh:
            return Decision(drop=drop)
        fresh.sort(key=lambda job: job.arrival)
        first = fresh[0]
        assert first.stage is not None
        graph = first.request.graph
        alike = [job for job in fresh if job.stage is first.stage and job.request.graph is graph]
        most = min(self._largest(view, graph), view.limit(first.stage.name))
        return Decision(alike[:most], drop)

    def _largest(self, view: View, graph: Graph) -> int:
        """The largest batch: what all looped stages of the pool take, all stages without a loop."""
        here = [name for name in view.pool.stages if name in graph.stages]
        looped = [name for name in here if name in graph.looped]
        limits = [
            min(graph.stages[name].max_batch, view.profiles[name].max_batch)
            for name in looped or here
        ]
        if self.max_batch is not None:
            limits.append(self.max_batch)
        return min(limits)
