"""Requests from callers, on any thread; their answers as futures. Or a workload, replayed."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO, Request
from neustream.engine.answers import Result
from neustream.engine.clock import Clock
from neustream.engine.crossing import Moved
from neustream.engine.desk import Desk
from neustream.engine.events import (
    Cancel,
    Extend,
    Give,
    Leave,
    Listener,
    Observer,
    Retire,
    Stop,
    Take,
)
from neustream.engine.life import Life
from neustream.engine.loop import Loop
from neustream.engine.member import Member
from neustream.engine.places import Places
from neustream.engine.replay import Replay
from neustream.engine.report import Report
from neustream.engine.routing import LeastWork, Router
from neustream.engine.snapshot import Snapshot, take
from neustream.engine.turns import Turn
from neustream.errors import NeustreamError, RequestError, shown

log = logging.getLogger(__name__)
T = TypeVar("T")


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
        observers: called with every Record, on a thread of the engine's; they must be quick.
        router: chooses the member of a request, where several can serve it; default: `LeastWork`.
        max_open: the most requests without an answer; more are refused at `submit`. None: no limit.
        step_timeout_s: while serving, a step that takes longer fails its requests (see `Limits`).
        forgiving: whether FCFS covers for a policy that raises while serving; else that ends it.

    Raises:
        RequestError: an option is not what it may be; or a call comes at a time at which it cannot.
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
        forgiving: bool = True,
    ) -> None:
        self.clock = clock
        self._forgiving = forgiving
        served = [members] if isinstance(members, Member) else list(members)
        self._loop = Loop(served, clock, router or LeastWork(), observers, step_timeout_s)
        self._loop.handlers[Stop] = self._stopped
        self._desk = Desk(self._loop, max_open)
        self._answers = self._desk.answers
        self._replay: Replay | None = None
        self._life = Life(clock)
        self._thread: threading.Thread | None = None
        self._last: list[Callable[[], None]] = []

    # -- replaying a workload ---------------------------------------------------------------------

    def run(
        self,
        requests: Iterable[Request],
        report: Report | None = None,
        *,
        call_s: float = 0.0,
        turns: Mapping[str, Turn] = {},
        places: Places | None = None,
    ) -> Report:
        """Serve `requests` at their arrivals (counted from now) and return when all have ended.

        What becomes of each is in the report; a policy's fault raises. The others: see `Replay`.
        """
        self._life.begin(serving=False)
        report = report or Report(self.clock.now())
        self._loop.observers.append(report)
        try:
            self._replay = Replay(self._loop, requests, call_s, turns, places)
            self._loop.run(self._replay)
            report.interrupted = self._replay.interrupted
        except BaseException as fault:
            self._life.fault = fault
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._loop.observers.remove(report)
            self._life.running, self._replay = False, None
        return report

    def interrupt(self) -> None:
        """Take no more and cancel what is open; for signal handlers too. `close` is yet to come."""
        self.clock.post(Stop(cancel=True), self.clock.now())

    # -- serving ----------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Serve from now on, on a thread of the engine's own; once in the life of an engine.

        RequestError if its clock is one that only simulates, or if it ran, or was closed.
        """
        if not self.clock.shared:
            name = type(self.clock).__name__
            raise RequestError(f"start() needs a clock that threads share; {name} is for run()")
        self._life.begin(serving=True)
        for drive in self._loop.drives:
            drive.deciding.forgiving = self._forgiving
        self._loop.observers += [self._answers.hear, self._loop.crossing.hear]
        self._thread = threading.Thread(target=self._serve, name="neustream-engine", daemon=True)
        self._thread.start()
        return self

    @property
    def members(self) -> tuple[Member, ...]:
        """What serves."""
        return tuple([drive.member for drive in self._loop.drives])

    @property
    def over(self) -> bool:
        """Whether no more requests will come."""
        return not self._life.accepting and not self._answers.open

    @property
    def fault(self) -> BaseException | None:
        """What broke its loop, if anything did."""
        return self._life.fault

    def ready(self) -> None:
        """RequestError if it takes no requests: not started, closed, or in another process."""
        with self._life.serving():
            pass

    def submit(
        self,
        graph: Graph,
        params: Mapping[str, Any] | None = None,
        *,
        slo: SLO | None = None,
        id: str | None = None,
        on_output: Listener | None = None,
        since: float | None = None,
        follows: bool = False,
    ) -> Future[Result]:
        """Ask for one run of `graph`; the future gets a Result, whatever becomes of the request.

        The future raises only where the request was never accepted (a duplicate id, a graph that
        is not served) or the engine itself broke. Safe from any thread; in asyncio use
        `asyncio.wrap_future`. `cancel()` of the future gives the request up. `on_output(emitted)`
        is called on a thread of the engine's for each output, in order, before the future is set;
        it must be quick, and if it raises it is called no more. `since`: when the request came, on
        the engine's clock, if that was before: its promises count from then. `follows`: on the
        thread of a callback, for one that goes on with what has just ended; also while it closes.

        Raises:
            RequestError: for arguments that are none, while `max_open` requests are open, or if the
                engine takes no requests.
        """
        name = uuid.uuid4().hex if id is None else id
        slo = SLO() if slo is None else slo
        params = {} if params is None else params
        if on_output is not None and not callable(on_output):
            raise RequestError(f"on_output must be callable, got {type(on_output).__name__}")
        with self._life.serving(closing=follows) as now:
            arrival = now if since is None else min(since, now)
            request = Request(name, graph, arrival, slo, params)
            answer = self._desk.submit(request, on_output, now)
        answer.add_done_callback(lambda done: self._given_up(done, request.id))
        return answer

    def cancel(self, id: str) -> Future[bool]:
        """Give a request up, after its step if it is in one; the future gets False if it was over.

        RequestError for an id that is no string, or if the engine takes no requests.
        """
        if not isinstance(id, str):
            raise RequestError(f"cancel: a request id is a string, got {shown(id)}")
        return self._cancel(id, None)

    def give(self, id: str, *, cached: bool = True) -> Future[Moved]:
        """Let a request leave for another engine, at the end of its step if it is in one.

        The future gets it as plain data; the request's own future raises RequestError with the code
        "moved". What cannot leave stays, and goes on. `cached`: whether what the KV cache holds
        goes along; else its tokens are computed again.

        Raises:
            RequestError: from the future, if no such request is served, or it ended before.
            StageFailed: likewise, by name, if what a module keeps of it cannot leave.
        """
        with self._life.serving(closing=True) as now:
            return self._desk.ask(lambda answer: Give(id, answer, cached), now)

    def take(
        self, moved: Moved, graph: Graph, *, on_output: Listener | None = None
    ) -> Future[Future[Result]]:
        """Go on with a request that another engine gave.

        The future gets that of its Result once it is here; outputs go on counting.

        Args:
            moved: what was given; its parameters are those for the modules here.
            graph: the same graph, as it is here.

        Raises:
            RequestError: from the future, if its id is being served, or nobody here can go on.
            GraphError: likewise, if the graph differs; StageFailed, if a module cannot go on.
        """
        with self._life.serving() as now:
            return self._desk.ask(lambda answer: Take(moved, graph, answer, on_output), now)

    def add(
        self,
        pool: str,
        profiles: Mapping[str, LatencyProfile],
        member: str | None = None,
        *,
        away: Mapping[str, LatencyProfile] = {},
    ) -> Future[None]:
        """Serve more stages on `pool` from now on; its executor must have their modules already.

        `member`: whose; None: of each with such a pool. `away`: latencies of stages that are served
        elsewhere. The future raises what is wrong.
        """
        with self._life.serving(closing=True) as now:
            return self._desk.ask(lambda answer: Extend(pool, profiles, answer, member, away), now)

    def retire(self, pool: str, stages: Sequence[str], member: str | None = None) -> Future[None]:
        """Forget stages of `pool` and what was learnt of them; the future raises what is wrong.

        RequestError while requests have one of them ahead. `member`: as of `add`.
        """
        with self._life.serving(closing=True) as now:
            return self._desk.ask(lambda answer: Retire(pool, stages, answer, member), now)

    def remove(self, member: str) -> Future[None]:
        """Let a member go: it takes no more requests, and the future is set once it has none.

        Those that wait go to other members that can serve them, now or at the end of their steps:
        without anything if they have not begun, else with what the executors keep of them. Where
        that cannot be (no other member, a module without `export`), they end where they are. The
        future raises RequestError if there is no such member.
        """
        with self._life.serving() as now:
            return self._desk.ask(lambda answer: Leave(member, answer), now)

    def inspect(self, question: Callable[[Sequence[Member], float], T]) -> Future[T]:
        """What `question` says of the members at an instant of the clock.

        Asked on a thread of the engine's: quick, and changes nothing. Raises in the future.
        """
        with self._life.serving(closing=True) as now:
            return self._desk.inspect(question, now)

    def observe(self, observer: Observer) -> None:
        """Have one more observer told of every Record from now on."""
        self._loop.observers.append(observer)

    def wait_s(self, count: int) -> float | None:
        """Seconds in which `count` requests are done, at the pace of late; None: not known."""
        return self._answers.wait_s(count)

    def snapshot(self) -> Snapshot:
        """How it is; from any thread, without waiting for the loop."""
        life = self._life
        return take(life.state, self._loop.drives, len(self._answers.open), life.fault)

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Serve what is open (or end it as cancelled), then stop the loop and the executors.

        After `timeout_s` seconds (None: never) what is still open ends as cancelled, too; steps
        under way end first. A worker whose step was given up is not waited for. In a forked process
        this does nothing: the threads are the parent's.

        Raises:
            RequestError: on a thread that it waits for (the engine's own, a worker's), or during
                `run`, which `interrupt` ends.
        """
        if self._life.forked:
            return
        if timeout_s is not None and not 0 <= timeout_s <= threading.TIMEOUT_MAX:
            raise RequestError(f"timeout_s must be a number of seconds >= 0, got {timeout_s!r}")
        here = threading.current_thread() is self._thread
        if here or self._loop.here():
            raise RequestError("close() waits for this thread: it cannot be called on it")
        with self._life.gate:
            if self._life.running and self._thread is None:
                raise RequestError("close() cannot be called during run(): interrupt() ends that")
            first, self._life.closed = not self._life.closed, True
            if self._thread is not None:
                self.clock.post(Stop(cancel), self.clock.now())
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self.clock.post(Stop(cancel=True), self.clock.now())
                self._thread.join()
        if first:
            self._close_executors()

    def abandon(self, then: Callable[[], None]) -> None:
        """Serve what is open, then stop as `close` does, without waiting; on any thread, also in a
        finalizer.

        `then` is called at last, on the engine's thread; in a forked process never.
        """
        with self._life.gate:
            if self._life.forked:
                return
            first, self._life.closed = not self._life.closed, True
            last = partial(self._close_executors, then) if first else then
            if self._life.running:
                self._last.append(last)
                self.clock.post(Stop(cancel=False), self.clock.now())
                return
        last()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    # -- inside -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with self.clock.lent(partial(self._loop.turn_for, self)):
                self._loop.run(self)
        except BaseException as fault:
            self._life.fault = fault
            if self._forgiving and not isinstance(fault, NeustreamError):
                log.exception("the engine's loop broke")
        finally:
            with self._life.gate:
                self._life.running = False
                lasts, self._last = self._last, []
            self._answers.abandon(self._life.fault)
            for last in lasts:
                last()

    def _close_executors(self, then: Callable[[], None] = lambda: None) -> None:
        """Close all of them, also if one raises, and call `then`."""
        self._loop.close(then)

    def _given_up(self, answer: Future[Result], id: str) -> None:
        """Called when a request's future is done; if that was by its caller, so is the request."""
        if answer.cancelled():
            self._answers.open.discard(answer)
            with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
                self._cancel(id, answer)

    def _cancel(self, id: str, request: Future[Result] | None) -> Future[bool]:
        with self._life.serving(closing=True) as now:
            return self._desk.ask(lambda answer: Cancel(id, answer, request), now)

    def _stopped(self, event: Stop, now: float) -> None:
        self._life.accepting = False
        if not event.cancel:
            self._loop.end(now)
            return
        if self._replay is not None:
            self._replay.interrupt(now)
        else:
            self._desk.interrupted = True
            self._loop.cancel_all(now)
