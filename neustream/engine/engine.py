"""The one loop. Simulating and serving differ in its `clock` and `executors`, nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from neustream.core.batch import StepInfo
from neustream.core.events import Emitted, Ended, Given, submitted
from neustream.core.graph import Graph
from neustream.core.job import Status
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import SLO, Request
from neustream.engine.clock import Clock, stopwatch
from neustream.engine.events import (
    Cancel,
    Decided,
    Done,
    Event,
    Extend,
    Finished,
    Listener,
    Observer,
    Record,
    Refused,
    Stop,
    Submit,
    Wake,
)
from neustream.engine.executor import Executor
from neustream.engine.report import Report
from neustream.errors import NeustreamError, RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """How a request ended. `output` is the last output of its graph; None unless it is done."""

    id: str
    status: Status
    reason: str
    output: Mapping[str, Any] | None
    latency_s: float
    on_time: bool

    def unwrap(self) -> Mapping[str, Any]:
        """The output; RequestError if the request was dropped, cancelled or failed."""
        if self.output is None:
            raise RequestError(f"request {self.id!r} was {self.status}: {self.reason}")
        return self.output


class Engine:
    """Drives a scheduler: feeds it requests, starts the steps it chooses, hands out the results.

    Two ways to use one: `run(requests)` replays a workload on the calling thread and returns a
    Report; or `start()` and then `submit(...)` from any thread, `close()` at the end (the engine
    is a context manager that does both).

    Args:
        scheduler: whose pools are served.
        executors: one per pool, by the pool's name.
        clock: virtual or wall.
        observers: called with every Record, on the loop's thread; they must be quick and not raise.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executors: Mapping[str, Executor],
        clock: Clock,
        observers: Sequence[Observer] = (),
    ) -> None:
        if set(executors) != set(scheduler.pools):
            raise RequestError(
                f"executors for {sorted(executors)}, but pools are {sorted(scheduler.pools)}"
            )
        self.scheduler = scheduler
        self.clock = clock
        self._executors = dict(executors)
        self._observers = list(observers)
        self._idle = {pool.name: list(range(pool.workers)) for pool in scheduler.pools.values()}
        self._wakes = dict.fromkeys(self._idle, -1.0)  # when each pool is woken next, if ahead
        self._answers: dict[str, Future[Result]] = {}
        self._listeners: dict[str, Listener] = {}
        self._promised: set[Future[Any]] = set()
        self._under_way: dict[int, StepInfo] = {}
        self._records: list[Record] = []  # what observers and callers are still to be told
        self._process = os.getpid()
        self._requests: Iterator[Request] = iter(())
        self._next: Request | None = None  # drawn from them, not posted yet
        self._coming = 0  # Submit events posted for a workload and not handled yet
        self._accepting = False  # whether callers may still submit
        self._interrupted = False
        self._started = clock.now()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._gate = threading.Lock()  # between submitting threads and the end of the loop
        self._open = False
        self._closed = False

    # -- replaying a workload
    # -----------------------------------------------------------------------

    def run(self, requests: Iterable[Request], report: Report | None = None) -> Report:
        """Serve `requests` at their arrivals (counted from now) and return when all have ended.

        They are drawn one at a time, so a generator of millions works; arrivals must not go back.
        A failing stage, a dropped request or one that cannot be accepted (a duplicate id) does not
        raise; it is in the report.
        """
        self._begin()
        self._started = self.clock.now()
        report = report or Report(self._started)
        self._requests = iter(requests)
        self._next = next(self._requests, None)
        self._coming = 0
        self._observers.append(report)
        self._interrupted = False
        try:
            self._draw()
            self._loop()
        except NeustreamError as fault:
            self._fault = fault
            raise
        finally:
            self._observers.remove(report)
            self._open = False
            report.interrupted = self._interrupted
        return report

    def interrupt(self) -> None:
        """End the open requests as cancelled and take no more; safe from a signal handler."""
        self.clock.post(Stop(cancel=True), self.clock.now())

    # -- serving
    # ------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Serve from now on, on a thread of the engine's own."""
        self._begin()
        self._accepting = True
        self._thread = threading.Thread(target=self._serve, name="neustream-engine", daemon=True)
        self._thread.start()
        return self

    def ready(self) -> None:
        """RequestError if it takes no requests: not started, closed, or in another process."""
        with self._serving():
            pass

    def submit(
        self,
        graph: Graph,
        params: Mapping[str, Any] | None = None,
        *,
        slo: SLO | None = None,
        id: str | None = None,
        on_output: Listener | None = None,
    ) -> Future[Result]:
        """Ask for one run of `graph`; the future gets a Result, whatever becomes of the request.

        The future raises only where the request was never accepted (a duplicate id, a graph that
        is not served) or the engine itself broke. Safe from any thread; in asyncio use
        `asyncio.wrap_future`. `on_output(index, update)` is called on the engine's thread for each
        output, in order, before the future is answered; it must be quick, and if it raises it is
        called no more.
        """
        with self._serving() as now:
            answer: Future[Result] = self._promise()
            request = Request(id or uuid.uuid4().hex, graph, now, slo or SLO(), params or {})
            self.clock.post(Submit(request, answer, listener=on_output), now)
        return answer

    def cancel(self, id: str) -> Future[bool]:
        """Give a request up, after its step if it is in one; False if it was over."""
        with self._serving() as now:
            answer: Future[bool] = self._promise()
            self.clock.post(Cancel(id, answer), now)
        return answer

    def add(self, pool: str, profiles: Mapping[str, LatencyProfile]) -> Future[None]:
        """Serve more stages on `pool` from now on; its executor must have their modules already."""
        with self._serving() as now:
            answer: Future[None] = self._promise()
            self.clock.post(Extend(pool, profiles, answer), now)
        return answer

    def close(self, *, cancel: bool = False) -> None:
        """Serve what is open (or end it as cancelled), then stop the loop and the executors."""
        if threading.current_thread() is self._thread:
            raise RequestError(
                "close() waits for the engine's thread, so it cannot be called on it"
            )
        with self._gate:
            first, self._closed = not self._closed, True
            if self._thread is not None:
                self.clock.post(Stop(cancel), self.clock.now())
        if self._thread is not None:
            self._thread.join()
        if first:
            for executor in self._executors.values():
                executor.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    # -- inside
    # -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._open or self._closed or self._fault is not None:
            raise RequestError("this engine is running already, or was closed")
        self._open = True

    @contextlib.contextmanager
    def _serving(self) -> Iterator[float]:
        """The present instant, with the engine kept from closing meanwhile."""
        if os.getpid() != self._process:  # its threads and locks stayed behind in the parent
            raise RequestError(
                f"this engine lives in process {self._process}; make another one after a fork"
            )
        with self._gate:
            if self._thread is None or self._closed or not self._open:
                problem = "this engine is not serving: call start() first, and not after close()"
                raise RequestError(problem) from self._fault
            yield self.clock.now()

    def _promise(self) -> Future[Any]:
        """A future that is answered even if the loop breaks."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        self._promised.add(answer)
        return answer

    def _answer(self, answer: Future[Any], value: Any) -> None:
        self._promised.discard(answer)
        if isinstance(value, BaseException):
            answer.set_exception(value)
        else:
            answer.set_result(value)

    def _serve(self) -> None:
        try:
            self._loop()
        except (
            BaseException
        ) as fault:  # whatever a policy or an observer raised: the callers learn of it
            self._fault = fault
            if not isinstance(fault, NeustreamError):
                raise
        finally:
            with self._gate:
                self._open = False
            self._abandon()

    def _abandon(self) -> None:
        """The loop is over: nobody may wait for an answer that cannot come."""
        fault = self._fault
        if not isinstance(fault, NeustreamError):
            fault = RequestError("the engine stopped before this request was served")
            fault.__cause__ = self._fault
        for answer in list(self._promised):
            self._answer(answer, fault)
        self._answers.clear()

    def _loop(self) -> None:
        pools = list(self._idle)
        while self._accepting or self.scheduler.jobs or (self._coming and not self._interrupted):
            events = self.clock.wait()
            if not events:
                raise RequestError(
                    f"{len(self.scheduler.jobs)} request(s) are open, but nothing will ever happen"
                )
            for event in events:
                self._handle(event)
            for pool in pools:
                if self._idle[pool]:
                    self._dispatch(pool)
            self._settle()
            self._publish()
            del events, event  # while idle, hold no finished request's results

    def _dispatch(self, pool: str) -> None:
        idle, scheduler = self._idle[pool], self.scheduler
        for worker in list(idle):
            now, asked, began = self.clock.now(), scheduler.decisions, stopwatch()
            step = None
            batch = scheduler.next_batch(pool, now, worker)
            seconds = stopwatch() - began
            if scheduler.decisions > asked:
                step = None if batch is None else batch.info()
                self._tell(Decided(pool, now, seconds, step))
            if batch is not None:
                idle.remove(worker)
                self._under_way[batch.id] = batch.info() if step is None else step
                self._settle()
                for job in batch.preempted:
                    self._executors[pool].release(job.id)
                self._executors[pool].start(batch, self.clock)
            elif (at := scheduler.wake_at(pool)) is not None and not now < self._wakes[pool] <= at:
                self._wakes[pool] = at  # one that comes no later is under way otherwise
                self.clock.post(Wake(pool), at)

    def _handle(self, event: Event) -> None:
        now = self.clock.now()
        if isinstance(event, Done):
            self._finish(event, now)
        elif isinstance(event, Submit):
            self._accept(event, now)
        elif isinstance(event, Cancel):
            self._answer(event.answer, self.scheduler.cancel(event.id, now))
        elif isinstance(event, Extend):
            self._extend(event)
        elif isinstance(event, Stop):
            self._stop(event, now)
        self._settle()

    def _finish(self, event: Done, now: float) -> None:
        batch, results = event.batch, event.results
        self._idle[batch.pool].append(batch.worker)
        if isinstance(results, BaseException):
            self.scheduler.fail(batch, results, now)
            error = str(results) or type(results).__name__
        else:
            error = (
                ""
                if len(results) == len(batch)
                else f"{len(results)} results for {len(batch)} jobs"
            )
            self.scheduler.finish(batch, results, now)
        self._tell(Finished(self._under_way.pop(batch.id), now, error))

    def _accept(self, event: Submit, now: float) -> None:
        if event.answer is None:
            if self._interrupted or event.workload is not self._requests:
                return  # of a workload that was interrupted
            self._coming -= 1
            if not self._coming:
                self._draw()
        elif self._interrupted:
            self._answer(
                event.answer, RequestError("this engine was interrupted and takes no more requests")
            )
            return
        try:
            job = self.scheduler.submit(event.request, now)
        except NeustreamError as error:
            if event.answer is not None:
                self._answer(event.answer, error)
            else:
                self._tell(Refused(event.request, str(error), now))
            return
        if event.answer is not None:
            self._answers[job.id] = event.answer
        if event.listener is not None:
            self._listeners[job.id] = event.listener
        self._tell(submitted(job, now))

    def _extend(self, event: Extend) -> None:
        try:
            self.scheduler.add(event.pool, event.profiles)
        except NeustreamError as error:
            self._answer(event.answer, error)
        else:
            self._answer(event.answer, None)

    def _draw(self) -> None:
        """Post the workload's next request, and those that come at the same instant."""
        request = self._next
        while request is not None:
            self._coming += 1
            at = request.arrival + self._started
            moved = dataclasses.replace(request, arrival=at) if self._started else request
            self.clock.post(Submit(moved, workload=self._requests), at)
            self._next = next(self._requests, None)
            if self._next is not None and self._next.arrival < request.arrival:
                raise RequestError(
                    f"request {self._next.id!r}: arrivals must not go back, "
                    f"got {self._next.arrival} after {request.arrival}"
                )
            same = self._next is not None and self._next.arrival <= request.arrival
            request = self._next if same else None

    def _stop(self, event: Stop, now: float) -> None:
        self._accepting = False
        if event.cancel:
            self._interrupted = True
            for id in list(self.scheduler.jobs):
                self.scheduler.cancel(id, now)

    def _settle(self) -> None:
        """Take note of what the scheduler's last moves brought about.

        Executors hear of ended jobs at once: memory that the scheduler hands out anew must be free.
        """
        events = self.scheduler.pop_events()
        for event in events:
            if isinstance(event, Ended | Given):
                for executor in self._executors.values():
                    executor.release(event.id)
        self._records += events

    def _tell(self, record: Record) -> None:
        self._records.append(record)

    def _publish(self) -> None:
        """Tell observers and callers what has happened, while the next steps run."""
        records, self._records = self._records, []
        for record in records:
            for observer in self._observers:
                observer(record)
            if isinstance(record, Emitted):
                if self._listeners and (listener := self._listeners.get(record.id)) is not None:
                    self._hear(listener, record)
            elif isinstance(record, Ended):
                self._listeners.pop(record.id, None)
                if (answer := self._answers.pop(record.id, None)) is not None:
                    self._answer(answer, _result(record))

    def _hear(self, listener: Listener, record: Emitted) -> None:
        try:
            listener(record.index, record.update)
        except Exception:  # the caller's own fault; the engine and its other callers go on
            del self._listeners[record.id]
            log.exception("on_output of request %r raised; it is called no more", record.id)


def _result(record: Ended) -> Result:
    return Result(
        record.id, record.status, record.reason, record.output, record.latency_s, record.on_time
    )
