"""Server-sent events, read as the standard has them, in time linear in the bytes."""

from __future__ import annotations

from typing import NamedTuple

BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """What an event says; `kind` is "" where the stream names none."""

    kind: str
    data: bytes


class Events:
    """The events of a stream whose bytes come in pieces, cut anywhere.

    Lines end with LF, CR or CRLF. Comments, ids and unknown fields are passed over. An event that
    its stream's end cuts is none.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._after_cr = False
        self._began = False
        self._kind = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end in these bytes."""
        if self._is_one(chunk):
            return [Event("", chunk[6:-2])]
        chunk = self._lf(chunk)
        if b"\n" not in chunk:
            if chunk:
                self._pieces.append(chunk)
            return []
        self._pieces.append(chunk)
        *lines, rest = b"".join(self._pieces).split(b"\n")
        self._pieces = [rest] if rest else []
        if not self._began:
            self._began = True
            lines[0] = lines[0].removeprefix(BOM)
        found: list[Event] = []
        for line in lines:
            self._line(line, found)
        return found

    def _is_one(self, chunk: bytes) -> bool:
        """Whether these bytes are one event and no more, as most servers send."""
        if not chunk.startswith(b"data: ") or not chunk.endswith(b"\n\n") or not self._began:
            return False
        open_ = self._pieces or self._data or self._kind or self._after_cr
        return not open_ and chunk.count(b"\n") == 2 and b"\r" not in chunk

    def _lf(self, chunk: bytes) -> bytes:
        """The same with lines that end with LF alone."""
        if not chunk:
            return chunk
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk

    def _line(self, line: bytes, found: list[Event]) -> None:
        if line.startswith(b"data: "):
            self._data.append(line[6:])
        elif not line:
            if self._data:
                found.append(Event(self._kind, b"\n".join(self._data)))
            self._data, self._kind = [], ""
        elif not line.startswith(b":"):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                self._data.append(value)
            elif name == b"event":
                self._kind = value.decode("utf-8", "replace")
