"""A workload as a source of requests: drawn one at a time, at their arrivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from neustream.core.events import Ended
from neustream.core.types import Request
from neustream.engine.events import Arrival, Call, Record, Refused
from neustream.engine.loop import Loop
from neustream.engine.places import Places
from neustream.engine.turns import Next, Turn, Turns
from neustream.errors import NeustreamError, RequestError


class Replay:
    """Posts `requests` to a loop's clock, each before the next is drawn; arrivals count from now.

    `call_s`: from the arrival of a request to when it is taken in, which its caller needs.
    `turns`: of requests that go on with others, by their ids. One whose turn before was not done
    is refused.
    `places`: bounds how many are under way at once.
    RequestError, from the loop, if arrivals go back.
    """

    def __init__(
        self,
        loop: Loop,
        requests: Iterable[Request],
        call_s: float = 0.0,
        turns: Mapping[str, Turn] = {},
        places: Places | None = None,
    ) -> None:
        self._loop = loop
        self._call_s = call_s
        self._turns = Turns(turns)
        self._places = places or Places()
        self._later = 0  # turns, and requests with a place, whose instants are known
        self._start = loop.clock.now()
        self._requests: Iterator[Request] = iter(requests)
        self._next = next(self._requests, None)
        self._posted = 0  # arrivals that were not handled yet
        self.interrupted = False
        loop.handlers[Arrival] = self._arrived
        if self._turns or self._places:
            loop.observers.append(self._heard)
        self._draw()

    @property
    def over(self) -> bool:
        """Whether no more requests will come."""
        to_come = self._posted or self._later or self._turns.waiting or self._places.waiting
        return self.interrupted or not to_come

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
        for following in self._turns.came(event.request):
            self._go_on(following, now)

    def _heard(self, record: Record) -> None:
        """A request is over: those that waited for it come, and one that waited for its place."""
        if isinstance(record, Ended | Refused) and not self.interrupted:
            done = isinstance(record, Ended) and record.status == "done"
            for following in self._turns.ended(record.id, record.at, done=done):
                self._post(following)
            next_in = self._places.left(record.id, record.at)
            if next_in is not None:
                self._post(Next(next_in))
        if self.over and not self._loop.busy:
            self._loop.observers.remove(self._heard)

    def _go_on(self, following: Next, now: float) -> None:
        if following.blocked or following.request.arrival + self._call_s > now:
            self._post(following)
        else:
            self._take(following.request, now)

    def _post(self, following: Next) -> None:
        """Not at once: an observer must not have requests taken in."""
        self._later += 1
        at = following.request.arrival + self._call_s
        self._loop.clock.post(Call(partial(self._due, following), Arrival.rank), at)

    def _due(self, following: Next, now: float) -> None:
        self._later -= 1
        if self.interrupted:
            return
        if following.blocked:
            self._refuse(following.request, following.blocked, now)
        else:
            self._take(following.request, now)

    def _take(self, request: Request, now: float) -> None:
        if not self._places.enter(request):
            return
        try:
            self._loop.accept(request, now)
        except NeustreamError as error:
            self._refuse(request, str(error), now)

    def _refuse(self, request: Request, reason: str, now: float) -> None:
        self._loop.tell(Refused(request.id, reason, request.arrival, request.slo, now))
