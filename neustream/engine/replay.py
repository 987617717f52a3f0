"""A workload as a source of requests: drawn one at a time, at their arrivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from neustream.core.types import Request
from neustream.engine.events import Arrival, Refused
from neustream.engine.loop import Loop
from neustream.errors import NeustreamError, RequestError


class Replay:
    """Posts `requests` to a loop's clock, each before the next is drawn; arrivals count from now.

    `call_s`: from the arrival of a request to when it is taken in, which its caller needs.
    RequestError, from the loop, if arrivals go back.
    """

    def __init__(self, loop: Loop, requests: Iterable[Request], call_s: float = 0.0) -> None:
        self._loop = loop
        self._call_s = call_s
        self._start = loop.clock.now()
        self._requests: Iterator[Request] = iter(requests)
        self._next = next(self._requests, None)
        self._posted = 0  # arrivals that were not handled yet
        self.interrupted = False
        loop.handlers[Arrival] = self._arrived
        self._draw()

    @property
    def over(self) -> bool:
        """Whether no more requests will come."""
        return self.interrupted or not self._posted

    def interrupt(self, now: float) -> None:
        """End the open requests as cancelled and take no more."""
        self.interrupted = True
        self._loop.cancel_all(now)

    def _draw(self) -> None:
        """Post the next request, and those that come at the same instant."""
        request = self._next
        while request is not None:
            arrival = request.arrival
            at = arrival + self._start
            if self._start:
                request = dataclasses.replace(request, arrival=at)
            self._posted += 1
            self._loop.clock.post(Arrival(request, self), at + self._call_s)
            following = self._next = next(self._requests, None)
            if following is None or following.arrival > arrival:
                return
            if following.arrival < arrival:
                raise RequestError(
                    f"request {following.id!r}: arrivals must not go back, "
                    f"got {following.arrival} after {arrival}"
                )
            request = following

    def _arrived(self, event: Arrival, now: float) -> None:
        if event.source is not self or self.interrupted:
            return  # of a workload that was interrupted
        self._posted -= 1
        if not self._posted:
            self._draw()
        try:
            self._loop.accept(event.request, now)
        except NeustreamError as error:
            request = event.request
            refused = Refused(request.id, str(error), request.arrival, request.slo, now)
            self._loop.tell(refused)
