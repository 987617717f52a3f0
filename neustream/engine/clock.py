"""Time as the engine sees it: a virtual clock that jumps, a wall clock that waits.

Both keep posted events in one heap ordered by (instant, kind, order of posting), so that the same
trace meets the same decisions on either. This is the only file of the package that reads the time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from typing import ClassVar, Protocol

from neustream.engine.events import Event

LONGEST_WAIT_S = 86400.0
"""A wall clock looks again after so long: a wait for years is more than locks can do."""


class Clock(Protocol):
    """A source of instants and of the events posted for them.

    `shared`: whether `post` may be called from any thread, so that callers can be served by it.
    """

    shared: ClassVar[bool]

    def now(self) -> float:
        """Seconds since the clock was made."""
        ...

    def post(self, event: Event, at: float) -> None:
        """Deliver `event` at instant `at` (at once if that is past)."""
        ...

    def wait(self) -> list[Event]:
        """All events that are due next, earliest first; empty only if none can ever come."""
        ...


class VirtualClock:
    """Jumps from event to event; for simulation. Not for use from several threads."""

    shared: ClassVar[bool] = False

    def __init__(self) -> None:
        self._now = 0.0
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def post(self, event: Event, at: float) -> None:
        heapq.heappush(self._heap, (max(at, self._now), event.rank, next(self._order), event))

    def wait(self) -> list[Event]:
        heap = self._heap
        if not heap:
            return []
        self._now, _, _, event = heapq.heappop(heap)
        due = [event]
        while heap and heap[0][0] <= self._now:
            due.append(heapq.heappop(heap)[3])
        return due


class WallClock:
    """Waits for real time (monotonic) and for posts of other threads."""

    shared: ClassVar[bool] = True

    def __init__(self) -> None:
        self._origin = time.monotonic()
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()  # on an RLock: a signal handler may post too

    def now(self) -> float:
        return time.monotonic() - self._origin

    def post(self, event: Event, at: float) -> None:
        with self._changed:
            heapq.heappush(self._heap, (at, event.rank, next(self._order), event))
            self._changed.notify()

    def wait(self) -> list[Event]:
        with self._changed:
            while True:
                now = self.now()
                due: list[Event] = []
                while self._heap and self._heap[0][0] <= now:
                    due.append(heapq.heappop(self._heap)[3])
                if due:
                    return due
                left = self._heap[0][0] - now if self._heap else math.inf
                self._changed.wait(min(left, LONGEST_WAIT_S))


def stopwatch() -> float:
    """An instant in real seconds, to measure how long something took on whatever clock."""
    return time.perf_counter()


def epoch() -> float:
    """Seconds since 1970, to tell the age of what another process stamped by its own wall clock."""
    return time.time()
