"""When the loop plans what follows the steps under way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neustream.core.batch import Batch
from neustream.core.step_times import StepTimes
from neustream.engine.clock import Clock
from neustream.engine.events import Look

if TYPE_CHECKING:
    from neustream.engine.member import Drive

SLIP = 0.1
"""Share of a step by which it may end earlier than expected."""
OVER = 0.5
"""Share of a step by which it has taken too long: its requests may lose hope by that."""
SETTLED_S = 0.0005
"""A step has begun on its worker by then: planning would keep it from that (Python's lock)."""
QUICK = 1.0
"""Share of a short step in which a decision is quick; for a lone request it is in any case."""
SOON_S = 0.05
"""In steps that are longer, the next one is planned that often, if anything came up: who is without
hope hears of it."""


class Looks:
    """Posts a `Look` at the instants at which plans are to be made.

    A step is planned shortly before the one under way ends, so that it knows of what came until
    then, and by one decision a step. Where steps are long, also early, and where one takes longer
    than expected, again and again, ever more seldom. A step that is to have Python to itself
    (`Executor.alone_s`) is planned only in that case, where decisions are quick: the lock keeps its
    worker waiting while one is made, and at its end none of it goes into a forecast.
    """

    def __init__(self, owner: Drive, clock: Clock, times: StepTimes) -> None:
        self._owner = owner
        self._clock = clock
        self._times = times
        self._at: dict[int, float] = {}
        self._posted: set[float] = set()
        self._took = 0.0  # by the clock, what a decision takes if it takes long

    def started(self, batch: Batch, now: float, alone_s: float) -> None:
        """A step began; `alone_s`: as its executor says."""
        end = self._times.over_at(batch)
        if end - now < alone_s and self._quick(end - now):
            self._watch(batch, _shared(end + alone_s))
            return
        self._watch(batch, min(self._last(batch), now + SOON_S), now + SETTLED_S)

    def _quick(self, seconds: float) -> bool:
        """Whether a decision at the end of a short step keeps its worker waiting for little."""
        return self._took < QUICK * seconds or len(self._owner.scheduler.jobs) == 1

    def over(self, batch: Batch) -> None:
        """A step ended, or was given up."""
        self._at.pop(batch.id, None)

    def due(self, now: float, posted: float) -> list[int]:
        """The ids of steps whose next one is to be planned."""
        self._posted.discard(posted)
        return [number for number, at in self._at.items() if at <= now]

    def looked(self, batch: Batch, now: float) -> None:
        """What follows a step was planned, or need not be planned anew."""
        last, end = self._last(batch), self._times.over_at(batch)
        if now < last:
            self._watch(batch, min(last, now + SOON_S))
            return
        later = max(now, end) + max(SOON_S, OVER * (end - batch.started_at), now - end)
        self._watch(batch, _shared(later))

    def took(self, seconds: float) -> None:
        """A decision took so long."""
        self._took = max(seconds, 0.9 * self._took)

    def _last(self, batch: Batch) -> float:
        """When a plan has to be begun to be ready in time."""
        end = self._times.over_at(batch)
        return end - SLIP * (end - batch.started_at) - 2 * self._took

    def _watch(self, batch: Batch, at: float, earliest: float = 0.0) -> None:
        at = max(at, earliest)
        self._at[batch.id] = at
        if at not in self._posted:
            self._posted.add(at)
            self._clock.post(Look(self._owner, at), at)


def _shared(at: float) -> float:
    """An instant no sooner than `at` at which steps share one event."""
    return math.ceil(at / SOON_S) * SOON_S
