"""Arrivals from a file: CSV or JSON lines, one request a row.

Columns: `arrival_s` (needed; seconds from the start of the trace); `steps` and `slo_s` (absolute)
where the file knows them; every other column becomes a parameter of the request.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neustream.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One request of a trace file; None where the file does not say."""

    arrival: float
    steps: int | None = None
    slo_s: float | None = None
    params: dict[str, Any] = field(default_factory=dict)


def load_trace(path: Path) -> list[Row]:
    """Read a trace, in order of arrival; ConfigError names file, row and column of what is wrong."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"trace {path}: {error}") from None
    if path.suffix == ".csv":
        raw: list[Any] = list(csv.DictReader(text.splitlines()))
    elif path.suffix in (".jsonl", ".ndjson"):
        raw = [_parsed(path, at, line) for at, line in enumerate(filter(str.strip, text.splitlines()), 1)]
    else:
        raise ConfigError(f"trace {path}: unknown kind {path.suffix!r}; allowed: .csv, .jsonl, .ndjson")
    if not raw:
        raise ConfigError(f"trace {path} has no rows")
    rows = [_row(path, at, fields) for at, fields in enumerate(raw, 1)]
    for at, (earlier, later) in enumerate(itertools.pairwise(rows), 2):
        if later.arrival < earlier.arrival:
            raise ConfigError(f"trace {path}, row {at}: arrival_s goes back from {earlier.arrival} to {later.arrival}")
    return rows


def _parsed(path: Path, at: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"trace {path}, row {at}: not JSON: {error.msg}") from None


def _row(path: Path, at: int, raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise ConfigError(f"trace {path}, row {at}: expected an object, got {raw!r}")
    if None in raw:
        raise ConfigError(f"trace {path}, row {at}: more cells than columns: {raw[None]}")
    fields = dict(raw)
    if "arrival_s" not in fields:
        raise ConfigError(f"trace {path}, row {at}: no column 'arrival_s'; columns: {sorted(fields)}")
    arrival = _number(path, at, "arrival_s", fields.pop("arrival_s"), least=0.0)
    if arrival is None:
        raise ConfigError(f"trace {path}, row {at}: arrival_s is empty")
    steps = _number(path, at, "steps", fields.pop("steps", None), least=0.0)
    slo = _number(path, at, "slo_s", fields.pop("slo_s", None), least=math.ulp(0.0))
    if steps is not None and steps != int(steps):
        raise ConfigError(f"trace {path}, row {at}: steps must be a whole number, got {steps}")
    return Row(arrival, None if steps is None else int(steps), slo, {key: _typed(v) for key, v in fields.items()})


def _typed(value: Any) -> Any:
    """A CSV cell that reads as a number, as that number."""
    for kind in (int, float):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _number(path: Path, at: int, column: str, value: Any, *, least: float) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        raise ConfigError(f"trace {path}, row {at}: {column} must be a number of at least {least:g}, got {value!r}")
    return number
