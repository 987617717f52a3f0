"""Time as the engine sees it: a virtual clock that jumps, a wall clock that waits.

Both keep posted events in one heap ordered by (instant, kind, order of posting), so that the same
trace meets the same decisions on either. This is the only file of the package that reads the time.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import queue
import time
from typing import ClassVar, Protocol

from neustream.engine.events import Event
from neustream.engine.inbox import Inbox
from neustream.errors import RequestError

LONGEST_WAIT_S = 86400.0
"""A wall clock looks again after so long: a wait for years is more than locks can do."""


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

    def decided(self, seconds: float) -> float:
        """A policy decided, which took so many real seconds; what it took on this clock."""
        ...

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
    """Jumps from event to event; for simulation. Not for use from several threads.

    `decision_s`: what passes whenever a policy decides.

    Raises:
        RequestError: `decision_s` is no time of 0 or more.
    """

    shared: ClassVar[bool] = False

    def __init__(self, decision_s: float = 0.0) -> None:
        if not 0 <= decision_s < math.inf:
            raise RequestError(f"decision_s must be a time >= 0, got {decision_s!r}")
        self._decision_s = decision_s
        self._now = 0.0
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    @property
    def decides_at_once(self) -> bool:
        return not self._decision_s

    def decided(self, seconds: float) -> float:
        self._now += self._decision_s
        return self._decision_s

    def post(self, event: Event, at: float) -> None:
        heapq.heappush(self._heap, (max(at, self._now), event.rank, next(self._order), event))

    def wait(self) -> list[Event]:
        heap = self._heap
        if not heap:
            return []
        at, _, _, event = heapq.heappop(heap)
        self._now = max(self._now, at)
        due = [event]
        while heap and heap[0][0] <= self._now:
            due.append(heapq.heappop(heap)[3])
        return due


class WallClock:
    """Waits for real time (monotonic) and for posts of other threads."""

    shared: ClassVar[bool] = True
    decides_at_once: ClassVar[bool] = False

    def __init__(self) -> None:
        self._origin = time.monotonic()
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()
        self._inbox: Inbox[tuple[float, int, int, Event]] = Inbox()

    def now(self) -> float:
        return time.monotonic() - self._origin

    def decided(self, seconds: float) -> float:
        return seconds

    def post(self, event: Event, at: float) -> None:
        self._inbox.put((at, event.rank, next(self._order), event))

    def wait(self) -> list[Event]:
        heap, inbox = self._heap, self._inbox
        while True:
            while not inbox.empty():
                heapq.heappush(heap, inbox.get_nowait())
            now = self.now()
            due: list[Event] = []
            while heap and heap[0][0] <= now:
                due.append(heapq.heappop(heap)[3])
            if due:
                return due
            left = heap[0][0] - now if heap else LONGEST_WAIT_S
            with contextlib.suppress(queue.Empty):
                heapq.heappush(heap, inbox.get(min(left, LONGEST_WAIT_S)))


def stopwatch() -> float:
    """An instant in real seconds, to measure how long something took on whatever clock."""
    return time.perf_counter()


def epoch() -> float:
    """Seconds since 1970, to tell the age of what another process stamped by its own wall clock."""
    return time.time()
