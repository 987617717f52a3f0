"""Time as the engine sees it: a virtual clock that jumps, a wall clock that waits.

Both keep posted events in one heap ordered by (instant, kind, order of posting), so that the same
trace meets the same decisions on either. This is the only file of the package that reads the time.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

from neustream.core.asked import Asked
from neustream.engine.decision_time import AT_ONCE, DecisionTime
from neustream.engine.events import Call, Event
from neustream.engine.inbox import Inbox
from neustream.errors import RequestError

LONGEST_WAIT_S = 86400.0
"""A wall clock looks again after so long: a wait for years is more than locks can do."""

Turn = Callable[[Sequence[Event]], bool]
"""Takes events in, and does what follows; whether who waits is to have the next turn."""


def date() -> float:
    """Seconds since 1970, for those who are told when something was."""
    return time.time()


class Clock(Protocol):
    """A source of instants and of the events posted for them.

    `shared`: whether `post` may be called from any thread, so that callers can be served by it.
    """

    shared: ClassVar[bool]

    @property
    def decides_at_once(self) -> bool:
        """Whether no time passes while a policy decides: then nothing is won by planning ahead."""
        ...

    def decided(self, seconds: float, asked: Asked) -> float:
        """A policy decided what it was asked, which took so many real seconds; what it took on this
        clock."""
        ...

    def now(self) -> float:
        """Seconds since the clock was made."""
        ...

    def post(self, event: Event, at: float) -> None:
        """Deliver `event` at instant `at` (at once if that is past)."""
        ...

    def deliver(self, event: Event) -> None:
        """`event` happens now, on another thread than the one that waits, which may take the turn
        in its place."""
        ...

    def lent(self, turn: Turn) -> contextlib.AbstractContextManager[None]:
        """Let who delivers events take turns, while the present thread waits for some."""
        ...

    def wait(self) -> list[Event]:
        """All events that are due next, earliest first; empty only if none can ever come."""
        ...


class VirtualClock:
    """Jumps from event to event; for simulation. Not for use from several threads.

    `decision`: what passes whenever a policy decides.

    Raises:
        RequestError: a time of it is no time of 0 or more.
    """

    shared: ClassVar[bool] = False

    def __init__(self, decision: DecisionTime = AT_ONCE) -> None:
        for name, seconds in decision._asdict().items():
            if not 0 <= seconds < math.inf:
                raise RequestError(f"{name} must be a time >= 0, got {seconds!r}")
        self._decision = decision
        self._now = 0.0
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    @property
    def decides_at_once(self) -> bool:
        return not any(self._decision)

    def decided(self, seconds: float, asked: Asked) -> float:
        seconds = self._decision.of(asked)
        self._now += seconds
        return seconds

    def post(self, event: Event, at: float) -> None:
        at = at if at > self._now else self._now
        heapq.heappush(self._heap, (at, event.rank, next(self._order), event))

    def deliver(self, event: Event) -> None:
        self.post(event, self._now)

    def lent(self, turn: Turn) -> contextlib.AbstractContextManager[None]:
        """Nobody takes any: there is one thread."""
        return contextlib.nullcontext()

    def wait(self) -> list[Event]:
        heap = self._heap
        if not heap:
            return []
        at, _, _, event = heapq.heappop(heap)
        self._now = now = at if at > self._now else self._now
        due = [event]
        while heap and heap[0][0] <= now:
            due.append(heapq.heappop(heap)[3])
        return due


class WallClock:
    """Waits for real time (monotonic) and for posts of other threads.

    One thread waits for events. Where its turns are `lent`, one that delivers an event takes them
    meanwhile: to wake another thread and to be woken by it costs some 0.1 ms, and both want
    Python's lock. Whoever has the lead takes turns, and reads the heap.
    """

    shared: ClassVar[bool] = True
    decides_at_once: ClassVar[bool] = False

    def __init__(self) -> None:
        self._origin = time.monotonic()
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()
        self._inbox: Inbox[tuple[float, int, int, Event]] = Inbox()
        self._lead = threading.Lock()  # free while the thread that waits sleeps, with turns lent
        self._lead.acquire()
        self._turn: Turn | None = None
        self._fault: BaseException | None = None  # of a turn in its place
        self._guest: int | None = None  # the thread that takes one now
        self._until = math.inf  # when it wakes by itself

    def now(self) -> float:
        return time.monotonic() - self._origin

    def decided(self, seconds: float, asked: Asked) -> float:
        return seconds

    def post(self, event: Event, at: float) -> None:
        item = at, event.rank, next(self._order), event
        if self._guest == threading.get_ident():
            heapq.heappush(self._heap, item)
        else:
            self._inbox.put(item)

    @contextlib.contextmanager
    def lent(self, turn: Turn) -> Iterator[None]:
        """Let threads that `deliver` take turns while the present one waits.

        Not on a main thread: a signal's handler may raise while it waits.
        """
        self._turn = turn
        try:
            yield
        finally:
            self._turn = None

    def deliver(self, event: Event) -> None:
        """`event` happens now. The turn is taken here if the thread that waits sleeps, and nothing
        was posted that it is to wake for; else it is posted. What a turn raises, `wait` does."""
        lent = self._turn is not None and self._inbox.empty()
        if not (lent and self._lead.acquire(blocking=False)):
            self.post(event, self.now())
            return
        try:
            self._take_turn(event)
        finally:
            self._lead.release()

    def _take_turn(self, event: Event) -> None:
        """A turn in place of the thread that waits."""
        turn, heap, before = self._turn, self._heap, self._until
        if turn is None:  # one that raised came in between
            self.post(event, self.now())
            return
        self._guest = threading.get_ident()
        try:
            self.post(event, self.now())
            back = turn(self._due())
        except BaseException as fault:  # noqa: BLE001  it is for the thread that waits
            self._turn, self._fault = None, fault
            self._inbox.ring()
            return
        finally:
            self._guest = None  # what a finalizer posts from here on wakes the thread that waits
        if back:
            now = self.now()
            self._inbox.put((now, _WAKE.rank, next(self._order), _WAKE))
        elif heap and heap[0][0] < before:
            self._inbox.ring()

    def wait(self) -> list[Event]:
        heap, inbox = self._heap, self._inbox
        while True:
            inbox.hush()
            while not inbox.empty():
                heapq.heappush(heap, inbox.get_nowait())
            due = self._due()
            if due:
                return due
            self._until = heap[0][0] if heap else math.inf
            self._sleep(min(self._until - self.now(), LONGEST_WAIT_S))

    def _due(self) -> list[Event]:
        heap, now, due = self._heap, self.now(), list[Event]()
        while heap and heap[0][0] <= now:
            due.append(heapq.heappop(heap)[3])
        return due

    def _sleep(self, seconds: float) -> None:
        """Until something is posted, or for so long; what a turn of another thread raised."""
        if self._turn is None:
            self._inbox.listen(seconds)
            return
        self._lead.release()
        self._inbox.listen(seconds)
        self._lead.acquire()
        if self._fault is not None:
            raise self._fault


_WAKE = Call(lambda now: None)
"""Wakes the thread that waits, which has its turn."""


def stopwatch() -> float:
    """An instant in real seconds, to measure how long something took on whatever clock."""
    return time.perf_counter()


def epoch() -> float:
    """Seconds since 1970, to tell the age of what another process stamped by its own wall clock."""
    return time.time()
