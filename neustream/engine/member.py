"""One instance of what is served, and what the loop does for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import cast

from neustream.core.batch import Batch, StepInfo
from neustream.core.events import (
    BranchEnded,
    Emitted,
    Ended,
    Ending,
    Given,
    Held,
    Left,
    LegEnded,
    Submitted,
    submitted,
)
from neustream.core.events import Event as SchedulerEvent
from neustream.core.kv_cache import KVCache
from neustream.core.reasons import span
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import Clock
from neustream.engine.deciding import Deciding, at_pool
from neustream.engine.events import Done, Finished, Look, Record, Started, Wake
from neustream.engine.executor import Executor, Foreseeing, Keeper, Stopper
from neustream.engine.faults import Faults
from neustream.engine.looks import Looks
from neustream.engine.overdue import PATIENT_S, Limits
from neustream.engine.routing import Load
from neustream.errors import BackendError, RequestError, StageFailed, told

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One instance of what is served: a scheduler with the executors of its pools, by name.

    `faults`: of its steps, while it is driven.

    Raises:
        RequestError: the executors are not those of the scheduler's pools.
        BackendError: a KV cache has `host_blocks`, and nothing keeps what would be in them.
    """

    scheduler: Scheduler
    executors: Mapping[str, Executor]
    name: str = ""
    faults: Faults = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "faults", Faults(self.name))
        if set(self.executors) != set(self.scheduler.pools):
            pools = sorted(self.scheduler.pools)
            raise RequestError(f"executors for {sorted(self.executors)}, but pools are {pools}")
        for name, pool in self.scheduler.pools.items():
            for model, cache in pool.kv_caches.items():
                if cache.host_blocks:
                    _check_keeps(self.executors[name], model, cache)


