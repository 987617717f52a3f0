"""A workload's requests, sent to a service at their arrivals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from neustream.backends import Arguments
from neustream.core.types import SLO, Request
from neustream.engine.events import Observer, Refused
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


class Replay:
    """Sends requests, one after the other, on the calling thread; arrivals count from when it is made.

    Attributes:
        interrupted: whether it was ended before all was served.
        start: the instant of the clock of what serves that arrivals count from.
    """

    def __init__(self, serving: Serving) -> None:
        self.interrupted = False
        self._serving = serving
        self.start = serving.now()
        self._never = threading.Event()
        self._refused: list[Refused] = []

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent."""
        return self.interrupted or self._serving.fault is not None

    def interrupt(self) -> None:
        """End the open requests as cancelled and send no more; safe from a signal handler."""
        self.interrupted = True
        self._serving.interrupt()

    def submit(
        self,
        request: Request,
        arguments: Arguments,
        model: str | None,
        done: Callable[[Answer[Any]], None],
    ) -> None:
        """Wait for a request's arrival and send it; `done` is told of its answer, on the engine's thread."""
        due = self.start + request.arrival
        while not self.over and (left := due - self._serving.now()) > 0:
            self._never.wait(min(left, PATIENCE_S))
        if self.over:
            return
        args, named = arguments
        try:
            answer = self._serving.submit(*args, **named, model=model, slo=request.slo, id=request.id)
        except RequestError as error:
            if not self.over:
                self._refuse(request, error)
            return
        answer.add_done_callback(lambda _: self._answered(request, answer, done))

    def _answered(self, request: Request, answer: Answer[Any], done: Callable[[Answer[Any]], None]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if error is not None and answer.ended is None:
            self._refuse(request, error)
        done(answer)

    def _refuse(self, request: Request, error: BaseException) -> None:
        now = self._serving.now()
        self._refused.append(Refused(request.id, told(error), self.start + request.arrival, request.slo, now))

    def tell(self, observers: Sequence[Observer]) -> None:
        """Tell of requests that never came to be served; once the service is closed."""
        for record in self._refused:
            for observer in observers:
                observer(record)
