"""What an instance reports of its requests: their outputs, and how they ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neustream.backends.ray.entries import Entries, Entry
from neustream.backends.ray.outbox import Outbox
from neustream.backends.ray.wire import News, value_as_bytes
from neustream.cluster import messages as to
from neustream.engine.answers import Result
from neustream.errors import RequestError, told
from neustream.service.answer import Answer


class Answering:
    """Reports outputs and ends; on whatever thread."""

    def __init__(self, entries: Entries, outbox: Outbox) -> None:
        self._entries = entries
        self._outbox = outbox

    def made(self, entry: Entry, answer: Answer[Any]) -> None:
        """Report what a request put out since. Under the lock of the entries."""
        entry.catch_up(answer)
        if not entry.told or entry.quiet or entry.orphan:
            return
        for index in range(entry.sent, len(entry.items)):
            self._outbox.put(to.Made(entry.id, entry.term, index, entry.items[index]))
        entry.sent = len(entry.items)

    def over(self, entry: Entry, answer: Answer[Any]) -> None:
        """A request ended here, or left."""
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, RequestError) and error.code == "moved":
            return
        value = b"" if answer.cancelled() else value_as_bytes(entry.id, None if error else answer.result(), error)
        with self._entries.lock:
            self.made(entry, answer)
            if entry.quiet:
                self._entries.remove(entry)
            elif answer.cancelled():
                self._cancelled(entry, answer.ended)
            else:
                self._ended(entry, error, value, answer.ended)

    def _ended(self, entry: Entry, error: BaseException | None, value: bytes, result: Result | None) -> None:
        if result is None:  # the engine did not take it
            self._entries.remove(entry)
            if not entry.orphan:
                self._outbox.put(to.Refused(entry.id, entry.term, told(error or RequestError(""))), value)
            return
        status = "failed" if error is not None and result.status == "done" else result.status
        self.tell(entry, status, result.reason, value, result)

    def _cancelled(self, entry: Entry, result: Result | None) -> None:
        """Its answer was cancelled; `result`: how it ended, if the engine had taken it."""
        if result is None:
            self.tell(entry, "cancelled", "cancelled by the caller")
            return
        status = "failed" if result.status == "done" else result.status
        self.tell(entry, status, result.reason, result=result)

    def tell(self, entry: Entry, status: Any, reason: str, value: bytes = b"", result: Result | None = None) -> None:
        """Report how a request ended. One whose head is gone keeps that for the next."""
        attainable = result is None or result.code != "unattainable"
        count, waited_s = len(entry.items), None if result is None else result.waited_s
        over = to.Over(entry.id, entry.term, status, reason, None, count, waited_s, attainable)
        with self._entries.lock:
            if entry.orphan:
                entry.over = News(over, value)
                return
            self._outbox.put(over, value, ended=entry)
            self._entries.remove(entry)

    def again(self, entry: Entry) -> None:
        """The next head wants a request: all of it is reported, from its start. Under the lock."""
        id, term = entry.id, entry.term
        entry.told, entry.sent, entry.heard = True, 0, 0
        self._outbox.put(to.Took(id, term))
        if entry.began:
            self._outbox.put(to.Began(id, term))
        if entry.answer is not None:
            self.made(entry, entry.answer)
        if entry.over is not None:
            assert isinstance(entry.over.report, to.Over)
            self._outbox.put(replace(entry.over.report, term=term), entry.over.value, ended=entry)
            self._entries.remove(entry)
