"""What a server's answer says of a request: its tokens, its images, its failure.

Who reads the bytes tells a `Hearing` of them as they come; nothing here does any I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neustream.bench.events import Event, Events
from neustream.bench.hearing import (
    Counter,
    count_tokens,
    fail,
    judge_length,
    number,
    object_of,
    told_error,
)
from neustream.bench.records import Outcome, Record
from neustream.errors import cut

DONE = b"[DONE]"
AT_ONCE = 32
"""Pieces of a stream that are read at once: each takes less then, the next is stamped sooner."""
MOST_ERROR = 65_536
"""Bytes that are kept of an answer that is an error."""
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
"""Where a chat's delta may have text."""


class ErrorBody:
    """An answer with a status that is no success."""

    text = ""

    def __init__(self, record: Record, reason: str) -> None:
        self._record = record
        self._reason = reason
        self._body = b""

    def feed(self, at: float, chunk: bytes) -> None:
        self._record.received_bytes += len(chunk)
        self._body += chunk[: MOST_ERROR - len(self._body)]

    def end(self, at: float, *, whole: bool) -> None:
        record = self._record
        record.end_s = at
        said = object_of(self._body)
        if said is not None:
            told_error(record, said)
        fail(record, "status", record.error or f"status {record.status} {self._reason}".strip())


class NoStream:
    """An answer that is no stream where one was asked for: nothing of it is read."""

    text = ""

    def __init__(self, record: Record, error: str) -> None:
        self._record = record
        fail(record, "not_a_stream", error)

    def feed(self, at: float, chunk: bytes) -> None:
        self._record.received_bytes += len(chunk)

    def end(self, at: float, *, whole: bool) -> None:
        self._record.end_s = at


class TextStream:
    """A streamed text.

    A chunk with choices is a token. Two kinds of chunks without text may be none: the first of a
    chat, which says who speaks, and the last, which says why it ended. Each counts if the number
    of tokens that the server tells shows that it was one.
    """

    def __init__(self, record: Record, *, exact: bool, count: Counter | None, keep: bool) -> None:
        self._record = record
        self._exact = exact
        self._count = count
        self._keep = keep
        self._events = Events()
        self._unread: list[tuple[float, bytes]] = []
        self._pieces: list[str] = []
        self._over = False
        self._first: float | None = None
        self._last: float | None = None
        self._usage: Mapping[str, Any] = {}

    @property
    def text(self) -> str:
        """What was generated so far."""
        return "".join(self._pieces)

    def feed(self, at: float, chunk: bytes) -> None:
        self._unread.append((at, chunk))
        if len(self._unread) >= AT_ONCE:
            self._read()

    def _read(self) -> None:
        for at, chunk in self._unread:
            self._record.received_bytes += len(chunk)
            for event in self._events.feed(chunk):
                if not self._over:
                    self._event(at, event)
        self._unread.clear()

    def _event(self, at: float, event: Event) -> None:
        if event.data == DONE:
            self._over = True
            return
        said = object_of(event.data)
        if said is None:
            what = cut(event.data.decode("utf-8", "replace"), 100)
            fail(self._record, "invalid_json", f"no JSON object: {what}")
            return
        if event.kind == "error" or said.get("error") is not None:
            told_error(self._record, said)
            fail(self._record, "error_event", self._record.error or "an error without a message")
            return
        usage = said.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        choices = said.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    self._choice(at, choice)

    def _choice(self, at: float, choice: Mapping[str, Any]) -> None:
        """Note when a piece came. One without a text may be the first token, or the last."""
        piece, reason = _piece(choice), choice.get("finish_reason")
        if reason:
            self._record.finish_reason = str(reason)
        if piece:
            self._pieces.append(piece)
            self._record.token_times_s.append(at)
        elif reason:
            self._last = at
        elif _speaks(choice) and not self._record.token_times_s:
            self._first = at
        else:
            self._record.token_times_s.append(at)

    def end(self, at: float, *, whole: bool) -> None:
        record = self._record
        record.end_s = at
        self._read()
        self._count_tokens()
        if not self._over and not record.finish_reason:
            how = "ended" if whole else "was cut"
            fail(record, "cut", f"the stream {how} without [DONE] or a finish_reason")
        if not record.token_times_s:
            fail(record, "no_token", "the stream had no token")
        judge_length(record, self._exact)

    def _count_tokens(self) -> None:
        record = self._record
        told = number(self._usage.get("completion_tokens"))
        if told is not None:
            if self._last is not None and len(record.token_times_s) < told:
                record.token_times_s.append(self._last)
            if self._first is not None and len(record.token_times_s) + 1 == told:
                record.token_times_s.insert(0, self._first)
        count_tokens(record, self._usage, self.text, self._count)
        if self._keep:
            record.text = self.text


