"""Whole-request batches."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.policies.batching import continued
from neustream.core.policy import Decision, View
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Static:
    """Whole-request batches, first come first served, run to completion.

    What servers with dynamic batching do with a pipeline (Triton, TorchServe): whoever waits when a
    worker is free forms the next batch, and nobody joins it later. Requests of unequal step counts
    may share a batch; those with fewer steps wait at the end of the loop for the rest. A batch is as
    large as the looped stages allow (all stages, where none is looped) and at most `max_batch`;
    other stages take it in several steps if they must. `drop_hopeless` gives up requests that
    cannot be on time any more before they start.
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
        graph, stage = fresh[0].request.graph, fresh[0].stage
        assert stage is not None
        here = [name for name in view.pool.stages if name in graph.stages]
        here = [name for name in here if name in graph.looped] or here
        most = min(
            min(graph.stages[name].max_batch, view.profiles[name].max_batch) for name in here
        )
        alike = [job for job in fresh if job.stage is stage and job.request.graph is graph]
        return Decision(alike[: min(most, self.max_batch or most, view.limit(stage.name))], drop)
