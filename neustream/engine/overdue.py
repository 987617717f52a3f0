"""How long steps may take, and which workers are in steps that were given up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from neustream.core.batch import Batch
from neustream.engine.clock import Clock
from neustream.engine.events import Overdue
from neustream.errors import RequestError

if TYPE_CHECKING:
    from neustream.engine.member import Drive

PATIENCE = 20.0
"""A step is given up after so many times what is expected, and not before `PATIENT_S`."""
PATIENT_S = 60.0


class Limit(NamedTuple):
    """A step is given up at an instant: so many seconds after it begins on its worker."""

    at: float
    seconds: float


class Limits:
    """Limits of the steps under way; posts `Overdue` when one of them may be over.

    Args:
        step_timeout_s: seconds of a step; None: `PATIENCE` times its expectation; inf: no limit.
    """

    def __init__(self, owner: Drive, clock: Clock, step_timeout_s: float | None) -> None:
        if step_timeout_s is not None and not step_timeout_s > 0:
            raise RequestError(f"step_timeout_s must be greater than 0, got {step_timeout_s!r}")
        self._owner = owner
        self._clock = clock
        self._step_timeout_s = step_timeout_s
        self._limits: dict[int, Limit] = {}
        self._watched = False  # whether an `Overdue` is posted
        self._lost: dict[int, tuple[str, int]] = {}

    def watch(self, batch: Batch, now: float) -> None:
        """A step starts."""
        seconds = self._step_timeout_s
        if seconds is None:
            seconds = max(PATIENCE * batch.expected, PATIENT_S)
        self._limits[batch.id] = Limit(now + seconds, seconds)
        if not self._watched:
            self._post(now + seconds)

    def put_off(self, steps: Iterable[int], seconds: float) -> None:
        """Steps, by id, begin so much later than they were started."""
        for number in steps:
            limit = self._limits.get(number)
            if limit is not None:
                self._limits[number] = limit._replace(at=limit.at + seconds)

    def ended(self, batch: Batch) -> bool:
        """A step came back; whether it had been given up."""
        self._limits.pop(batch.id, None)
        return self._lost.pop(batch.id, None) is not None

    def over(self, now: float) -> dict[int, float]:
        """The seconds of those steps, by id, whose limits are over; limits are kept no longer."""
        over = {number: limit.seconds for number, limit in self._limits.items() if limit.at <= now}
        for number in over:
            del self._limits[number]
        self._watched = False
        if self._limits:
            self._post(min(self._limits.values()).at)
        return over

    def lose(self, batch: Batch) -> None:
        """A step is given up: its worker is lost until it comes back."""
        self._lost[batch.id] = batch.pool, batch.worker

    def lost(self, pool: str) -> set[int]:
        """The workers of `pool` that are in steps which were given up."""
        return {worker for name, worker in self._lost.values() if name == pool}

    def _post(self, at: float) -> None:
        if at < math.inf:
            self._watched = True
            self._clock.post(Overdue(self._owner), at)