def _piece(choice: Mapping[str, Any]) -> str:
    """What an event adds to the text; a blank for calls of tools, which take tokens."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        piece = choice.get("text")
    else:
        piece = next((delta[name] for name in TEXTS if delta.get(name)), None)
        if not piece and delta.get("tool_calls"):
            piece = " "
    return piece if isinstance(piece, str) else ""


def _whole_text(choice: Mapping[str, Any]) -> str:
    """The text of a choice that comes in one piece, with the thoughts before it."""
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    parts = (thoughts, message.get("content"), message.get("refusal"))
    text = "".join(part for part in parts if isinstance(part, str))
    return text or (" " if message.get("tool_calls") else "")


def _speaks(choice: Mapping[str, Any]) -> bool:
    """Whether an event says who speaks, as the first of a chat does."""
    delta = choice.get("delta")
    return isinstance(delta, dict) and "role" in delta and not delta.get("tool_calls")


class Whole:
    """An answer that comes as one piece of JSON: a text that is not streamed, or images."""

    def __init__(self, record: Record, *, exact: bool, count: Counter | None, keep: bool) -> None:
        self._record = record
        self._exact = exact
        self._count = count
        self._keep = keep
        self._chunks: list[bytes] = []
        self._text = ""

    @property
    def text(self) -> str:
        """What was generated."""
        return self._text

    def feed(self, at: float, chunk: bytes) -> None:
        self._record.received_bytes += len(chunk)
        self._chunks.append(chunk)

    def end(self, at: float, *, whole: bool) -> None:
        record = self._record
        record.end_s = at
        if not whole:
            fail(record, "cut", "the answer was cut")
            return
        said = object_of(b"".join(self._chunks))
        if said is None:
            fail(record, "invalid_json", "the answer is no JSON object")
        elif said.get("error") is not None:
            told_error(record, said)
            fail(record, "error_event", record.error or "an error without a message")
        elif record.kind == "image":
            self._images(said)
        elif isinstance(said.get("completion"), str):
            self._inference(at, said["completion"])
        else:
            self._texts(at, said)

    def _images(self, said: Mapping[str, Any]) -> None:
        data = said.get("data")
        found = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        self._record.images = sum(bool(one.get("b64_json") or one.get("url")) for one in found)
        usage = said.get("usage")
        count_tokens(self._record, usage if isinstance(usage, dict) else {}, "", None)
        if not self._record.images:
            fail(self._record, "no_token", "the answer had no image")
        elif self._record.images < self._record.image.get("number", 1):
            fail(self._record, "short", f"{self._record.images} images")

    def _inference(self, at: float, completion: str) -> None:
        """Of effective-batching: the prompt with the text behind it."""
        record = self._record
        self._text = completion
        record.output_tokens, record.counted_by = record.asked_tokens, "asked"
        record.token_times_s.append(at)
        if self._keep:
            record.text = completion

    def _texts(self, at: float, said: Mapping[str, Any]) -> None:
        record = self._record
        choices = said.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._text += _whole_text(choice)
                record.finish_reason = str(choice.get("finish_reason") or record.finish_reason)
        usage = said.get("usage")
        count_tokens(record, usage if isinstance(usage, dict) else {}, self.text, self._count)
        if self._keep:
            record.text = self.text
        if not self.text and not record.output_tokens:
            fail(record, "no_token", "the answer had no token")
            return
        record.token_times_s.append(at)
        judge_length(record, self._exact)


class ImageStream:
    """Images that are streamed: previews are passed over, completed ones count."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._events = Events()

    @property
    def text(self) -> str:
        """There is none."""
        return ""

    def feed(self, at: float, chunk: bytes) -> None:
        self._record.received_bytes += len(chunk)
        for event in self._events.feed(chunk):
            said = {} if event.data == DONE else object_of(event.data)
            if said is None:
                fail(self._record, "invalid_json", "an event that is no JSON object")
            elif event.kind == "error" or said.get("error") is not None:
                told_error(self._record, said)
                fail(
                    self._record, "error_event", self._record.error or "an error without a message"
                )
            elif str(said.get("type") or event.kind).endswith(".completed"):
                self._record.images += bool(said.get("b64_json"))

    def end(self, at: float, *, whole: bool) -> None:
        self._record.end_s = at
        if not self._record.images:
            kind: Outcome = "no_token" if whole else "cut"
            fail(self._record, kind, "the stream had no image")
