"""What a cell of a trace may hold: a text or a JSON value becomes a checked number or text.

A kind makes the reader of one column; the reader raises WrongValue, which says what is allowed.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Collection
from datetime import date
from functools import lru_cache
from typing import Any

from neustream.workload.row import Notes

MOST_TOKENS = 2**24
MOST_STEPS = 1_000_000
MOST_PIXELS = 131_072
MOST_SECONDS = 1e11
"""Larger instants are no seconds: they would be later than the year 5138."""


class WrongValue(ValueError):
    """A cell holds what its column does not allow."""

    def __init__(self, value: Any, allowed: str) -> None:
        super().__init__(value, allowed)
        self.value = value
        self.allowed = allowed


class Skip(Exception):
    """The row is to be left out; says why."""


def shown(value: Any) -> str:
    """A value as part of a message: one line, and not longer than a message should be."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 40

# -- kinds of cells -------------------------------------------------------------------------------

Cell = Callable[[Any], Any]
"""From what a cell holds, which is never empty, to what the row gets; raises WrongValue or Skip."""
Kind = Callable[[Notes], Cell]
"""A kind of cell: makes the reader of one column of one file."""


def _number(value: Any) -> float | None:
    """The finite number that a cell holds; None if it holds another thing."""
    kind = type(value)
    if kind is str:
        if "_" in value or not value.isascii():  # float() would take both
            return None
    elif kind is not int and kind is not float:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole(least: int, most: int, *, zero: str = "") -> Kind:
    """Whole numbers, also as `50.0`; `zero` says why a row with 0 is skipped."""
    allowed = f"a whole number from {least} to {most}"

    def cell(value: Any) -> int:
        if type(value) is str and value.isdecimal() and value.isascii() and len(value) < 16:
            number = int(value)
        elif type(value) is int:
            number = value
        else:
            read = _number(value)
            if read is None or not read.is_integer():
                raise WrongValue(value, allowed)
            number = int(read)
        if number == 0 and zero:
            raise Skip(zero)
        if not least <= number <= most:
            raise WrongValue(value, allowed)
        return number

    return lambda notes: cell


def seconds(*, unit: float = 1.0, least: float = 0.0, most: float = MOST_SECONDS) -> Kind:
    """Seconds, of a cell in units of 1 / `unit` seconds (1000: milliseconds)."""
    names = {1.0: "seconds", 1e3: "milliseconds"}
    above = f"from {least:g}" if least == 0 else "above 0"
    allowed = f"{names[unit]} {above} to {most * unit:g}"

    def cell(value: Any) -> float:
        number = _number(value)
        if number is None or not least * unit <= number <= most * unit:
            raise WrongValue(value, allowed)
        return number / unit

    return lambda notes: cell


def promise(*, unit: float = 1.0) -> Kind:
    """Seconds that a request is promised: more than none."""
    return seconds(unit=unit, least=1e-9, most=1e9)


def text(notes: Notes) -> Cell:
    """A text; numbers of JSON as they are written."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise WrongValue(value, "a text")

    return cell


def ids(notes: Notes) -> Cell:
    """A list of whole numbers; in a CSV file, as JSON."""
    allowed = "a list of whole numbers, as in [1, 2]"

    def cell(value: Any) -> tuple[int, ...]:
        found = loads(value) if isinstance(value, str) else value
        if not isinstance(found, list) or not set(map(type, found)) <= {int}:
            raise WrongValue(value, allowed)
        return tuple(found)

    return cell


def value(notes: Notes) -> Cell:
    """Anything; a text that is JSON is what it says, other texts are themselves."""

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = loads(value)
        return value if found is NOT_JSON else found

    return cell


def mapping(taken: Collection[str]) -> Kind:
    """An object with names that are identifiers and not `taken`; in a CSV file, as JSON."""

    def cell(value: Any) -> dict[str, Any]:
        found = loads(value) if isinstance(value, str) else value
        if not isinstance(found, dict) or not all(name.isidentifier() for name in found):
            raise WrongValue(value, "an object of parameters by name")
        if not found.keys().isdisjoint(taken):
            name = next(name for name in found if name in taken)
            raise WrongValue(value, f"parameters that are no columns; {name!r} is one")
        return found

    return lambda notes: cell


NOT_JSON = object()


def loads(text: str) -> Any:
    """What a JSON text says; NOT_JSON if it is none (NaN and infinities are not)."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def refuse(name: str) -> None:
    """For JSON's decoder: NaN and infinities are no numbers."""
    raise ValueError(f"{name} is no number of JSON")


def finite(text: str) -> float:
    """For JSON's decoder: 1e999 is no number either."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shown(text)} is too large for a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=refuse, parse_float=finite)


# -- dates ----------------------------------------------------------------------------------------

_INSTANT = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:[.,](\d+))?\s?(Z|UTC|([+-])(\d\d):?(\d\d)?)?",
    re.ASCII,
)


def instant(notes: Notes) -> Cell:
    """Dates with a time of day, as seconds from the first of them, to the nanosecond.

    Either all have a time zone or none has, which is then read as UTC. Whole numbers, which a
    parquet file's times arrive as, are microseconds.
    """
    first: int | None = None
    aware = False
    allowed = "a date and time, as in 2023-11-16 18:17:03.9799600 or 2024-05-10T00:00:00+00:00"

    def cell(value: Any) -> float:
        nonlocal first, aware
        if type(value) is int:
            nanoseconds, zone = value * 1000, True
        else:
            match = _INSTANT.fullmatch(value.strip()) if isinstance(value, str) else None
            found = None if match is None else _nanoseconds(match)
            if match is None or found is None:
                raise WrongValue(value, allowed)
            nanoseconds, zone = found, match[6] is not None
        if first is None:
            first, aware = nanoseconds, zone
            notes.origin = str(value) if isinstance(value, str) else ""
        if zone is not aware:
            has = "with a time zone" if aware else "without a time zone"
            raise WrongValue(value, f"{has}, as in the first row")
        return (nanoseconds - first) / 1e9

    return cell


def _nanoseconds(match: re.Match[str]) -> int | None:
    day, hours, minutes, secs, fraction, _, sign, off_hours, off_minutes = match.groups()
    start = _day(day)
    if start is None or int(hours) > 23 or int(minutes) > 59 or int(secs) > 59:
        return None
    since = start * 86400 + int(hours) * 3600 + int(minutes) * 60 + int(secs)
    if sign and (int(off_hours) > 23 or int(off_minutes or 0) > 59):
        return None
    if sign:
        offset = int(off_hours) * 3600 + int(off_minutes or 0) * 60
        since -= offset if sign == "+" else -offset
    return since * 10**9 + (int(fraction[:9].ljust(9, "0")) if fraction else 0)


@lru_cache(maxsize=1024)
def _day(text: str) -> int | None:
    try:
        return date.fromisoformat(text).toordinal()
    except ValueError:
        return None
