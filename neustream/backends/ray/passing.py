"""Requests that leave an instance for another one, and those that come from there."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

from neustream.backends.ray.answering import Answering
from neustream.backends.ray.entries import Entries, Entry
from neustream.backends.ray.outbox import Outbox
from neustream.backends.ray.wire import Left, NotMovable
from neustream.cluster import messages as to
from neustream.engine.clock import stopwatch
from neustream.errors import RequestError, StageFailed, told
from neustream.service.answer import Answer
from neustream.service.requests import Moved
from neustream.service.service import Service


class Passing:
    """Has a service give and take requests. `name`: of the instance."""

    def __init__(self, service: Service, name: str, entries: Entries, outbox: Outbox, answering: Answering) -> None:
        self._service = service
        self._name = name
        self._entries = entries
        self._outbox = outbox
        self._answering = answering

    # -- going ------------------------------------------------------------------------------------

    def hold(self, id: str, term: int) -> None:
        """A request is to leave at the end of its step."""
        entry = self._entries.of(id, term)
        if entry is not None:
            self._give(entry)

    def away(self, id: str, stage: str) -> None:
        """The next stage of a request is served elsewhere: it leaves."""
        entry = self._entries.get(id)
        if entry is not None and not entry.quiet:
            self._give(entry, stage)

    def leave(self, id: str, term: int) -> Left:
        """A request that waits to be passed on; NotMovable if it does not, and why."""
        with self._entries.lock:
            entry = self._entries.of(id, term)
            if entry is None or (entry.left is None and not entry.why):
                raise NotMovable(f"request {id!r} does not wait at instance {self._name!r}")
            if entry.left is None:
                raise NotMovable(entry.why)
            return Left(entry.left, entry.heard, stopwatch() - entry.left_at, entry.asked)

    def resume(self, id: str, term: int) -> None:
        """A request that left the service goes on here after all."""
        entry = self._entries.of(id, term)
        if entry is None:
            return
        with self._entries.lock:
            moved, entry.left, entry.why = entry.left, None, ""
        if moved is not None:
            entry.reader = None
            self._enter(entry, moved, entry.sent, stopwatch() - entry.left_at)

    def _give(self, entry: Entry, away: str = "") -> None:
        self._service.give(entry.id).add_done_callback(partial(self._gone, entry, away))

    def _gone(self, entry: Entry, away: str, gone: Future[Moved]) -> None:
        """It left the service, or cannot; of one that ended meanwhile is told by its end."""
        error = gone.exception()
        ended = isinstance(error, RequestError) and error.code != "too_early"
        if ended:
            return
        with self._entries.lock:
            if error is None:
                entry.left, entry.left_at = gone.result(), stopwatch()
            else:
                stuck = isinstance(error, StageFailed)
                entry.why = f"not movable: {told(error)}" if stuck else told(error)
            if entry.quiet and error is None:
                self._entries.remove(entry)
                return
            entry.away = away
            if not entry.orphan:
                self._outbox.put(self._waits(entry))

    def again(self, entry: Entry) -> None:
        """The next head wants a request. One that waits for its next stage waits; another one goes on."""
        if entry.left is None and not entry.why:
            return
        if entry.away:
            self._outbox.put(self._waits(entry))
        else:
            self.resume(entry.id, entry.term)

    def _waits(self, entry: Entry) -> to.Waits:
        """That it waits, for what, and what is ahead of it."""
        left = {} if entry.left is None else entry.left.there.carry.left
        return to.Waits(entry.id, entry.term, away=entry.away, left=left)

    # -- coming -----------------------------------------------------------------------------------

    def take(self, id: str, term: int, left: Left) -> None:
        """Go on with a request that left another instance; `Took` or `Refused` tells of it."""
        entry = Entry(id, term, told=False, asked=left.asked)
        if self._entries.add(entry) is not None:
            self._outbox.put(to.Refused(id, term, "it is here already"))
            return
        self._enter(entry, left.moved, left.heard, left.waited_s)

    def _enter(self, entry: Entry, moved: Moved, heard: int, waited_s: float) -> None:
        """Have the service go on with a request."""
        try:
            taken = self._service.take(moved, waited_s=waited_s)
        except Exception as error:  # noqa: BLE001  the answer raises it
            taken = Future()
            taken.set_exception(error)
        taken.add_done_callback(partial(self._entered, entry, heard))

    def _entered(self, entry: Entry, heard: int, taken: Future[Answer[Any]]) -> None:
        error = taken.exception()
        if error is not None:
            self._entries.remove(entry)
            if entry.told:
                self._answering.tell(entry, "failed", told(error))
            elif not entry.orphan:
                self._outbox.put(to.Refused(entry.id, entry.term, told(error)))
            return
        answer = taken.result()
        with self._entries.lock:
            entry.answer = answer
            if entry.told:
                self._answering.made(entry, answer)
            else:
                entry.catch_up(answer)
                entry.told, entry.sent = True, len(entry.items)
                unheard = tuple(enumerate(entry.items))[heard:]
                if not entry.orphan:
                    self._outbox.put(to.Took(entry.id, entry.term, unheard))
        if entry.quiet:
            self._service.cancel(entry.id)
        answer.add_done_callback(lambda _: self._answering.over(entry, answer))
