"""What a scheduler keeps of one pool: queues, steps under way, KV blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from neustream.core.batch import Batch
from neustream.core.carry import Carry
from neustream.core.job import Entry, Job, Queue
from neustream.core.kv_cache import BlockPool
from neustream.core.policy import Policy, Pool, Unpromised, View
from neustream.errors import GraphError, PolicyError, RequestError


class PoolState:
    """One pool of a scheduler.

    Attributes:
        queues: by stage; running: steps under way by their id.
        blocks: of its KV cache, None without one.
        wake_at: when the policy wants to be asked again.
        out: jobs that are in a queue and in no view (held).
        unpromised: what jobs without a promise got of the device.
        memo: see `View.memo`.
    """

    __slots__ = (
        "blocks",
        "memo",
        "out",
        "policy",
        "pool",
        "queues",
        "running",
        "unpromised",
        "wake_at",
    )

    def __init__(self, pool: Pool, policy: Policy) -> None:
        if pool.workers < 1:
            raise GraphError(f"pool {pool.name!r}: workers must be 1 or more, got {pool.workers}")
        if pool.kv_cache is not None and pool.workers > 1:
            raise GraphError(
                f"pool {pool.name!r}: a KV cache is one worker's; {pool.workers} need a pool each"
            )
        self.pool = pool
        self.policy = policy
        self.blocks = None if pool.kv_cache is None else BlockPool(pool.name, pool.kv_cache)
        self.queues: dict[str, Queue] = {}
        self.running: dict[int, Batch] = {}
        self.wake_at: float | None = None
        self.out = 0
        self.unpromised = Unpromised()
        self.memo: dict[Any, Any] = {}

    def open(self, stages: Iterable[str]) -> None:
        """Serve more stages."""
        stages = tuple(stages)
        for stage in stages:
            self.queues[stage] = Queue(stage)
        self.pool = replace(self.pool, stages=(*self.pool.stages, *stages))

    def waiting(self, worker: int) -> dict[str, Sequence[Job]]:
        """The runnable jobs by stage, as `worker` may run them."""
        queues: dict[str, Sequence[Job]] = {}
        sticky, some_out = self.pool.sticky, bool(self.running) or self.out > 0
        for stage, queue in self.queues.items():
            if not queue.jobs:
                continue
            jobs: list[Entry] = list(queue.jobs.values())
            if some_out:
                jobs = [job for job in jobs if job.status == "waiting"]
            if sticky:
                jobs = [job for job in jobs if job.worker in (-1, worker)]
            if jobs:
                queues[stage] = jobs
        return queues

    def all_jobs(self) -> list[Job]:
        """Its live jobs, waiting, held or running."""
        return [job for queue in self.queues.values() for job in queue.jobs.values()]

    def note_unpromised(self, batch: Batch, seconds: float) -> None:
        """A step ran while jobs without a promise were there."""
        count = sum([not job.promised for job in batch.jobs])
        busy, served = self.unpromised
        share = seconds * count / len(batch.jobs)
        self.unpromised = Unpromised(busy + seconds, served + share)

    def take_off(self, batch: Batch) -> None:
        """A step is not running any more; PolicyError if it was not."""
        if self.running.pop(batch.id, None) is None:
            raise PolicyError(f"batch {batch.id} of pool {batch.pool!r} is not running")

    # -- blocks -----------------------------------------------------------------------------------

    def set_tokens(self, job: Job, tokens: float) -> None:
        """Let `job` hold the blocks of so many tokens."""
        if self.blocks is not None and (tokens or job.num_blocks):
            self.blocks.set_tokens(job, tokens)

    def check_room(self, carry: Carry) -> None:
        """RequestError if there are no blocks for what a request kept where it comes from."""
        if self.blocks is None:
            return
        blocks = self.blocks.cache.blocks_of(carry.kept)
        if blocks > self.blocks.free:
            raise RequestError(
                f"pool {self.pool.name!r}: request {carry.id!r} comes with {blocks} blocks, "
                f"{self.blocks.free} of {self.blocks.cache.num_blocks} are free"
            )


def with_blocks(view: View) -> View:
    """The view without the jobs that hold no KV blocks and would need some."""
    queues = {}
    for name, queue in view.queues.items():
        jobs = [job for job in queue if job.num_blocks or not (job.stage and job.stage.caches)]
        if jobs:
            queues[name] = jobs
    return replace(view, queues=queues)
