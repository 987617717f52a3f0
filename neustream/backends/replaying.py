"""A workload's requests, sent to a service at their arrivals."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from neustream.backends import Arguments
from neustream.core.types import SLO, Request
from neustream.engine.events import Observer, Refused
from neustream.engine.inbox import Inbox
from neustream.engine.places import Places
from neustream.engine.turns import Next, Turn, Turns
from neustream.errors import RequestError, told
from neustream.service.answer import Answer
from neustream.service.service import Service

PATIENCE_S = 0.05
"""How long an interruption may wait to be seen."""


class Serving(Protocol):
    """What serves requests: a service, or a cluster."""

    @property
    def fault(self) -> BaseException | None:
        """Why it serves no more; None: it does."""
        ...

    def now(self) -> float:
        """The instant on its clock, seconds."""
        ...

    def interrupt(self) -> None:
        """End what is open as cancelled; safe from a signal handler."""
        ...

    def submit(self, *args: Any, model: str | None, slo: SLO, id: str, **named: Any) -> Answer[Any]: ...


class OfService:
    """A service, as what serves requests."""

    def __init__(self, service: Service) -> None:
        self._engine = service.engine
        self.submit = service.submit

    @property
    def fault(self) -> BaseException | None:
        return self._engine.fault

    def now(self) -> float:
        return self._engine.clock.now()

    def interrupt(self) -> None:
        self._engine.interrupt()


@dataclass(frozen=True)
class Sending:
    """A request, and how it is asked for; `done` is told of its answer, on the engine's thread."""

    request: Request
    arguments: Arguments
    model: str | None
    done: Callable[[Answer[Any]], None]


class Replay:
    """Sends requests on the calling thread; arrivals count from when it is made.

    Args:
        turns: of requests that go on with others, by their ids.
        places: bounds how many are under way at once.

    Attributes:
        interrupted: whether it was ended before all was served.
        start: the instant of the clock of what serves that arrivals count from.
    """

    def __init__(self, serving: Serving, turns: Mapping[str, Turn] = {}, places: Places | None = None) -> None:
        self.interrupted = False
        self._serving = serving
        self.start = serving.now()
        self._turns = Turns(turns)
        self._places = places or Places()
        self._held: dict[str, Sending] = {}  # wait for a place
        self._ends: Inbox[tuple[str, float, bool]] = Inbox()
        self._waiting: dict[str, Sending] = {}
        self._ready: list[tuple[float, int, Sending]] = []
        self._order = itertools.count()
        self._refused: list[Refused] = []

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent."""
        return self.interrupted or self._serving.fault is not None

    def interrupt(self) -> None:
        """End the open requests as cancelled and send no more; safe from a signal handler."""
        self.interrupted = True
        self._serving.interrupt()

    def play(self, sendings: Iterable[Sending]) -> None:
        """Send each at its arrival, in this order; a turn once the one before it is done.

        Returns when all are sent. One whose turn before was not done is refused.
        """
        for sending in sendings:
            while not self.over and self._now() < sending.request.arrival:
                self._pass(sending.request.arrival)
            if self.over:
                return
            self._waiting[sending.request.id] = sending
            self._go_on(self._turns.came(sending.request))
        while not self.over and (self._ready or self._turns.waiting or self._held):
            self._pass(math.inf)

    def _now(self) -> float:
        return self._serving.now() - self.start

    def _pass(self, due: float) -> None:
        """Wait for an instant, that of a turn, or an end, but not for long; send the turns that are due."""
        soonest = min(due, self._ready[0][0]) if self._ready else due
        self._hear(min(max(soonest - self._now(), 0.0), PATIENCE_S))
        while self._ready and self._ready[0][0] <= self._now():
            self._send(heapq.heappop(self._ready)[2])

    def _hear(self, seconds: float) -> None:
        """Wait so long for the end of a request; those that waited for it, or for its place, go on."""
        with contextlib.suppress(queue.Empty):
            id, at, done = self._ends.get(seconds)
            self._go_on(self._turns.ended(id, at, done=done))
            request = self._places.left(id, at)
            if request is not None:
                self._send(replace(self._held.pop(request.id), request=request))

    def _go_on(self, found: Sequence[Next]) -> None:
        for each in found:
            request = each.request
            sending = replace(self._waiting.pop(request.id), request=request)
            if each.blocked:
                self._refuse(request, RequestError(each.blocked))
            elif request.arrival <= self._now():
                self._send(sending)
            else:
                heapq.heappush(self._ready, (request.arrival, next(self._order), sending))

    def _send(self, sending: Sending) -> None:
        request, (args, named) = sending.request, sending.arguments
        if not self._places.enter(request):
            self._held[request.id] = sending
            return
        try:
            answer = self._serving.submit(*args, **named, model=sending.model, slo=request.slo, id=request.id)
        except RequestError as error:
            if not self.over:
                self._refuse(request, error)
                self._over(request, done=False)
            return
        answer.add_done_callback(lambda _: self._answered(request, answer, sending.done))

    def _answered(self, request: Request, answer: Answer[Any], done: Callable[[Answer[Any]], None]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if error is not None and answer.ended is None:
            self._refuse(request, error)
        self._over(request, done=error is None and not answer.cancelled())
        done(answer)

    def _over(self, request: Request, *, done: bool) -> None:
        """Have those go on that wait for it; from any thread."""
        if self._turns or self._places:
            self._ends.put((request.id, self._now(), done))

    def _refuse(self, request: Request, error: BaseException) -> None:
        now = self._serving.now()
        self._refused.append(Refused(request.id, told(error), self.start + request.arrival, request.slo, now))

    def tell(self, observers: Sequence[Observer]) -> None:
        """Tell of requests that never came to be served; once the service is closed."""
        for record in self._refused:
            for observer in observers:
                observer(record)
