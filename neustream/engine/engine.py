"""Requests from callers, on any thread; their answers as futures. Or a workload, replayed."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO, Request
from neustream.engine.answers import Result
from neustream.engine.clock import Clock
from neustream.engine.desk import Desk
from neustream.engine.events import Cancel, Extend, Listener, Observer, Stop, Submit
from neustream.engine.loop import Loop
from neustream.engine.member import Member
from neustream.engine.replay import Replay
from neustream.engine.report import Report
from neustream.engine.routing import LeastWork, Router
from neustream.errors import NeustreamError, RequestError, shown, told

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How an engine is, at some moment.

    Args:
        state: "failed" if its loop broke; `reason` says why it serves nothing or not all.
        open: requests that have no answer yet.
        policy_faults: decisions that FCFS made since the policy raised or decided what cannot be.
        closed: why pools serve nothing any more, by name (`member/pool` where members have names).
    """

    state: Literal["new", "serving", "closing", "closed", "failed"]
    reason: str = ""
    open: int = 0
    decisions: int = 0
    policy_faults: int = 0
    closed: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """Drives schedulers: feeds them requests, starts the steps they choose, hands out the results.

    Two ways to use one: `run(requests)` replays a workload on the calling thread and returns a
    Report; or `start()` and then `submit(...)` from any thread, `close()` at the end (the engine
    is a context manager that does both).

    While serving, nobody's fault is another's: what a caller's callbacks or a stage raise ends at
    most that request, a policy that raises is covered by FCFS, an observer that raises is told no
    more, and a step that does not come back fails its own requests.

    Args:
        members: what serves: one scheduler with its executors, or several (replicas, or instances
            that serve different stages). Each request stays with one of them.
        clock: virtual or wall.
        observers: called with every Record, on the loop's thread; they must be quick.
        router: chooses the member of a request, where several can serve it; default: `LeastWork`.
        max_open: the most requests without an answer; more are refused at `submit`. None: no limit.
        step_timeout_s: a step that does not come back for so long fails its requests (see
            `Limits`); while serving.
    """

    def __init__(
        self,
        members: Member | Sequence[Member],
        clock: Clock,
        observers: Sequence[Observer] = (),
        *,
        router: Router | None = None,
        max_open: int | None = None,
        step_timeout_s: float | None = None,
    ) -> None:
        if max_open is not None and max_open < 1:
            raise RequestError(f"max_open must be 1 or more, got {max_open!r}")
        self.clock = clock
        self.members = (members,) if isinstance(members, Member) else tuple(members)
        self._loop = Loop(self.members, clock, router or LeastWork(), observers, step_timeout_s)
        self._loop.handlers[Stop] = self._stopped
        self._desk = Desk(self._loop)
        self._answers = self._desk.answers
        self._replay: Replay | None = None
        self._max_open = max_open
        self._process = os.getpid()
        self._accepting = False  # whether callers may still submit
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._gate = threading.RLock()  # between submitting threads and the end of the loop
        self._running = False
        self._closed = False

    # -- replaying a workload ---------------------------------------------------------------------

    def run(self, requests: Iterable[Request], report: Report | None = None) -> Report:
        """Serve `requests` at their arrivals (counted from now) and return when all have ended.

        They are drawn one at a time, so a generator of millions works; arrivals must not go back.
        A failing stage, a dropped request or one that cannot be accepted (a duplicate id) does not
        raise; it is in the report. A policy's fault does.
        """
        self._begin()
        report = report or Report(self.clock.now())
        self._loop.observers.append(report)
        try:
            self._replay = Replay(self._loop, requests)
            self._loop.run(self._replay)
            report.interrupted = self._replay.interrupted
        except BaseException as fault:
            self._fault = fault
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._loop.observers.remove(report)
            self._running, self._replay = False, None
        return report

    def interrupt(self) -> None:
        """End the open requests as cancelled and take no more; safe from a signal handler.

        While serving, `close` is still to be called.
        """
        self.clock.post(Stop(cancel=True), self.clock.now())

    # -- serving ----------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Serve from now on, on a thread of the engine's own; once in the life of an engine.

        RequestError if its clock is one that only simulates, or if it ran, or was closed.
        """
        if not self.clock.shared:
            name = type(self.clock).__name__
            raise RequestError(f"start() needs a clock that threads share; {name} is for run()")
        self._begin()
        self._accepting = True
        for drive in self._loop.drives:
            drive.forgiving = True
        self._loop.observers.append(self._answers.hear)
        self._thread = threading.Thread(target=self._serve, name="neustream-engine", daemon=True)
        self._thread.start()
        return self

    @property
    def over(self) -> bool:
        """Whether no more requests will come."""
        return not self._accepting

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
        `asyncio.wrap_future`. `cancel()` of the future gives the request up. `on_output(index,
        update)` is called on the engine's thread for each output, in order, before the future is
        answered; it must be quick, and if it raises it is called no more.

        Raises:
            RequestError: for arguments that are none, while `max_open` requests are open, or if the
                engine takes no requests.
        """
        name = uuid.uuid4().hex if id is None else id
        slo = SLO() if slo is None else slo
        params = {} if params is None else params
        if on_output is not None and not callable(on_output):
            raise RequestError(f"on_output must be callable, got {type(on_output).__name__}")
        with self._serving() as now:
            request = Request(name, graph, now, slo, params)
            if self._max_open is not None and len(self._answers.open) >= self._max_open:
                raise RequestError(
                    f"request {request.id!r}: {len(self._answers.open)} requests are open, "
                    f"and max_open is {self._max_open}"
                )
            answer: Future[Result] = Future()
            self._answers.open.add(answer)
            self.clock.post(Submit(request, answer, on_output), now)
        answer.add_done_callback(lambda done: self._given_up(done, request.id))
        return answer

    def cancel(self, id: str) -> Future[bool]:
        """Give a request up, after its step if it is in one; the future gets False if it was over.

        RequestError for an id that is no string, or if the engine takes no requests.
        """
        if not isinstance(id, str):
            raise RequestError(f"cancel: a request id is a string, got {shown(id)}")
        return self._cancel(id, None)

    def add(
        self, pool: str, profiles: Mapping[str, LatencyProfile], member: str | None = None
    ) -> Future[None]:
        """Serve more stages on `pool` from now on; its executor must have their modules already.

        `member`: whose; None: of each that has such a pool. The future raises what is wrong.
        """
        with self._serving() as now:
            answer: Future[None] = Future()
            self._answers.asked.add(answer)
            self.clock.post(Extend(pool, profiles, answer, member), now)
        return answer

    def snapshot(self) -> Snapshot:
        """How it is; from any thread, without waiting for the loop."""
        state: Literal["new", "serving", "closing", "closed", "failed"] = "new"
        drives = self._loop.drives
        closed: dict[str, str] = {}
        for drive in drives:
            for pool, why in drive.closed.items():
                closed[f"{drive.name}/{pool}" if drive.name else pool] = why
        reason = "; ".join(closed.values())
        if self._fault is not None:
            state, reason = "failed", told(self._fault)
        elif self._running:
            ending = self._closed or (self._thread is not None and not self._accepting)
            state = "closing" if ending else "serving"
        elif self._closed or self._thread is not None:
            state = "closed"
        return Snapshot(
            state,
            reason,
            len(self._answers.open),
            sum([drive.scheduler.decisions for drive in drives]),
            sum([drive.policy_faults for drive in drives]),
            closed,
        )

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Serve what is open (or end it as cancelled), then stop the loop and the executors.

        After `timeout_s` seconds (None: never) what is still open ends as cancelled, too; steps
        under way end first. A worker whose step was given up is not waited for. In a forked process
        this does nothing: the threads are the parent's.

        Raises:
            RequestError: on a thread that it waits for (the engine's own, a worker's), or during
                `run`, which `interrupt` ends.
        """
        if os.getpid() != self._process:
            return
        if timeout_s is not None and not 0 <= timeout_s <= threading.TIMEOUT_MAX:
            raise RequestError(f"timeout_s must be a number of seconds >= 0, got {timeout_s!r}")
        drives = self._loop.drives
        executors = [each for drive in drives for each in drive.executors.values()]
        if threading.current_thread() is self._thread:
            raise RequestError(
                "close() waits for the engine's thread, so it cannot be called on it"
            )
        if any(executor.here() for executor in executors):
            raise RequestError("close() waits for workers, so it cannot be called in a step")
        with self._gate:
            if self._running and self._thread is None:
                raise RequestError("close() cannot be called during run(): interrupt() ends that")
            first, self._closed = not self._closed, True
            if self._thread is not None:
                self.clock.post(Stop(cancel), self.clock.now())
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self.clock.post(Stop(cancel=True), self.clock.now())
                self._thread.join()
        if first:
            with contextlib.ExitStack() as closing:  # all of them, also if one raises
                for drive in drives:
                    drive.close(closing)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    # -- inside -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        with self._gate:
            if self._running:
                raise RequestError("this engine is running already")
            if self._closed or self._thread is not None:
                raise RequestError("this engine was closed, or interrupted: make another one")
            if self._fault is not None:
                raise RequestError("this engine failed: make another one") from self._fault
            self._running = True

    @contextlib.contextmanager
    def _serving(self) -> Iterator[float]:
        """The present instant, with the engine kept from closing meanwhile."""
        if os.getpid() != self._process:  # its threads and locks stayed behind in the parent
            raise RequestError(
                f"this engine lives in process {self._process}; make another one after a fork"
            )
        with self._gate:
            if self._thread is None or self._closed or not self._running:
                problem = "this engine is not serving: call start() first, and not after close()"
                raise RequestError(problem) from self._fault
            yield self.clock.now()

    def _serve(self) -> None:
        try:
            self._loop.run(self)
        except BaseException as fault:
            self._fault = fault
            if not isinstance(fault, NeustreamError):
                log.exception("the engine's loop broke")
        finally:
            with self._gate:
                self._running = False
            self._answers.abandon(self._fault)

    def _given_up(self, answer: Future[Result], id: str) -> None:
        """Called when a request's future is done; if that was by its caller, so is the request."""
        if answer.cancelled():
            self._answers.open.discard(answer)
            with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
                self._cancel(id, answer)

    def _cancel(self, id: str, request: Future[Result] | None) -> Future[bool]:
        with self._serving() as now:
            answer: Future[bool] = Future()
            self._answers.asked.add(answer)
            self.clock.post(Cancel(id, answer, request), now)
        return answer

    def _stopped(self, event: Stop, now: float) -> None:
        self._accepting = False
        if not event.cancel:
            return
        if self._replay is not None:
            self._replay.interrupt(now)
        else:
            self._desk.interrupted = True
            self._loop.cancel_all(now)
