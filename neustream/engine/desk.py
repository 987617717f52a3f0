"""What callers ask of a running loop: requests, cancellations, more stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from neustream.core.types import Request
from neustream.engine.answers import Answers, Result, refusal
from neustream.engine.events import (
    Call,
    Cancel,
    Event,
    Extend,
    Leave,
    Listener,
    Retire,
    Submit,
    Take,
)
from neustream.engine.loop import Loop
from neustream.engine.member import Member
from neustream.errors import RequestError, shown

T = TypeVar("T")


class Limit:
    """The most requests without an answer; None: no limit."""

    def __init__(self, max_open: int | None) -> None:
        if max_open is not None and max_open < 1:
            raise RequestError(f"max_open must be 1 or more, got {max_open!r}")
        self._max_open = max_open

    def check(
        self, id: str, count: int, wait_s: Callable[[int], float | None], more: int = 1
    ) -> None:
        """RequestError for `more` requests, with when to come again, while `count` are open."""
        if self._max_open is None or count + more <= self._max_open:
            return
        if more > self._max_open:
            raise RequestError(
                f"request {id!r}: {more} requests at once, and max_open is {self._max_open}"
            )
        wanted = "" if more == 1 else f" {more} more are asked for,"
        raise RequestError(
            f"request {id!r}: {count} requests are open,{wanted} and max_open is {self._max_open}",
            code="too_many",
            retry_after_s=wait_s(more),
        )


class Desk:
    """Posts what callers ask, and handles it on the loop's thread; all of it is answered.

    `answers` are the callers' futures; with `interrupted`, nothing that comes now is served.
    `max_open`: the most requests without an answer; None: no limit.
    """

    def __init__(self, loop: Loop, max_open: int | None = None) -> None:
        self._limit = Limit(max_open)
        self.answers = Answers()
        self.interrupted = False
        self._loop = loop
        loop.departures.resolve = loop.crossing.resolve = self.answers.resolve
        loop.crossing.forget, loop.crossing.accept = self.answers.moved, self._taken
        loop.handlers |= {
            Submit: self._submitted,
            Cancel: self._cancelled,
            Extend: self._extended,
            Retire: self._retired,
            Leave: self._left,
        }

    # -- on callers' threads ----------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener | None, now: float) -> Future[Result]:
        """Post a request; RequestError while too many are open."""
        self._limit.check(request.id, len(self.answers.open), self.answers.wait_s)
        answer: Future[Result] = Future()
        self.answers.open.add(answer)
        self._loop.clock.post(Submit(request, answer, listener), now)
        return answer

    def ask(self, question: Callable[[Future[T]], Event], now: float) -> Future[T]:
        """Post a question that is no request."""
        answer: Future[T] = Future()
        self.answers.asked.add(answer)
        self._loop.clock.post(question(answer), now)
        return answer

    def inspect(self, question: Callable[[Sequence[Member], float], T], now: float) -> Future[T]:
        """What `question` says of the members, on the loop's thread."""

        def say(answer: Future[T], now: float) -> None:
            try:
                found: Any = question([drive.member for drive in self._loop.drives], now)
            except Exception as error:  # noqa: BLE001  the question is the caller's
                found = error
            self.answers.resolve(answer, found)

        return self.ask(lambda answer: Call(partial(say, answer)), now)

    # -- on the loop's ----------------------------------------------------------------------------

    def _submitted(self, event: Submit, now: float) -> None:
        if event.answer.cancelled():
            self.answers.resolve(event.answer, None)  # tells `concurrent.futures.wait`
            return
        id, loop = event.request.id, self._loop
        if self.interrupted:
            refused = RequestError(f"request {id!r}: this engine was interrupted")
            self.answers.resolve(event.answer, refused)
            return
        if self.answers.of(id) is not None and loop.of(id) is None:
            loop.publish()  # the one before it has ended just now: it is answered first
        try:
            loop.accept(event.request, now)
        except BaseException as error:  # noqa: BLE001  a caller's objects may raise anything
            self.answers.resolve(event.answer, refusal(error, f"request {id!r}"))
            return
        self.answers.accept(event)

    def _taken(self, event: Take) -> Future[Result]:
        """A request of another engine goes on here: the future of its answer."""
        answer: Future[Result] = Future()
        self.answers.open.add(answer)
        self.answers.listen(event.moved.carry.id, answer, event.listener)
        return answer

    def _cancelled(self, event: Cancel, now: float) -> None:
        ended = False
        theirs = event.request is None or self.answers.of(event.id) is event.request
        drive = self._loop.of(event.id)
        if theirs and drive is not None:
            self._loop.touch(drive)
            ended = drive.scheduler.cancel(event.id, now)
        self.answers.resolve(event.answer, ended)

    def _extended(self, event: Extend, now: float) -> None:
        try:
            self._loop.extend(event.pool, event.profiles, event.away, event.member)
        except BaseException as error:  # noqa: BLE001  profiles are the caller's objects
            self.answers.resolve(event.answer, refusal(error, f"pool {shown(event.pool)}"))
        else:
            self.answers.resolve(event.answer, None)

    def _retired(self, event: Retire, now: float) -> None:
        try:
            self._loop.retire(event.pool, event.stages, event.member)
        except RequestError as error:
            self.answers.resolve(event.answer, error)
        else:
            self.answers.resolve(event.answer, None)

    def _left(self, event: Leave, now: float) -> None:
        try:
            self._loop.leave(event.member, event.answer, now)
        except RequestError as error:
            self.answers.resolve(event.answer, error)
