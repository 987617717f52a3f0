"""What callers ask of a running loop: requests, cancellations, more stages."""

from __future__ import annotations

from neustream.engine.answers import Answers, refusal
from neustream.engine.events import Cancel, Extend, Submit
from neustream.engine.loop import Loop
from neustream.errors import RequestError, shown


class Desk:
    """Handles callers' events on the loop's thread; each is answered, whatever it brings.

    `answers` are the callers' futures; with `interrupted`, nothing that comes now is served.
    """

    def __init__(self, loop: Loop) -> None:
        self.answers = Answers()
        self.interrupted = False
        self._loop = loop
        loop.handlers |= {
            Submit: self._submitted,
            Cancel: self._cancelled,
            Extend: self._extended,
        }

    def _submitted(self, event: Submit, now: float) -> None:
        if event.answer.cancelled():
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

    def _cancelled(self, event: Cancel, now: float) -> None:
        ended = False
        theirs = event.request is None or self.answers.of(event.id) is event.request
        drive = self._loop.of(event.id)
        if theirs and drive is not None:
            ended = drive.scheduler.cancel(event.id, now)
        self.answers.resolve(event.answer, ended)

    def _extended(self, event: Extend, now: float) -> None:
        try:
            self._loop.extend(event.pool, event.profiles, event.member)
        except BaseException as error:  # noqa: BLE001  profiles are the caller's objects
            self.answers.resolve(event.answer, refusal(error, f"pool {shown(event.pool)}"))
        else:
            self.answers.resolve(event.answer, None)
