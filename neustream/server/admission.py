"""Who is taken in: limits on what is open, on what waits, and on how long it would wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from neustream.server.config import LimitConfig
from neustream.server.errors import HTTPError

BATCHES = 4
"""A model's queue has room for so many of its largest steps, where the operator says nothing."""


class Began(Protocol):
    """What is read of a request that the engine has."""

    @property
    def started_at(self) -> float | None: ...


class Open(Protocol):
    """The answer of a request."""

    def done(self) -> bool: ...
    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None: ...


class Admission:
    """Counts open requests by model, and refuses what comes while too many are open or wait.

    Args:
        limits: of the operator.
        wait_s: seconds in which so many requests are done, at the pace of late; None: not known.
        jobs: what engines have, by id; read each time.
    """

    def __init__(
        self,
        limits: LimitConfig,
        wait_s: Callable[[int], float | None],
        jobs: Callable[[], Iterable[Mapping[str, Began]]],
    ) -> None:
        self._limits = limits
        self._wait_s = wait_s
        self._jobs = jobs
        self._open: dict[str, tuple[str, Open]] = {}

    def check(self, model: str, batch: int) -> None:
        """HTTPError, with when to come again, if `model` takes no more now.

        `batch`: requests of one of its steps, at most.
        """
        limits = self._limits
        if len(self._open) >= limits.max_open:
            text = f"{len(self._open)} requests are open, and max_open is {limits.max_open}"
            raise _crowded(text, "too_many", self._wait_s(1))
        waiting = self.waiting(model)
        most = BATCHES * batch if limits.max_queued is None else limits.max_queued
        if waiting >= most:
            text = f"{waiting} requests wait for {model!r}, and max_queued is {most}"
            raise _crowded(text, "queue_full", self._wait_s(waiting - most + 1))
        wait_s = self._wait_s(waiting) if waiting else 0.0
        if limits.max_wait_s is not None and wait_s is not None and wait_s > limits.max_wait_s:
            text = f"it would wait about {wait_s:.1f} s, and max_wait_s is {limits.max_wait_s:g}"
            raise _crowded(text, "wait", wait_s - limits.max_wait_s)

    def came(self, id: str, model: str, answer: Open) -> None:
        """A request was taken in."""
        self._open[id] = model, answer
        answer.add_done_callback(lambda _: self._open.pop(id, None))

    def waiting(self, model: str) -> int:
        """Requests of a model that have not run yet."""
        known = list(self._open.items())
        ids = {id for id, (name, answer) in known if name == model and not answer.done()}
        for jobs in self._jobs():
            ids -= {id for id in ids if _began(jobs.get(id))}
        return len(ids)


def _began(job: Began | None) -> bool:
    return job is not None and job.started_at is not None


def _crowded(text: str, code: str, seconds: float | None) -> HTTPError:
    wait_s = None if seconds is None or math.isnan(seconds) else seconds
    return HTTPError(429, text, code, retry_after_s=wait_s)
