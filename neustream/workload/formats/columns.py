"""What a format is: which column of the file becomes which field of a row, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neustream.errors import nearest
from neustream.workload.cells import Cell, Kind, Skip, WrongValue, shown
from neustream.workload.records import Fault, Records
from neustream.workload.row import Notes, Row

_PARAMS, _LINE = Row._fields.index("params"), Row._fields.index("line")

PARAM = "params."
"""Fields of this beginning are parameters of the request."""


@dataclass(frozen=True)
class Column:
    """A column of the file, the field of `Row` that it becomes, and the kind of its cells.

    `needed`: neither the column nor one of its cells may be missing.
    """

    name: str
    field: str
    kind: Kind
    needed: bool = True


def _as_they_are(columns: Sequence[Column], there: Sequence[str]) -> Sequence[Column]:
    return columns


@dataclass(frozen=True)
class Format:
    """A format of traces.

    `tells`: columns that tell it from others, where these are not just the needed ones.
    `fit`: what the columns are for a file that has those named. `strict`: whether a column that it
    does not know is an error; else it is not used. `own`: reads records in a way of its
    own, given the tokenizer's file.
    """

    name: str
    about: str
    columns: Sequence[Column]
    tells: Sequence[str] = ()
    strict: bool = False
    fit: Callable[[Sequence[Column], Sequence[str]], Sequence[Column]] = _as_they_are
    own: Callable[[Records, Notes, Path | None], Iterator[Row]] | None = None

    @property
    def needs(self) -> list[str]:
        """Columns without which a file is not of this format."""
        return [*self.tells] or [column.name for column in self.columns if column.needed]


def rows_of(form: Format, records: Records, notes: Notes, tokenizer: Path | None = None) -> Iterator[Row]:
    """The rows that the records are in this format; Fault for what is wrong, and where."""
    if form.own is not None:
        yield from form.own(records, notes, tokenizer)
        return
    there = records.columns()
    columns = form.fit(form.columns, there)
    known = [column.name for column in columns]
    if records.named:
        _check_names(form, columns, there)
        columns = [column for column in columns if column.name in there]

    def other(name: str) -> None:
        if form.strict and name:
            raise Fault(
                f"unknown column {shown(name)}; {nearest(name.removeprefix(PARAM), known)}, {PARAM}NAME", records.line
            )
        notes.unused.add(shown(name))

    table = _Table(columns, notes)
    for cells in records.take([column.name for column in columns], other):
        try:
            row = table.row(cells, records.line)
        except Skip as why:
            notes.skipped[str(why)] += 1
        except WrongValue as wrong:
            message = f"column {table.name!r} is {shown(wrong.value)}; allowed: {wrong.allowed}"
            raise Fault(message, records.line) from None
        else:
            yield row


def _check_names(form: Format, columns: Sequence[Column], there: Sequence[str]) -> None:
    for column in columns:
        if column.needed and column.name not in there:
            hint = nearest(column.name, [name[:80] for name in there if name][:60])
            raise Fault(f"format {form.name!r} needs column {column.name!r}; {hint.replace('allowed', 'the file has')}")


class _Table:
    """From cells in the order of `columns` to rows; `name` is the column that was read last."""

    def __init__(self, columns: Sequence[Column], notes: Notes) -> None:
        self.name = ""
        self._readers: list[tuple[str, int, str, Cell, bool]] = []
        for column in columns:
            param = column.field.removeprefix(PARAM) if column.field.startswith(PARAM) else ""
            at = Row._fields.index("params" if param else column.field)
            self._readers.append((column.name, at, param, column.kind(notes), column.needed))
        self._blank: list[Any] = list(Row())

    def row(self, cells: Sequence[Any], line: int) -> Row:
        """The row of these cells; WrongValue or Skip."""
        out = self._blank.copy()
        out[_LINE] = line
        params: dict[str, Any] = {}
        for (name, at, param, read, needed), cell in zip(self._readers, cells, strict=True):
            if cell is None or cell == "":
                if needed:
                    self.name = name
                    raise WrongValue(cell, "a value")
                continue
            self.name = name
            value = read(cell)
            if param:
                params[param] = value
            elif at == _PARAMS:
                params.update(value)
            elif out[at] is None:
                out[at] = value
            else:
                raise WrongValue(cell, f"one column for {Row._fields[at]}, but another was read")
        if params:
            out[_PARAMS] = params
        return Row._make(out)
