"""The one loop: it feeds a scheduler with what happens, and starts the steps that it chooses.

Simulating and serving differ in `clock` and `executors`, nowhere else. Where requests come from is
the business of `replay.py` (a workload) and `engine.py` (callers).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from neustream.core.batch import Batch, StepInfo
from neustream.core.events import Ended, Given, Submitted, submitted
from neustream.core.job import Job
from neustream.core.policies import FCFS
from neustream.core.reasons import span
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import Clock, stopwatch
from neustream.engine.events import Decided, Done, Event, Finished, Observer, Overdue, Record, Wake
from neustream.engine.executor import Executor
from neustream.engine.overdue import Limits
from neustream.errors import RequestError, StageFailed, told

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where requests come from."""

    @property
    def over(self) -> bool:
        """Whether no more will come."""
        ...


class Loop:
    """Drives a scheduler on a clock.

    Args:
        scheduler: whose pools are served.
        executors: one per pool, by the pool's name.
        clock: virtual or wall.
        step_timeout_s: a step that does not come back for so long fails its requests (see
            `Limits`). Steps are timed while `forgiving` alone.

    Attributes:
        observers: told of every record. One that raises is removed, and the log says so.
        forgiving: whether a policy's fault is covered by FCFS; else it ends the loop.
        policy_faults: how often that happened; `closed`: why a pool serves nothing any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executors: Mapping[str, Executor],
        clock: Clock,
        observers: Sequence[Observer] = (),
        step_timeout_s: float | None = None,
    ) -> None:
        if set(executors) != set(scheduler.pools):
            raise RequestError(
                f"executors for {sorted(executors)}, but pools are {sorted(scheduler.pools)}"
            )
        self.scheduler = scheduler
        self.clock = clock
        self.executors = dict(executors)
        self.observers = list(observers)
        self.forgiving = False
        self.policy_faults = 0
        self.closed: dict[str, str] = {}
        self.handlers: dict[type[Any], Callable[[Any, float], None]] = {
            Done: self._done,
            Wake: lambda event, now: None,
            Overdue: self._overdue,
        }
        self._limits = Limits(clock, step_timeout_s)
        self._idle = {pool.name: list(range(pool.workers)) for pool in scheduler.pools.values()}
        self._wakes = dict.fromkeys(self._idle, -1.0)  # when each pool is woken next, if ahead
        self._under_way: dict[int, tuple[StepInfo, Batch]] = {}
        self._records: list[Record] = []  # what observers are still to be told

    # -- running ----------------------------------------------------------------------------------

    def run(self, source: Source) -> None:
        """Until `source` is over and all requests have ended."""
        pools = list(self._idle)
        while not source.over or self.scheduler.jobs:
            events = self.clock.wait()
            if not events:
                raise RequestError(
                    f"{len(self.scheduler.jobs)} request(s) are open, but nothing will ever happen"
                )
            for event in events:
                self.handle(event)
            if self.closed:
                self._turn_away()
            for pool in pools:
                if self._idle[pool]:
                    self._dispatch(pool)
            self._settle()
            self.publish()
            del events, event  # while idle, hold no finished request's results

    def handle(self, event: Event) -> None:
        """Take in one event."""
        self.handlers[type(event)](event, self.clock.now())
        self._settle()

    def accept(self, request: Request, now: float) -> Submitted:
        """Take a request in; NeustreamError if that cannot be."""
        if self.closed:
            self._check_open(request)
        record = submitted(self.scheduler.submit(request, now), now)
        self.tell(record)
        return record

    def cancel_all(self, now: float) -> None:
        """End all open requests as cancelled."""
        for id in list(self.scheduler.jobs):
            self.scheduler.cancel(id, now)

    def tell(self, record: Record) -> None:
        """Let observers know, once the steps that can start have started."""
        self._records.append(record)

    def lost(self, pool: str) -> bool:
        """Whether a worker of `pool` is still in a step that was given up."""
        return bool(self._limits.lost(pool))

    def publish(self) -> None:
        """Tell observers what has happened, while the next steps run."""
        records, self._records = self._records, []
        for record in records:
            for observer in list(self.observers):
                try:
                    observer(record)
                except BaseException:
                    self.observers.remove(observer)
                    log.exception("observer %r raised; it is told nothing more", observer)

    # -- steps ------------------------------------------------------------------------------------

    def _dispatch(self, pool: str) -> None:
        idle = self._idle[pool]
        for worker in list(idle):
            now = self.clock.now()
            batch, info = self._decide(pool, worker, now)
            if batch is not None:
                idle.remove(worker)
                self._start(batch, batch.info() if info is None else info, now)
                continue
            at = self.scheduler.wake_at(pool)
            if at is not None and not now < self._wakes[pool] <= at:
                self._wakes[pool] = at  # one that comes no later is under way otherwise
                self.clock.post(Wake(pool), at)

    def _decide(self, pool: str, worker: int, now: float) -> tuple[Batch | None, StepInfo | None]:
        """The next step, and what observers are told of it if a policy was asked."""
        scheduler = self.scheduler
        asked, began = scheduler.decisions, stopwatch()
        try:
            batch = scheduler.next_batch(pool, now, worker)
        except BaseException as error:
            if not self.forgiving:
                raise
            count = self.policy_faults = self.policy_faults + 1
            if count in (1, 10, 100) or count % 1000 == 0:
                log.error("policy fault %d: %s; FCFS decided in its place", count, told(error))
            batch = self._fcfs(pool, worker, now)
        if scheduler.decisions == asked:
            return batch, None
        info = None if batch is None else batch.info()
        self.tell(Decided(pool, now, stopwatch() - began, info))
        return batch, info

    def _fcfs(self, pool: str, worker: int, now: float) -> Batch | None:
        """The next step by FCFS. Where that raises too, a profile does: the oldest job fails."""
        while True:
            try:
                return self.scheduler.next_batch(pool, now, worker, FCFS(drop_hopeless=False))
            except BaseException as error:
                job = self._oldest(pool)
                if job is None:
                    raise
                reason = f"no step could be planned for it: {told(error)}"
                log.error("pool %r: request %r: %s", pool, job.id, reason)
                self.scheduler.give_up(job.id, reason, now)

    def _oldest(self, pool: str) -> Job | None:
        """The job that has been waiting longest in `pool`."""
        jobs = [job for job in self._at(pool) if job.status == "waiting"]
        return min(jobs, key=lambda job: job.arrival, default=None)

    def _at(self, pool: str) -> list[Job]:
        """The jobs that are at a stage of `pool`."""
        stages = set(self.scheduler.pools[pool].stages)
        jobs = self.scheduler.jobs.values()
        return [job for job in jobs if job.stage is not None and job.stage.name in stages]

    def _start(self, batch: Batch, info: StepInfo, now: float) -> None:
        self._under_way[batch.id] = info, batch
        self._settle()
        executor = self.executors[batch.pool]
        if self.forgiving:
            self._limits.watch(batch, now)
        try:
            for job in batch.preempted:
                executor.release(job.id)
            executor.start(batch, self.clock)
        except BaseException as error:
            if not self.forgiving:
                raise
            failed = StageFailed(f"stage {batch.stage!r}: its step could not start: {told(error)}")
            failed.__cause__ = error
            self.clock.post(Done(batch, failed), now)

    def _done(self, event: Done, now: float) -> None:
        batch, results = event.batch, event.results
        if self._limits.ended(batch):  # given up, and back after all
            self._idle[batch.pool].append(batch.worker)
            self.closed.pop(batch.pool, None)
            return
        info, _ = self._under_way.pop(batch.id)
        self._idle[batch.pool].append(batch.worker)
        if isinstance(results, BaseException):
            self.scheduler.fail(batch, results, now)
            error = told(results) or type(results).__name__
        else:
            whole = len(results) == len(batch)
            error = "" if whole else f"{len(results)} results for {len(batch)} jobs"
            self.scheduler.finish(batch, results, now)
        self.tell(Finished(info, now, error))

    # -- steps that do not come back --------------------------------------------------------------

    def _overdue(self, event: Overdue, now: float) -> None:
        for number, limit in self._limits.over(now).items():
            self._give_up(number, limit, now)

    def _give_up(self, number: int, limit: float, now: float) -> None:
        """A step did not come back: its requests fail, and its worker gets no more."""
        info, batch = self._under_way.pop(number)
        seconds = limit - batch.started_at
        reason = f"stage {batch.stage!r}: its step did not come back within {span(seconds)}"
        log.error("pool %r, worker %d: %s", batch.pool, batch.worker, reason)
        self.scheduler.fail(batch, StageFailed(reason), now)
        self.tell(Finished(info, now, reason))
        self._limits.lose(batch)
        pool = self.scheduler.pools[batch.pool]
        if len(self._limits.lost(batch.pool)) == pool.workers:
            self._close(batch.pool, f"pool {batch.pool!r} is closed: {reason}", now)
        elif pool.sticky:
            self._give_up_bound(batch.pool, batch.worker, reason, now)

    def _close(self, pool: str, reason: str, now: float) -> None:
        """No worker of a pool is left: requests that will need it, or come, hear of it."""
        self.closed[pool] = reason
        stages = set(self.scheduler.pools[pool].stages)
        for id, job in list(self.scheduler.jobs.items()):
            if not stages.isdisjoint(job.calls_left):
                self.scheduler.give_up(id, reason, now)

    def _give_up_bound(self, pool: str, worker: int, reason: str, now: float) -> None:
        """A worker of a sticky pool is lost: so is what it keeps of requests that wait for it."""
        for job in self._at(pool):
            if job.worker == worker:
                self.scheduler.give_up(job.id, reason, now)

    def _turn_away(self) -> None:
        """Fail the jobs that have come to a closed pool by a branch that was not expected."""
        for pool, reason in self.closed.items():
            for job in self._at(pool):
                if job.status == "waiting":
                    self.scheduler.give_up(job.id, reason, self.clock.now())

    def _check_open(self, request: Request) -> None:
        for pool, reason in self.closed.items():
            if not set(self.scheduler.pools[pool].stages).isdisjoint(request.graph.stages):
                raise RequestError(f"request {request.id!r}: {reason}")

    # -- what the scheduler tells -----------------------------------------------------------------

    def _settle(self) -> None:
        """Take note of what the scheduler's last moves brought about.

        Executors hear of ended requests at once: KV blocks that are handed out anew must be free.
        """
        events = self.scheduler.pop_events()
        for event in events:
            if isinstance(event, Ended | Given):
                self._release(event.id)
        self._records += events

    def _release(self, id: str) -> None:
        for pool, executor in self.executors.items():
            try:
                executor.release(id)
            except Exception:
                log.exception("pool %r: request %r could not be released", pool, id)