class Drive:
    """Drives one member: asks for steps, starts them, takes their results.

    Args:
        tell: for what observers are to know.
        steps: takes down whose a step is that has started.
        step_timeout_s: a step that does not come back for so long fails its requests (see
            `Limits`). Steps are timed while faults are forgiven alone.

    Attributes:
        deciding: asks the scheduler; closed: why a pool serves nothing any more.
        leaving: whether it is to go, and takes no more requests.
        held: told of requests that wait to be given; left: of those whose next stage is served
            elsewhere; lost_one: that a worker of it is lost.
    """

    def __init__(
        self,
        member: Member,
        clock: Clock,
        tell: Callable[[Record], None],
        steps: dict[Batch, Drive],
        step_timeout_s: float | None = None,
    ) -> None:
        self.member = member
        self.name = member.name
        self.scheduler = member.scheduler
        self.executors = dict(member.executors)
        self.leaving = False
        self.held: Callable[[Drive, str, float], None] = _nothing
        self.left: Callable[[Drive, Left, float], None] = _nothing
        self.lost_one: Callable[[Drive, float], None] = _nothing
        self.closed: dict[str, str] = {}
        self._clock = clock
        self._tell = tell
        self._steps = steps
        self._limits = Limits(self, clock, step_timeout_s)
        self.patience_s = PATIENT_S if step_timeout_s is None else step_timeout_s
        self._looks = None if clock.decides_at_once else Looks(self, clock, member.scheduler.times)
        self.deciding = Deciding(member.scheduler, clock, self._looks, tell, member.name)
        pools = member.scheduler.pools.values()
        self._idle = {pool.name: list(range(pool.seats)) for pool in pools}
        self._wakes = dict.fromkeys(self._idle, -1.0)  # when each pool is woken next, if ahead
        self._asked = frozenset(member.scheduler.policies)  # pools whose policy is asked
        self._foreseeing = {  # those whose steps need not be looked at one by one
            name: executor
            for name, executor in self.executors.items()
            if self._looks is None and isinstance(executor, Foreseeing)
        }
        self._under_way: dict[int, tuple[StepInfo, Batch]] = {}

    def serves(self, request: Request) -> bool:
        """Whether it can serve a request now, as far as that is not served elsewhere."""
        stages = request.graph.stages
        served = {stage for pool in self.scheduler.pools.values() for stage in pool.stages}
        served |= self.scheduler.away
        return served.issuperset(stages) and not self._closed_to(request)

    def ails(self, request: Request) -> bool:
        """Whether steps that it needs fail here again and again (see `Faults`)."""
        return self.member.faults.passed_over(request.graph.stages, self._clock.now())

    def load(self) -> Load:
        """How busy it is."""
        jobs = self.scheduler.jobs.values()
        return Load(self.name, len(jobs), sum([job.remaining_s for job in jobs]))

    def accept(self, request: Request, now: float) -> Submitted:
        """Take a request in; NeustreamError if that cannot be."""
        reason = self._closed_to(request)
        if reason:
            raise RequestError(f"request {request.id!r}: {reason}")
        record = submitted(self.scheduler.submit(request, now), now)
        if self.name:
            record = replace(record, member=self.name)
        self._tell(record)
        return record

    def close(self, closing: ExitStack, *, wait: bool = True) -> None:
        """Have `closing` close the executors; workers in steps that were given up are not waited
        for."""
        for pool, executor in self.executors.items():
            closing.callback(executor.close, wait=wait and not self._limits.lost(pool))

    def lost(self, pool: str) -> bool:
        """Whether a worker of `pool` is still in a step that was given up."""
        return bool(self._limits.lost(pool))

    def here(self) -> bool:
        """Whether the present thread is one that `close` waits for."""
        return any(executor.here() for executor in self.executors.values())

    # -- steps ------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Start what can start."""
        if self.closed:
            self._turn_away()
        for pool, idle in self._idle.items():
            if idle and self.scheduler.waits(pool):
                self._dispatch(pool, idle)
        self.settle()

    def _dispatch(self, pool: str, idle: list[int]) -> None:
        for worker in list(idle):
            now = self._clock.now()
            batch = self.deciding.next(pool, worker, now)
            self.settle()  # what it gave up ended before anything that follows
            if batch is not None:
                idle.remove(worker)
                begun = self._clock.now()
                if begun > now and not batch.planned:
                    batch = self.scheduler.begin(batch, begun)
                self._start(batch, begun)
                continue
            at = self.scheduler.wake_at(pool)
            if at is not None and not now < self._wakes[pool] <= at:
                self._wakes[pool] = at  # one that comes no later is under way otherwise
                self._clock.post(Wake(self, pool), at)
            if pool not in self._asked:
                return  # nothing waits, for the other workers neither

    def _start(self, batch: Batch, now: float) -> None:
        info = batch.info()
        self._under_way[batch.id] = info, batch
        self._steps[batch] = self
        self._tell(Started(info, now, self.name))
        executor = self.executors[batch.pool]
        if self.deciding.forgiving:
            self._limits.watch(batch, now)
        try:
            for job in batch.preempted:
                if job in batch.aside:
                    cast(Keeper, executor).put_aside(job.id)
                else:
                    executor.release(job.id)
            executor.start(batch, self._clock)
        except BaseException as error:
            if not self.deciding.forgiving:
                raise
            failed = StageFailed(f"stage {batch.stage!r}: its step could not start: {told(error)}")
            failed.__cause__ = error
            self._clock.post(Done(batch, failed), now)
        if batch.pool in self._foreseeing and not batch.quiet and self.scheduler.stands(batch):
            self.scheduler.foresee(batch, self._foreseeing[batch.pool].quiet(batch))
        if self._looks is not None and batch.pool in self._asked:
            self._looks.started(batch, now, executor.alone_s)

    def done(self, event: Done, now: float) -> None:
        """A step came back."""
        batch, results = event.batch, event.results
        self._idle[batch.pool].append(batch.worker)
        if self._limits.ended(batch):  # given up, and back after all
            self.closed.pop(batch.pool, None)
            return
        info = self._leave(batch)
        self.member.faults.ended(batch.stage, results, now)
        if isinstance(results, BaseException):
            self.scheduler.fail(batch, results, now)
            error = told(results) or type(results).__name__
        else:
            whole = len(results) == len(batch.jobs)
            error = "" if whole else f"{len(results)} results for {len(batch)} jobs"
            self.scheduler.finish(batch, results, now)
        self._tell(Finished(info, now, error, self.name))

    def _leave(self, batch: Batch) -> StepInfo:
        """A step is not under way any more."""
        if self._looks is not None:
            self._looks.over(batch)
        info, _ = self._under_way.pop(batch.id)
        return info

    def put_off(self, since: float, seconds: float) -> None:
        """Steps that started since then begin so much later: the thread of a worker was in use."""
        late = [id for id, (_, batch) in self._under_way.items() if batch.started_at >= since]
        self._limits.put_off(late, seconds)

    # -- the step after ---------------------------------------------------------------------------

    def look(self, event: Look, now: float) -> None:
        """Plan what follows the steps whose ends are near, unless they have just come back."""
        looks = self._looks
        assert looks is not None
        for number in looks.due(now, event.at):
            _, batch = self._under_way[number]
            late = now >= self.scheduler.times.over_at(batch)
            if late or not self.scheduler.planned(batch):
                self.deciding.plan(batch, now)
                self.settle()
            looks.looked(batch, now)

    # -- steps that do not come back --------------------------------------------------------------

    def overdue(self, now: float) -> None:
        """Some step may be under way for too long."""
        for number, seconds in self._limits.over(now).items():
            self._give_up(number, seconds, now)

    def _give_up(self, number: int, seconds: float, now: float) -> None:
        """A step did not come back in time: its requests fail, and its worker gets no more."""
        _, batch = self._under_way[number]
        info = self._leave(batch)
        reason = f"stage {batch.stage!r}: its step did not come back within {span(seconds)}"
        log.error("pool %r, worker %d: %s", batch.pool, batch.worker, reason)
        self.scheduler.fail(batch, StageFailed(reason), now)
        self._tell(Finished(info, now, reason, self.name))
        self._limits.lose(batch)
        pool = self.scheduler.pools[batch.pool]
        if len(self._limits.lost(batch.pool)) == pool.seats:
            self._close(batch.pool, f"pool {batch.pool!r} is closed: {reason}", now)
        elif pool.sticky:
            self._give_up_bound(batch.pool, batch.worker, reason, now)
        self.lost_one(self, now)

    def _close(self, pool: str, reason: str, now: float) -> None:
        """No worker of a pool is left: requests that will need it, or come, hear of it."""
        self.closed[pool] = reason
        stages = set(self.scheduler.pools[pool].stages)
        for id, job in list(self.scheduler.jobs.items()):
            if not stages.isdisjoint(job.calls_left):
                self.scheduler.give_up(id, reason, now)

    def _give_up_bound(self, pool: str, worker: int, reason: str, now: float) -> None:
        """A worker of a sticky pool is lost: so is what it keeps of requests that wait for it."""
        for job in at_pool(self.scheduler, pool):
            if job.worker == worker:
                self.scheduler.give_up(job.id, reason, now)

    def _turn_away(self) -> None:
        """Fail the jobs that have come to a closed pool by a branch that was not expected."""
        for pool, reason in self.closed.items():
            for job in at_pool(self.scheduler, pool):
                if job.status == "waiting":
                    self.scheduler.give_up(job.id, reason, self._clock.now())

    def _closed_to(self, request: Request) -> str:
        """Why a request cannot be served any more; "" if it can."""
        if self.leaving:
            return f"member {self.name!r} is to go"
        for pool, reason in self.closed.items():
            if not set(self.scheduler.pools[pool].stages).isdisjoint(request.graph.stages):
                return reason
        return ""

    # -- what the scheduler tells -----------------------------------------------------------------

    def settle(self) -> None:
        """Take note of what the scheduler's last moves brought about.

        Executors hear of ended requests at once: KV blocks that are handed out anew must be free.
        """
        tell, name = self._tell, self.name
        while events := self.scheduler.pop_events():
            for event in events:
                if type(event) is not Emitted:  # nearly all are
                    self._note(event)
                tell(replace(event, member=name) if name else event)

    def _note(self, event: SchedulerEvent) -> None:
        """Do what one of the scheduler's moves asks for."""
        if isinstance(event, Ended | Given):
            self.release(event.id)
        elif isinstance(event, BranchEnded) or (isinstance(event, LegEnded) and event.freed):
            self.release(event.job)
        elif isinstance(event, Ending):
            self._stop(event)
        elif isinstance(event, Held):
            self.held(self, event.id, self._clock.now())
        elif isinstance(event, Left):
            self.left(self, event, self._clock.now())

    def _stop(self, event: Ending) -> None:
        """A step need not go on for one of its requests, if it can be stopped."""
        executor = self.executors[event.pool]
        if not isinstance(executor, Stopper):
            return
        try:
            executor.stop(event.job)
        except Exception:
            log.exception("pool %r: request %r could not be stopped", event.pool, event.job)

    def release(self, id: str) -> None:
        """Executors keep nothing of a request any more."""
        for pool, executor in self.executors.items():
            try:
                executor.release(id)
            except Exception:
                log.exception("pool %r: request %r could not be released", pool, id)


def _check_keeps(executor: Executor, model: str, cache: KVCache) -> None:
    """BackendError if what preempted requests have computed would be forgotten."""
    why = f"{type(executor).__name__} has no `put_aside`"
    if isinstance(executor, Keeper):
        why = executor.forgets(model)
    if why:
        raise BackendError(
            f"KV cache of model {model!r}: host_blocks={cache.host_blocks}, but {why}: "
            "give host_blocks=0"
        )


def _nothing(*_: object) -> None:
    """Nobody is to be told."""
