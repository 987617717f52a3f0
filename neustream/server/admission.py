"""Who is taken in: limits on what is open, on what waits, and on how long it would wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from neustream.engine.clock import stopwatch
from neustream.server.config import LimitConfig
from neustream.server.errors import HTTPError

FORGET = 0.1
"""How much the latest gap between two that were done counts in the mean."""
BATCHES = 4
"""A model's queue has room for so many of its largest steps, where the operator says nothing."""


class Began(Protocol):
    """What is read of a request that the engine has."""

    @property
    def arrival(self) -> float: ...
    @property
    def started_at(self) -> float | None: ...


class Open(Protocol):
    """The answer of a request."""

    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def exception(self) -> BaseException | None: ...
    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None: ...


class Kind(NamedTuple):
    """Requests that wait for each other: of one model, with a promise or without."""

    model: str
    promised: bool


class Pace:
    """Seconds from one request that is done to the next, `gap_s`; idle time does not count."""

    def __init__(self) -> None:
        self._done_at: float | None = None
        self.gap_s: float | None = None

    def done(self, now: float, latency_s: float) -> None:
        """One is done that took so long."""
        if self._done_at is not None:
            gap = min(now - self._done_at, latency_s)
            self.gap_s = gap if self.gap_s is None else self.gap_s + FORGET * (gap - self.gap_s)
        self._done_at = now


class Admission:
    """Counts open requests by kind, and refuses what comes while too many are open or wait.

    Requests without a promise wait behind the others, and may be many: they are counted by
    themselves, so that they take nobody's place who is promised something.

    Args:
        limits: of the operator.
        pace: seconds in which so many requests of any kind are done, at the pace of late; None: not
            known. It counts as long as none of a kind were.
        jobs: what engines have, by id; read each time.
        now: seconds.
    """

    def __init__(
        self,
        limits: LimitConfig,
        pace: Callable[[int], float | None],
        jobs: Callable[[], Iterable[Mapping[str, Began]]],
        now: Callable[[], float] = stopwatch,
    ) -> None:
        self._limits = limits
        self._pace = pace
        self._jobs = jobs
        self._now = now
        self._open: dict[str, tuple[Kind, Open]] = {}
        self._paces: dict[Kind, Pace] = {}

    def check(self, model: str, batch: int, promised: bool) -> None:
        """HTTPError, with when to come again, if `model` takes no more of a kind now.

        `batch`: requests of one of its steps, at most.
        """
        limits = self._limits
        if len(self._open) >= limits.max_open:
            text = f"{len(self._open)} requests are open, and max_open is {limits.max_open}"
            raise _crowded(text, "too_many", self._pace(1))
        waiting = self.waiting(model, promised)
        most = BATCHES * batch if limits.max_queued is None else limits.max_queued
        if waiting >= most:
            which = "" if promised else " without a promise"
            text = f"{waiting} requests{which} wait for {model!r}, and max_queued is {most}"
            raise _crowded(text, "queue_full", self.wait_s(model, promised, waiting - most + 1))
        wait_s = self.wait_s(model, promised, waiting) if waiting else 0.0
        if limits.max_wait_s is not None and wait_s is not None and wait_s > limits.max_wait_s:
            text = f"it would wait about {wait_s:.1f} s, and max_wait_s is {limits.max_wait_s:g}"
            raise _crowded(text, "wait", wait_s - limits.max_wait_s)

    def wait_s(self, model: str, promised: bool, count: int) -> float | None:
        """Seconds in which so many requests of a kind are done, at the pace of late; None: not known."""
        pace = self._paces.get(Kind(model, promised))
        if pace is None or pace.gap_s is None:
            return self._pace(count)
        return count * pace.gap_s

    def came(self, id: str, model: str, answer: Open, promised: bool) -> None:
        """A request was taken in."""
        kind, came_at = Kind(model, promised), self._now()
        self._open[id] = kind, answer

        def over(done: Future[Any]) -> None:  # knows the answer by its argument alone: else they would hold each other
            self._open.pop(id, None)
            if not done.cancelled() and done.exception() is None:
                now = self._now()
                self._paces.setdefault(kind, Pace()).done(now, now - came_at)

        answer.add_done_callback(over)

    def waiting(self, model: str, promised: bool) -> int:
        """Requests of a kind that have not run yet."""
        known, wanted = list(self._open.items()), Kind(model, promised)
        ids = [id for id, (kind, answer) in known if kind == wanted and not answer.done()]
        return len(ids) - self._running(ids)

    def began(self, ids: Sequence[str]) -> bool:
        """Whether one of some requests runs, or has run."""
        return self._running(ids) > 0

    def _running(self, ids: Sequence[str]) -> int:
        return len({id for jobs in self._jobs() for id in ids if _began(jobs.get(id))})


def _began(job: Began | None) -> bool:
    return job is not None and job.started_at is not None


def _crowded(text: str, code: str, seconds: float | None) -> HTTPError:
    wait_s = None if seconds is None or math.isnan(seconds) else seconds
    return HTTPError(429, text, code, retry_after_s=wait_s)
