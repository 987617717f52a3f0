"""What a scheduler keeps of one pool: queues, steps under way, KV blocks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from neustream.core.ahead import Plan
from neustream.core.batch import Batch
from neustream.core.carry import Carry
from neustream.core.entry import Entry
from neustream.core.forks import tell_ran
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.kv_cache import BlockPool
from neustream.core.policy import Policy, Pool, Unpromised, View, background_of
from neustream.core.pool_checks import check_policy, check_pool
from neustream.core.profile import LatencyProfile
from neustream.core.queues import Queues
from neustream.errors import GraphError, PolicyError, RequestError

if TYPE_CHECKING:
    from neustream.core.standing import Standing


class Again(NamedTuple):
    """What a policy would decide anew until some time (`Decision.until` to `later`).

    `in_time`: those of `jobs` that were not late; `moves`: of the pool's queues; `unpromised`: live
    jobs without a promise; `profiles`, `speed`: what steps take, by what was known.
    """

    jobs: tuple[Job, ...]
    until: float
    within: float | None
    slower: float
    later: float
    in_time: Sequence[Job]
    moves: int
    unpromised: int
    profiles: Mapping[str, LatencyProfile]
    speed: Mapping[str, float]

    def holds(self, now: float) -> bool:
        """Whether nobody has too little time by `within`, where that is given."""
        if self.within is None:
            return True
        latest = now + self.within
        return not [job for job in self.in_time if job.due_next < latest or job.late]


class PoolState:
    """One pool of a scheduler.

    Attributes:
        queues: by stage; running: steps under way by their id.
        plans: what workers do after the steps that they are in, where that is decided.
        blocks: of its KV caches, by model.
        wake_at: when the policy wants to be asked again.
        again: the step that runs anew if nothing happens meanwhile; standing: the same, where it is
            certain what comes of it.
        out: jobs that are in a queue and in no view (held).
        freed: when the latest step of each worker ended that was not asked for another one since.
        unpromised: what jobs without a promise got of the device.
        memo: see `View.memo`.
    """

    __slots__ = (
        "again",
        "blocks",
        "freed",
        "memo",
        "out",
        "plans",
        "policy",
        "pool",
        "queues",
        "running",
        "standing",
        "unpromised",
        "wake_at",
    )

    def __init__(self, pool: Pool, policy: Policy | None) -> None:
        check_pool(pool)
        if pool.concurrency is None:
            check_policy(pool, policy)
        self.pool = pool
        self.policy = policy  # None: jobs just start
        self.blocks = {
            model: BlockPool(pool.name, model, cache) for model, cache in pool.kv_caches.items()
        }
        self.queues = Queues()
        self.running: dict[int, Batch] = {}
        self.plans: dict[int, Plan] = {}
        self.wake_at: float | None = None
        self.again: Again | None = None
        self.standing: Standing | None = None
        self.out = 0
        self.freed: dict[int, float] = {}
        self.unpromised = Unpromised()
        self.memo: dict[Any, Any] = {}

    def open(self, stages: Iterable[str]) -> None:
        """Serve more stages."""
        stages = tuple(stages)
        for stage in stages:
            self.queues.open(stage)
        self.pool = replace(self.pool, stages=(*self.pool.stages, *stages))

    def close(self, stages: Collection[str]) -> None:
        """Serve some stages no more; nobody is at them."""
        for stage in stages:
            self.queues.close(stage)
        self.pool = replace(
            self.pool, stages=tuple([stage for stage in self.pool.stages if stage not in stages])
        )

    def waiting(self, worker: int) -> dict[str, Sequence[Job]]:
        """The runnable jobs by stage, as `worker` may run them."""
        queues: dict[str, Sequence[Job]] = {}
        some_are_out = bool(self.running) or self.out > 0
        for queue in self.queues.busy():
            jobs: list[Entry] = list(queue.jobs.values())
            if some_are_out:
                jobs = [job for job in jobs if job.status == "waiting"]
            if self.pool.sticky:
                jobs = _of_worker(jobs, worker)
            if jobs:
                queues[queue.stage] = jobs
        return queues

    def first(self) -> Entry | None:
        """The waiting job that came first."""
        return self.queues.first()

    def may_run(self, job: Entry, worker: int) -> bool:
        """Whether `worker` may run a job now."""
        bound = self.pool.sticky and job.worker not in (-1, worker)
        return job.status == "waiting" and not bound

    def note(self, job: Entry) -> None:
        """A job came to the pool, or left it: what was planned may be decided otherwise."""
        for plan in self.plans.values():
            plan.changed = True
            plan.came.append(job)

    def unpromised_after(self, batch: Batch, seconds: float) -> Unpromised:
        """What jobs without a promise will have got after a step that runs while some are there."""
        count = sum([not job.promised for job in batch.jobs])
        part = count / len(batch.jobs)
        return self.unpromised.after(seconds, part, background_of(self.policy))

    # -- steps ------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> None:
        """A step runs from now on."""
        entries = cast("tuple[Entry, ...]", batch.jobs)
        for queue in {job.queue for job in entries}:
            queue.rounds += 1
            queue.change()
        for job in entries:
            job.status = "running"
            job.round = job.queue.rounds
        for plan in self.plans.values():
            plan.changed = plan.changed or not plan.taken.isdisjoint(entries)
        if self.blocks:
            self._hold_blocks(batch.jobs, batch.sizes)
        self.running[batch.id] = batch

    def _hold_blocks(self, jobs: Sequence[Job], sizes: Sequence[float]) -> None:
        """Let jobs hold the blocks of what they will have after a step of these sizes."""
        blocks = self.blocks_at(jobs[0].stage)
        if blocks is None:
            return
        block_size = blocks.cache.block_size
        for job, size in zip(jobs, sizes, strict=True):
            stage = job.stage
            if stage is None or stage.phase == "step":
                continue
            tokens = size if stage.phase == "decode" else job.computed + size
            spare = job.num_blocks * block_size - tokens
            if job.host_blocks or not 0 <= spare < block_size:
                blocks.set_tokens(job, tokens)

    def begin(self, batch: Batch, now: float) -> Batch:
        """Note that a step that is running began at `now`."""
        self.take_off(batch)
        begun = self.running[batch.id] = replace(batch, started_at=now)
        return begun

    def free_since(self, worker: int, jobs: Sequence[Job]) -> float:
        """When a worker ended the step before one of `jobs`, if some of these had come by then; inf
        if it had nothing to do."""
        freed = self.freed.get(worker, math.inf)
        for job in jobs:
            if job.joined_at <= freed:
                return freed
        return math.inf

    def take_off(self, batch: Batch) -> None:
        """A step is not running any more; PolicyError if it was not."""
        if self.running.pop(batch.id, None) is None:
            raise PolicyError(f"batch {batch.id} of pool {batch.pool!r} is not running")

    def over(self, batch: Batch) -> None:
        """A step is over: one that stands does so for longer."""
        self.take_off(batch)
        again = self.again
        if again is not None and again.later and again.jobs is batch.jobs:  # it was that step
            self.again = again._replace(until=again.until + again.later)

    def retire(self, batch: Batch) -> None:
        """A step is over. Steps that ran beside it skipped none of its jobs."""
        self.over(batch)
        for job in cast("tuple[Entry, ...]", batch.jobs):
            job.base += job.queue.rounds - job.round + 1
            job.worker = batch.worker
            if job.started_at is None:
                job.started_at = batch.started_at
                job.root.ran = True
            if job.request.graph.collects:
                tell_ran(job, batch.started_at)

    # -- blocks -----------------------------------------------------------------------------------

    @property
    def blocks_kept(self) -> bool:
        """Whether KV blocks may be kept for requests that are in no view.

        Those are held, on their way here, or about to leave.
        """
        if not self.blocks:
            return False
        return self.out > 0 or any(self._kept_aside(model) for model in self.blocks)

    def _kept_aside(self, model: str) -> bool:
        """Whether blocks of a model are reserved, or held by jobs that are in no queue."""
        blocks = self.blocks[model]
        held = sum([job.num_blocks for job in self.jobs_of(model)])
        return blocks.reserved > 0 or blocks.used > held

    @property
    def free_blocks(self) -> dict[str, int]:
        """Blocks that nobody holds, by model."""
        return {model: blocks.free for model, blocks in self.blocks.items()}

    def blocks_at(self, stage: Stage | None) -> BlockPool | None:
        """The blocks that jobs at a stage hold and need; None where there is no limit."""
        return None if stage is None else self.blocks.get(stage.model)

    def blocks_of(self, model: str) -> BlockPool:
        """The blocks of a model; RequestError if it has no KV cache here."""
        blocks = self.blocks.get(model)
        if blocks is None:
            raise RequestError(
                f"pool {self.pool.name!r} has no KV cache of model {model!r}; "
                f"KV caches: {sorted(self.blocks)}"
            )
        return blocks

    def jobs_of(self, model: str) -> Iterator[Job]:
        """Its live jobs at the stages of a model."""
        for queue in self.queues.busy():
            for job in queue.jobs.values():
                if job.stage is None or job.stage.model != model:
                    break  # those of a queue are all at one stage
                yield job

    def set_tokens(self, job: Job, tokens: float) -> None:
        """Let `job` hold the blocks of so many tokens."""
        if not tokens and not job.num_blocks and not job.host_blocks:
            return
        blocks = self.blocks_at(job.stage)
        if blocks is not None:
            blocks.set_tokens(job, tokens)

    def check_room(self, carry: Carry, stage: Stage) -> None:
        """RequestError if there are no blocks for what a request at `stage` kept elsewhere."""
        blocks = self.blocks_at(stage)
        if blocks is None:
            return
        needed = blocks.cache.blocks_of(carry.kept)
        if needed > blocks.free:
            raise RequestError(
                f"{blocks.name}: request {carry.id!r} comes with {needed} blocks, "
                f"{blocks.free} of {blocks.cache.num_blocks} are free"
            )

    def check_cache(self, graph: Graph, stage: Stage) -> None:
        """GraphError for a model that has no KV cache here although others have one."""
        if stage.caches and self.blocks and stage.model not in self.blocks:
            raise GraphError(
                f"graph {graph.name!r}: model {stage.model!r} of stage {stage.name!r} has no KV "
                f"cache in pool {self.pool.name!r}; KV caches: {sorted(self.blocks)}"
            )


def name_of_step(jobs: Sequence[Job]) -> str:
    """What a step of `jobs` is called: their stage, or the model of several."""
    stages = [job.stage for job in jobs]
    first = stages[0]
    assert first is not None
    return first.name if stages.count(first) == len(stages) else first.model


def _of_worker(jobs: list[Entry], worker: int) -> list[Entry]:
    """Those that `worker` started, or that nobody did."""
    return [job for job in jobs if job.worker in (-1, worker)]


def with_blocks(view: View, models: Collection[str]) -> View:
    """The view without the jobs of some models that hold no KV blocks and would need some."""
    queues = {}
    for name, queue in view.queues.items():
        stage = queue[0].stage
        jobs = queue
        if stage is not None and stage.caches and stage.model in models:
            jobs = [job for job in queue if job.num_blocks]
        if jobs:
            queues[name] = jobs
    return replace(view, queues=queues)
