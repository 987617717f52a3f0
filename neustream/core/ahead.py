"""The next step of a worker, decided while the present one runs.

The policy sees the pool as it should be when that step is over: `forecast` copies each of its jobs
and moves the copy on. What really came of the step then decides whether the plan holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from neustream.core.batch import Batch
from neustream.core.entry import Entry
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.policy import Pool
from neustream.core.queues import Queue
from neustream.core.step_times import Expected
from neustream.core.types import TICK
from neustream.core.work import Work, ends_call
from neustream.errors import NeustreamError

if TYPE_CHECKING:
    from neustream.core.pool_state import PoolState


_NOTHING = Expected(0.0, 0.0)


@dataclass(slots=True, eq=False)
class Plan:
    """What a worker does after the step under way.

    Args:
        after: the id of that step; `over_at`: when it should be over.
        decided_at: when the policy was asked.
        ran: where each of its jobs should be then; None: not in this pool.
        jobs: who runs next, in order of importance, each with its stage.
        sizes, drop: as in a Decision; parts: what each of `jobs` gets by it.
        expected: what the planned step should take.
        came: jobs that have come to the pool since.
        changed: whether the policy may decide otherwise by now.
    """

    after: int
    over_at: float
    decided_at: float
    ran: Mapping[Entry, Stage | None]
    jobs: Sequence[tuple[Entry, Stage]] = ()
    sizes: Mapping[Job, float] = field(default_factory=dict)
    drop: dict[Job, str] = field(default_factory=dict)
    parts: tuple[float, ...] = ()
    expected: Expected = _NOTHING
    came: list[Entry] = field(default_factory=list)
    changed: bool = False

    @property
    def taken(self) -> set[Entry]:
        """The jobs that run in the planned step and not in the one under way."""
        return {job for job, _ in self.jobs if job not in self.ran}

    def left(self, pool: Pool, worker: int, now: float) -> tuple[Job, ...]:
        """Who runs by it, now that the step is over; nobody: the policy has to be asked.

        Jobs that have ended, or are held, are left out. The plan is void if the step took longer by
        more than the planned one would, if a job is not where it should be, if another worker took
        one, or if the planned step would cost a job that came meanwhile its promise.
        """
        if now - self.over_at > self.expected.seconds or self._surprised(pool):
            return ()
        jobs: list[Job] = []
        for job, stage in self.jobs:
            if job.status == "running" or (pool.sticky and job.worker not in (-1, worker)):
                return ()
            if job.status == "waiting" and job.stage is stage and job not in self.drop:
                jobs.append(job)
        return () if self._costs_a_promise(now) else tuple(jobs)

    def _surprised(self, pool: Pool) -> bool:
        """Whether a job that ran waits in this pool, and not where it should be."""
        for job, expected in self.ran.items():
            stage = job.stage
            if job.status != "waiting" or stage is expected or stage is None:
                continue
            if stage.name in pool.stages:
                return True
        return False

    def _costs_a_promise(self, now: float) -> bool:
        """Whether a job that came meanwhile would be hopeless after the planned step, not now."""
        if not self.came:
            return False
        known = {*self.ran, *[job for job, _ in self.jobs]}
        for job in self.came:
            if job.status != "waiting" or job in known:
                continue
            if -TICK <= job.slack(now) < self.expected.seconds - TICK:
                return True
        return False


class Forecast(NamedTuple):
    """A pool as it should be when a step is over.

    `queues`: as in a View. `twins`: for each job of the step, what it should be like then; None if
    it should be gone. `freed`: KV blocks of those, by model.
    """

    queues: dict[str, Sequence[Job]]
    twins: dict[Entry, Entry | None]
    freed: Mapping[str, int]


def forecast(state: PoolState, batch: Batch, at: float, work: Work) -> Forecast:
    """The pool as it should be when `batch` is over, at the instant `at`."""
    twins: dict[Entry, Entry | None] = {}
    freed: dict[str, int] = {}
    for job, size in zip(cast("tuple[Entry, ...]", batch.jobs), batch.sizes, strict=True):
        twin = _moved_on(job, size, batch, at, work, state)
        if job.num_blocks and job.stage is not None and (twin is None or not twin.num_blocks):
            freed[job.stage.model] = freed.get(job.stage.model, 0) + job.num_blocks
        twins[job] = twin
    sooner = [plan.taken for plan in state.plans.values() if plan.over_at <= at]
    taken = set[Entry]().union(*sooner)  # by workers that are free before: later ones come too late
    return Forecast(_queues(state, batch, twins, taken), twins, freed)


def _queues(
    state: PoolState, batch: Batch, twins: Mapping[Entry, Entry | None], taken: Set[Entry]
) -> dict[str, Sequence[Job]]:
    """Who will wait where: those that wait now, and what the jobs of the step have become."""
    came: dict[Queue, list[Job]] = {}
    for job, twin in twins.items():
        if twin is not None and twin.queue is not job.queue:
            came.setdefault(twin.queue, []).append(twin)
    queues: dict[str, Sequence[Job]] = {}
    for queue in state.queues.busy(came.keys()):
        waiting: list[Job] = []
        for job in queue.jobs.values():
            twin = twins.get(job)
            if twin is not None and twin.queue is queue:
                waiting.append(twin)
            elif state.may_run(job, batch.worker) and job not in taken:
                waiting.append(job)
        waiting += came.get(queue, ())
        if waiting:
            queues[queue.stage] = waiting
    return queues


def _moved_on(
    job: Entry, size: float, batch: Batch, at: float, work: Work, state: PoolState
) -> Entry | None:
    """A copy of `job` behind its step; None if it should be over, held, or in another pool."""
    if job.ending is not None or job.keep:
        return None
    twin = copy_of(job)
    twin.base += job.queue.rounds - job.round + 1
    twin.worker = batch.worker
    if twin.started_at is None:
        twin.started_at = batch.started_at
    try:
        stage = _next_stage(twin, size, at, work)
    except NeustreamError:  # what the caller's own code raises is for the real move to tell
        return None
    queue = None if stage is None else state.queues.get(stage.name)
    if queue is None:
        return None
    if queue is not twin.queue:
        twin.queue, twin.joined_at = queue, at
        twin.base, twin.round = queue.rounds, -1
    return twin


def _next_stage(twin: Entry, size: float, at: float, work: Work) -> Stage | None:
    """Where a copy should be after a step of `size`; it is moved there."""
    stage, cursor = twin.stage, twin.cursor
    assert stage is not None and cursor is not None
    if stage.size is not None and size < twin.size:
        twin.computed += size
        work.measure(twin)
        return stage
    twin.computed = 0.0
    if stage.emits:
        twin.take_output(twin.output or {}, at)
    if cursor.again(twin, likely=True):
        work.one_call_done(twin, stage)
        return stage
    following = cursor.advance(twin, likely=True)
    legs = twin.request.graph.legs
    if legs and following is not None and work.legs.over(twin, stage):
        twin.call_outputs = 0
        work.legs.promise(twin, at, at)
    if ends_call(twin.request.graph, stage, following):
        twin.num_blocks = twin.call_outputs = 0
    twin.stage = following
    if following is not None:
        work.measure(twin)
    return following


def copy_of(job: Entry) -> Entry:
    """Another job in the same state, of the same request, that waits and can be moved on by itself.

    Attribute by attribute: this is done for every job of every step, and loops over names take six
    times as long.
    """
    twin = Entry.__new__(Entry)
    twin.alone_s = job.alone_s
    twin.arrival = job.arrival
    twin.asked = job.asked
    twin.call_outputs = job.call_outputs
    twin.computed = job.computed
    twin.due = job.due
    twin.due_next = job.due_next
    twin.ended_at = job.ended_at
    twin.first_at = job.first_at
    twin.id = job.id
    twin.joined_at = job.joined_at
    twin.late = job.late
    twin.later = job.later
    twin.leg = job.leg
    twin.leg_at = job.leg_at
    twin.leg_base = job.leg_base
    twin.leg_due = job.leg_due
    twin.leg_entry = job.leg_entry
    twin.leg_late = job.leg_late
    twin.leg_latest = job.leg_latest
    twin.leg_since = job.leg_since
    twin.leg_until = job.leg_until
    twin.next_output_s = job.next_output_s
    twin.host_blocks = job.host_blocks
    twin.num_blocks = job.num_blocks
    twin.output = job.output
    twin.outputs = job.outputs
    twin.params = job.params
    twin.planned_calls = job.planned_calls
    twin.promised = job.promised
    twin.reason = job.reason
    twin.remaining_s = job.remaining_s
    twin.request = job.request
    twin.history = job.history
    twin.sizes_ahead = job.sizes_ahead
    twin.slo = job.slo
    twin.stage = job.stage
    twin.started_at = job.started_at
    twin.state = job.state
    twin.unit_s = job.unit_s
    twin.weight = job.weight
    twin.worker = job.worker
    twin.base = job.base
    twin.behind_s = job.behind_s
    twin.behind_output_s = job.behind_output_s
    twin.ending = job.ending
    twin.keep = job.keep
    twin.fork = None
    twin.origin = job.origin
    twin.parent = job.parent
    twin.branch = job.branch
    twin.ran = job.ran
    twin.after = job.after
    twin.outer_until = job.outer_until
    twin.tails = job.tails
    twin.queue = job.queue
    twin.round = job.round
    twin.unit_size = job.unit_size
    twin.status = "waiting"
    twin.calls_left = dict(job.calls_left)
    twin.cursor = None if job.cursor is None else job.cursor.copy()
    return twin
