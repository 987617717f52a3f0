"""One JSON array of objects, as ShareGPT's files are, without holding all of it."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from typing import IO, Any

from neustream.workload.records import DECODER, LARGEST, Fault, Objects, checked_object, open_bytes

CHUNK = 2**20
_SPACE = " \t\r\n"


class JsonArray(Objects):
    """The objects of an array, wherever their lines end."""

    def objects(self) -> Iterator[dict[str, Any]]:
        with open_bytes(self.path) as stream:
            yield from self._of(_Text(stream))

    def _of(self, text: _Text) -> Iterator[dict[str, Any]]:
        text.skip(_SPACE + "\ufeff")
        text.drop("[")
        empty = text.next() == "]"
        more = not empty
        while more:
            self.line = text.line
            yield text.object()
            more = text.next() == ","
            if more:
                text.drop(",")
                text.next()
        text.drop("]")
        if rest := text.next():
            raise Fault(f"{rest!r} after the end of the array; allowed: nothing", text.line)
        if empty:
            raise Fault("has no rows")


class _Text:
    """The file's text, a part of it at a time, and the line that its reader is at."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.line = 1
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._buffer = ""
        self._at = 0
        self._ended = False

    def _more(self) -> None:
        """Read on, and let go of what was passed; at least twice as much if nothing was."""
        try:
            chunk = self._stream.read(max(CHUNK, len(self._buffer) - self._at))
            text = self._decode(chunk, not chunk)
        except (EOFError, zlib.error, OSError) as error:
            raise Fault(f"the gzip stream is broken: {error}", self.line) from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise Fault(f"byte 0x{byte:02x} further on; allowed: UTF-8", self.line) from None
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        self._ended = not chunk

    def _go(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def skip(self, characters: str) -> None:
        """Go on to what is none of these."""
        while True:
            rest = self._buffer[self._at : self._at + 64]
            passed = len(rest) - len(rest.lstrip(characters))
            self._go(self._at + passed)
            if passed < len(rest):
                return
            if not rest:
                if self._ended:
                    return
                self._more()

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        self.skip(_SPACE)
        return self._buffer[self._at : self._at + 1]

    def drop(self, expected: str) -> None:
        """Go past a character that must be there."""
        found = self.next()
        if found != expected:
            what = repr(found) if found else "the end of the file"
            raise Fault(f"{what}; allowed: {expected!r} of an array of objects", self.line)
        self._at += 1

    def object(self) -> dict[str, Any]:
        """The object that begins here."""
        while True:
            try:
                found, end = DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if not self._ended and len(self._buffer) - self._at < LARGEST:
                    self._more()
                    continue
                message = f"not JSON: {error}; allowed: an array of objects"
                raise Fault(message, self.line) from None
            record = checked_object(found, self.line)
            self._go(end)
            return record
