"""Asks a member's scheduler for steps, and covers for policies that raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from neustream.core.asked import Asked
from neustream.core.batch import Batch
from neustream.core.job import Job
from neustream.core.policies import FCFS
from neustream.core.scheduler import Scheduler
from neustream.engine.clock import Clock, stopwatch
from neustream.engine.events import Decided, Record
from neustream.engine.looks import Looks
from neustream.errors import told

log = logging.getLogger(__name__)


class Deciding:
    """Has decisions made for one scheduler, and tells of them.

    Args:
        looks: when plans are made; it is told how long decisions take.

    Attributes:
        forgiving: whether a policy's fault is covered by FCFS; else it ends the loop.
        faults: how often that happened.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        looks: Looks | None,
        tell: Callable[[Record], None],
        member: str,
    ) -> None:
        self.forgiving = False
        self.faults = 0
        self._scheduler = scheduler
        self._clock = clock
        self._looks = looks
        self._tell = tell
        self._member = member

    def next(self, pool: str, worker: int, now: float) -> Batch | None:
        """The next step of a worker, if any."""
        scheduler = self._scheduler
        asked, began = scheduler.asked, stopwatch()
        try:
            batch = scheduler.next_batch(pool, now, worker)
        except BaseException as error:
            if not self.forgiving:
                raise
            self._fault(error)
            batch = self._fcfs(pool, worker, now)
        if scheduler.asked is not asked:
            self._decided(pool, now, began, scheduler.asked.since(asked), ahead=False)
        return batch

    def _decided(self, pool: str, now: float, began: float, asked: Asked, *, ahead: bool) -> None:
        """A policy was asked something, `began` on the stopwatch."""
        seconds = self._clock.decided(stopwatch() - began, asked)
        if self._looks is not None:
            self._looks.took(seconds)
        about = asked.requests, asked.new
        self._tell(Decided(pool, now, seconds, ahead, self._member, *about))

    def _fault(self, error: BaseException) -> None:
        """A policy raised, or decided what cannot be: log it now and then."""
        count = self.faults = self.faults + 1
        if count in (1, 10, 100) or count % 1000 == 0:
            log.error("policy fault %d: %s; FCFS decided in its place", count, told(error))

    def _fcfs(self, pool: str, worker: int, now: float) -> Batch | None:
        """The next step by FCFS. Where that raises too, a profile does: the oldest job fails."""
        while True:
            try:
                return self._scheduler.next_batch(pool, now, worker, FCFS(drop_hopeless=False))
            except BaseException as error:
                job = self._oldest(pool)
                if job is None:
                    raise
                reason = f"no step could be planned for it: {told(error)}"
                log.error("pool %r: request %r: %s", pool, job.id, reason)
                self._scheduler.give_up(job.id, reason, now)

    def _oldest(self, pool: str) -> Job | None:
        """The job that has been waiting longest in `pool`."""
        jobs = [job for job in at_pool(self._scheduler, pool) if job.status == "waiting"]
        return min(jobs, key=lambda job: job.arrival, default=None)

    def plan(self, batch: Batch, now: float) -> None:
        """Decide what follows `batch`."""
        scheduler = self._scheduler
        asked, began = scheduler.asked, stopwatch()
        self._plan(batch, now)
        if scheduler.asked is not asked:
            self._decided(batch.pool, now, began, scheduler.asked.since(asked), ahead=True)

    def _plan(self, batch: Batch, now: float) -> None:
        try:
            self._scheduler.plan(batch, now)
        except BaseException as error:
            if not self.forgiving:
                raise
            self._fault(error)
            with suppress(Exception):  # of a profile: the step itself will tell
                self._scheduler.plan(batch, now, FCFS(drop_hopeless=False))


def at_pool(scheduler: Scheduler, pool: str) -> list[Job]:
    """The jobs that are at a stage of `pool`."""
    stages = set(scheduler.pools[pool].stages)
    jobs = scheduler.jobs.values()
    return [job for job in jobs if job.stage is not None and job.stage.name in stages]
