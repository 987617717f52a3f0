"""The records of a trace file, one after the other: CSV, JSON, `Request(...)` lines or parquet.

Which of these a file is shows in its first bytes, whatever it is called; gzip too. Reading holds
one record at a time. Errors name the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from neustream.workload.cells import WrongValue, finite, refuse, shown
from neustream.workload.requestlines import Lines

LARGEST = 2**24
"""Bytes of the longest record: what a file without line ends may cost."""

HEAD = 4096
GZIP = b"\x1f\x8b"
PACKED = {b"PK": "zip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc": "7z"}
WIDE = (b"\xff\xfe", b"\xfe\xff")


class Fault(Exception):
    """What is wrong with a file, at `line` (0: as a whole)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class Records(Protocol):
    """The records of one kind of file."""

    unit: str
    """What records are numbered by: "line" or "row"."""
    line: int
    """Where the latest record began, from 1."""
    named: bool
    """Whether columns are known before the records: they are all there, or not."""

    def columns(self) -> list[str]:
        """The names of the columns; of files whose records name their own, those of the first."""
        ...

    def take(self, names: Sequence[str], other: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        """The cells named, None where there is none; `other` is told each further column once."""
        ...


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's content, unpacked where it is gzipped; Fault if there is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Fault("not a file")
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Fault(getattr(error, "strerror", None) or str(error)) from None
    if stream.peek(2)[:2] != GZIP:
        return stream
    stream.close()
    return io.BufferedReader(gzip.GzipFile(path), 2**16)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers and ends; U+2028 and their like end none."""
    number = 0
    with open_bytes(path) as stream:
        while True:
            try:
                raw = stream.readline(LARGEST)
            except (EOFError, zlib.error, OSError) as error:
                raise Fault(f"the gzip stream is broken: {error}", number + 1) from None
            if not raw:
                return
            number += 1
            if len(raw) == LARGEST:
                raise Fault(f"longer than {LARGEST:,} bytes; allowed: records of up to that", number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise Fault(f"byte 0x{byte:02x} at {error.start}; allowed: UTF-8", number) from None
            if "\0" in line:
                raise Fault("a NUL character; allowed: text", number)
            yield number, line


def open_records(path: Path) -> Records:
    """The records of a file, by its first bytes."""
    try:
        with open_bytes(path) as stream:
            head = stream.read(HEAD)
    except (EOFError, zlib.error, OSError) as error:
        raise Fault(f"the gzip stream is broken: {error}") from None
    if len(head) < HEAD and not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise Fault("has no rows")
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise Fault(f"packed with {name}; allowed: gzip, or unpacked")
    if head.startswith(GZIP):
        raise Fault("gzipped twice; allowed: once")
    if head.startswith(WIDE):
        raise Fault("encoded as UTF-16 or UTF-32; allowed: UTF-8")
    if head.startswith(b"PAR1"):
        from neustream.workload.parquet import Parquet

        return Parquet(path)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"Request("):
        return RequestLines(path)
    if start.startswith(b"["):
        from neustream.workload.jsonarray import JsonArray

        return JsonArray(path)
    return JsonLines(path) if start.startswith(b"{") else CsvFile(path)


_CSV = "commas, cells with commas in double quotes, lines that end in LF or CRLF"


class CsvFile:
    """A header and rows of as many cells, by RFC 4180; rows without any content are passed over."""

    unit = "line"
    named = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def _records(self) -> Iterator[list[str]]:
        """Cells of the header and of each row; `line` is where they begin."""
        source = lines(self.path)
        reader = csv.reader((line for _, line in source), strict=True)
        while True:
            self.line = reader.line_num + 1
            try:
                with _CELLS:
                    cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise Fault(f"not CSV: {error}; allowed: {_CSV}", self.line) from None
            if any(cells) and not (len(cells) == 1 and cells[0].isspace()):
                yield cells

    def columns(self) -> list[str]:
        return checked_names(next(self._records(), []), self.line)

    def take(self, names: Sequence[str], other: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        header = self.columns()
        for name in header:
            if name and name not in names:
                other(name)
        width = len(header)
        pick = _picker([header.index(name) if name in header else width for name in names])
        records = self._records()
        next(records)
        for cells in records:
            if len(cells) != width:
                many = "more" if len(cells) > width else "fewer"
                raise Fault(
                    f"{len(cells)} cells, {many} than columns: {shown(cells)}; allowed: {width}",
                    self.line,
                )
            cells.append("")  # what columns hold that are not there
            yield pick(cells)


def checked_names(names: list[str], line: int = 0) -> list[str]:
    """The names of columns, if none is there twice."""
    for name, count in Counter(names).items():
        if name and count > 1:
            raise Fault(f"column {shown(name)} is there {count} times; allowed: once", line)
    return names


def _picker(places: Sequence[int]) -> Callable[[list[str]], Sequence[str]]:
    if len(places) < 2:  # itemgetter would give the cell itself
        return lambda cells: [cells[place] for place in places]
    return itemgetter(*places)


class _Cells:
    """Cells of any length: `csv` has one limit for the whole process, which is put back at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = csv.field_size_limit(max(LARGEST, csv.field_size_limit()))

    def __exit__(self, *exc: object) -> None:
        csv.field_size_limit(self._before)
        self._lock.release()


_CELLS = _Cells()


class Objects:
    """Records that name their own columns; subclasses say where they come from."""

    unit = "line"
    named = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def objects(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def columns(self) -> list[str]:
        return list(next(self.objects(), {}))

    def take(self, names: Sequence[str], other: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        known = set(names)
        for record in self.objects():
            if not record.keys() <= known:
                for name in record.keys() - known:
                    other(name)
                known |= record.keys()
            yield [record.get(name) for name in names]


class JsonLines(Objects):
    """One JSON object a line."""

    def objects(self) -> Iterator[dict[str, Any]]:
        for number, line in lines(self.path):
            self.line = number
            if not line.isspace():
                yield as_object(line, number)


class RequestLines(Objects):
    """`Request(name=value, ...)` a line, as vLLM-Omni's traces have them."""

    def objects(self) -> Iterator[dict[str, Any]]:
        read = Lines()
        for number, line in lines(self.path):
            self.line = number
            try:
                if not line.isspace():
                    yield read.parse(line.strip())
            except WrongValue as wrong:
                raise Fault(f"{shown(wrong.value)}; allowed: {wrong.allowed}", number) from None


def as_object(line: str, number: int) -> dict[str, Any]:
    """The JSON object in a line; Fault for what is another thing or none at all."""
    try:
        found = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise Fault(f"not JSON: {error}: {shown(line)}; allowed: one object a line", number) from None
    return checked_object(found, number)


def checked_object(found: Any, number: int) -> dict[str, Any]:
    """What JSON says, if that is an object."""
    if not isinstance(found, dict):
        raise Fault(f"{shown(found)}; allowed: an object with columns as its keys", number)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shown(twice)} is there twice")
    return out


DECODER = json.JSONDecoder(parse_constant=refuse, parse_float=finite, object_pairs_hook=_once)
