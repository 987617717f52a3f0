"""A scheduler whose jobs are the requests of a serving system that owns its own loop and its own
memory.

What that system does is told to it: tokens that are computed already, blocks that were taken,
requests that are over, and who really runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from neustream.core.batch import Batch
from neustream.core.job import Job
from neustream.core.scheduler import Scheduler
from neustream.errors import PolicyError


class Mirror(Scheduler):
    """A scheduler that follows a foreign loop; its pools' KV caches are `external`."""

    def complete(self, id: str, now: float) -> bool:
        """End a request as done, because the loop knows that it is; as `cancel` otherwise."""
        return self._lives.end_soon(id, "done", "", now)

    def mark_computed(self, id: str, tokens: float) -> bool:
        """So many tokens of a request's prefill are computed without a step here (a prefix cache).

        To be told before the step that it is in is admitted. Fewer than are computed already change
        nothing. False if no such request is being served, or if it is not at a prefill.
        """
        job = self._lives.jobs.get(id)
        if job is None or job.stage is None or job.stage.size is None:
            return False
        if job.stage.phase == "decode":
            return False
        if tokens > job.computed:
            job.computed = min(tokens, job.computed + job.size)
            self._lives.remeasure(job)
        return True

    def preempt(self, id: str, now: float) -> bool:
        """The blocks of a request were taken: it goes back to its prefill.

        False if no such request is being served. PolicyError if it is in a step.
        """
        job = self._lives.jobs.get(id)
        if job is None:
            return False
        if job.status == "running":
            raise PolicyError(
                f"preempt: request {id!r} is in a step; admit that step without it first"
            )
        self._lives.preempt(job, now)
        return True

    def set_free_blocks(self, pool: str, blocks: int) -> None:
        """What the owner of the KV cache says is free."""
        cache = self._pools[pool].blocks
        assert cache is not None
        cache.set_free(blocks)

    def run_instead(self, batch: Batch, sizes: Mapping[Job, float], now: float) -> Batch | None:
        """Who runs in place of `batch`, and how much of its step each does; the loop knows better.

        Jobs of `sizes` need not be in `batch`. Those of `batch` that are not in `sizes` wait again,
        and count as skipped. Returns the batch that runs, None if it is empty.
        """
        for job in sizes:
            stage = job.stage
            if job in batch.jobs:
                continue
            known = self._lives.jobs.get(job.id) is job and job.status == "waiting"
            if not known or stage is None or stage.name not in self._pools[batch.pool].queues:
                raise PolicyError(f"run_instead: {job!r} is not runnable in pool {batch.pool!r}")
        return self._run_instead(batch, sizes, now)
