"""Where a simulated instance runs: what is wrong with it, and what keeps its process busy."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

from neustream.cluster.network import Faults
from neustream.core.batch import Batch, StepInput
from neustream.engine.clock import Clock, VirtualClock
from neustream.engine.events import Call, Done
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.worker import Pieces


class Place:
    """A process on some machine.

    Args:
        number: of the instance; call_s: what taking a request in takes of the process. Messages
            behind it wait, and the step under way takes so much longer.
    """

    def __init__(self, number: int, faults: Faults, call_s: float = 0.0) -> None:
        self.number = number
        self.faults = faults
        self.call_s = call_s
        self.called_s = 0.0
        """Of all calls that have come."""
        self._read_until = 0.0

    def stretch(self, batch: Batch) -> float:
        """How many times as long a step takes."""
        return self.faults.factor(batch.started_at)

    def read(self, now: float, *, calls: bool) -> float:
        """When a message that arrives now was read. `calls`: a request comes with it."""
        at = max(self._read_until, now)
        if calls:
            at += self.call_s
            self.called_s += self.call_s
        self._read_until = at
        return at

    def reads_for(self, now: float) -> float:
        """Seconds until it has read all that has come."""
        return max(self._read_until - now, 0.0)


class _Clock(VirtualClock):
    """A clock for the executors of one instance: steps end later while it hangs, or never."""

    def __init__(self, clock: VirtualClock, place: Place) -> None:
        self._clock = clock
        self._place = place

    def now(self) -> float:
        return self._clock.now()

    def post(self, event: Any, at: float) -> None:
        if not isinstance(event, Done):
            self._clock.post(event, at)
        elif self._place.call_s:
            self._look_at(event, at + self._place.reads_for(self.now()))
        else:
            self._end(event, at)

    def _look_at(self, event: Done, at: float) -> None:
        """Look then whether calls held the step up meanwhile."""
        look = partial(self._look, event, self._place.called_s)
        self._clock.post(Call(look), at)

    def _look(self, event: Done, known_s: float, now: float) -> None:
        more_s = self._place.called_s - known_s
        if more_s:
            self._look_at(event, now + more_s)
        else:
            self._end(event, now)

    def _end(self, event: Done, at: float) -> None:
        at = self._place.faults.awake(at)
        if at < self._place.faults.crash_at:
            self._clock.post(event, at)


class AtPlace:
    """An executor whose steps are held up by what happens at its place."""

    def __init__(self, executor: ProfiledExecutor, clock: VirtualClock, place: Place) -> None:
        self._executor = executor
        self.alone_s = executor.alone_s
        self._at = _Clock(clock, place) if place.call_s or place.faults.any else clock

    def start(self, batch: Batch, clock: Clock) -> None:
        self._executor.start(batch, self._at)

    def release(self, id: str) -> None:
        self._executor.release(id)

    def put_aside(self, id: str) -> None:
        self._executor.put_aside(id)

    def forgets(self, model: str) -> str:
        return self._executor.forgets(model)

    def export(self, input: StepInput, worker: int = 0) -> Future[Pieces]:
        return self._executor.export(input, worker)

    def adopt(self, input: StepInput, pieces: Pieces, worker: int = 0) -> Future[None]:
        return self._executor.adopt(input, pieces, worker)

    def close(self, *, wait: bool = True) -> None:
        self._executor.close(wait=wait)

    def here(self) -> bool:
        return False
