"""A trace file as rows, and the part of it that a workload takes.

Nothing is held but what is taken: the file is read one record at a time, and no further than it
must be.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from neustream.errors import ConfigError
from neustream.workload.formats import Format, choose, rows_of
from neustream.workload.records import Fault, open_records
from neustream.workload.row import Notes, Row


@dataclass(frozen=True)
class Trace:
    """A trace file, of a format by name or "auto": told by the file's content.

    `tokenizer`: a tokenizer.json, for texts without lengths (ShareGPT).
    """

    path: Path | str
    format: str = "auto"
    tokenizer: Path | str | None = None

    def known_format(self) -> Format:
        """The format that the file is of; ConfigError if it is of none."""
        with _Complaints(Path(self.path)):
            return choose(open_records(Path(self.path)), self.format)

    def unit(self) -> str:
        """What the file's rows are numbered by: "line" or "row"."""
        with _Complaints(Path(self.path)):
            return open_records(Path(self.path)).unit

    def rows(self, notes: Notes | None = None) -> Iterator[Row]:
        """All rows, as the file has them.

        Raises:
            ConfigError: it names file, line, column, value and what is allowed.
        """
        notes = Notes() if notes is None else notes
        with _Complaints(Path(self.path)) as complaints:
            records = open_records(Path(self.path))
            complaints.unit = records.unit
            form = choose(records, self.format)
            yield from rows_of(form, records, notes, None if self.tokenizer is None else Path(self.tokenizer))


class _Complaints:
    """Makes errors of faults."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.unit = "line"

    def __enter__(self) -> _Complaints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Fault):
            where = f", {self.unit} {error.line}" if error.line else ""
            message = " ".join(str(error).splitlines())  # other libraries' errors may have several
            raise ConfigError(f"trace {self._path}{where}: {message}") from None


@dataclass(frozen=True)
class Window:
    """Which part of a trace is taken, and how fast it is replayed.

    `start_s` and `duration_s` are seconds of the file, from its first arrival; `requests` the most
    rows; `speed` 2 makes arrivals come twice as fast.
    """

    start_s: float = 0.0
    duration_s: float | None = None
    requests: int | None = None
    speed: float = 1.0

    @property
    def end_s(self) -> float:
        return math.inf if self.duration_s is None else self.start_s + self.duration_s


ALL = Window()


@dataclass(frozen=True)
class Taken:
    """The rows that a window takes, by arrival, the first at 0.

    `timed`: whether the trace has arrivals; if it has none, rows are in its order.
    """

    rows: list[Row]
    notes: Notes
    timed: bool


def take(trace: Trace, window: Window = ALL) -> Taken:
    """The rows of the window, in order of arrival.

    Reading ends with the first row behind the window (or with its last row, where `requests` counts
    them), as long as arrivals have not gone back so far. If they have, the whole file is read, and
    the rows are sorted; rows of one instant stay in the file's order. So a file counts as sorted if
    it is up to the end of the window.
    """
    notes = Notes()
    first = next(trace.rows(notes), None)
    if first is None:
        skipped = "; ".join(notes.lines())
        raise ConfigError(f"trace {trace.path} has no rows" + (f" ({skipped})" if skipped else ""))
    if first.arrival_s is None:
        return _untimed(trace, window)
    notes = Notes()
    rows = _in_order(trace, window, first.arrival_s, notes)
    if rows is None:
        notes = Notes()
        rows = _sorted(trace, window, notes)
    if not rows:
        raise ConfigError(_none_in(trace, window))
    start = rows[0][0]
    return Taken([Row((at - start) / window.speed, *row[1:]) for at, row in rows], notes, timed=True)


def _untimed(trace: Trace, window: Window) -> Taken:
    if replace(window, requests=None) != ALL:
        raise ConfigError(f"trace {trace.path} has no arrivals: start_s, duration_s and speed do not go with it")
    notes = Notes()
    rows = list(itertools.islice(trace.rows(notes), window.requests))
    for row in rows:
        if row.arrival_s is not None:
            raise ConfigError(f"trace {trace.path}, line {row.line}: an arrival; allowed: one in each row, or in none")
    return Taken(rows, notes, timed=False)


def _timed(trace: Trace, notes: Notes) -> Iterator[tuple[float, Row]]:
    for row in trace.rows(notes):
        if row.arrival_s is None:
            raise ConfigError(f"trace {trace.path}, line {row.line}: no arrival; allowed: one in each row, or in none")
        yield row.arrival_s, row


def _in_order(trace: Trace, window: Window, start: float, notes: Notes) -> list[tuple[float, Row]] | None:
    """The window of a file whose arrivals do not go back; None as soon as they do."""
    rows: list[tuple[float, Row]] = []
    latest = start
    for arrival, row in _timed(trace, notes):
        if arrival < latest:
            return None
        latest = arrival
        if arrival - start >= window.end_s:
            break
        if arrival - start >= window.start_s:
            rows.append((arrival, row))
            if len(rows) == window.requests:
                break
    return rows


def _sorted(trace: Trace, window: Window, notes: Notes) -> list[tuple[float, Row]]:
    """The window of a file in any order, read twice: for its first arrival, then for the rows."""
    start = min(arrival for arrival, _ in _timed(trace, Notes()))

    def inside() -> Iterator[tuple[float, Row]]:
        latest = start
        for arrival, row in _timed(trace, notes):
            notes.disordered += arrival < latest
            latest = max(latest, arrival)
            if window.start_s <= arrival - start < window.end_s:
                yield arrival, row

    if window.requests is None:
        return sorted(inside(), key=itemgetter(0))
    return heapq.nsmallest(window.requests, inside(), key=itemgetter(0))


def _none_in(trace: Trace, window: Window) -> str:
    first, last = math.inf, -math.inf
    for arrival, _ in _timed(trace, Notes()):
        first, last = min(first, arrival), max(last, arrival)
    return (
        f"trace {trace.path} has no rows from start_s {window.start_s:g} to {window.end_s:g}; "
        f"its arrivals span {last - first:g} s"
    )
