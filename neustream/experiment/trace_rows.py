"""The rows that a config's workload takes from its trace, and what they lack or bring idly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neustream.config.fields import MOST_REQUESTS, dropped
from neustream.config.workload import Workload
from neustream.errors import ConfigError, nearest
from neustream.workload import Row, Taken, Trace, Window, take

SIZES = ("width", "height", "frames", "images")
TOKENS = ("prompt_tokens", "output_tokens", "max_tokens")
ALWAYS = ("arrival_s", "params", "line")


@dataclass(frozen=True)
class Rows:
    """The rows of a workload, empty ones where it has no trace; `notes` are for the user."""

    load: Workload
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def where(self, at: int) -> str:
        """The row's place in the trace, or the request's number."""
        if self.load.trace is None:
            return f"request {at}"
        return f"trace {self.load.trace}, {Trace(self.load.trace).unit()} {self.rows[at].line}"

    def need(self, column: str, key: str, *, example: int) -> None:
        """ConfigError if rows of a trace lack the column and the workload does not say `key` instead."""
        if self.load.trace is None or key in self.load.model_fields_set:
            return
        for at, row in enumerate(self.rows):
            if getattr(row, column) is None:
                raise ConfigError(
                    f"{self.where(at)}: no {column}, which this config's stages ask for; "
                    f"give workload.{key} for rows without it, as in {key}: {example}"
                )

    def sizes(self, row: Row) -> dict[str, Any]:
        """The sizes that the row says, as parameters of a request."""
        return {name: getattr(row, name) for name in SIZES if getattr(row, name) is not None}


def rows_of(load: Workload, unused: Sequence[str], notes_on: Callable[[Sequence[Row]], list[str]]) -> Rows:
    """The rows that the workload takes, by arrival.

    Args:
        unused: fields of rows that change nothing, which is noted if they are there.
        notes_on: what else is to be noted of the rows.
    """
    if load.trace is None:
        return Rows(load, [Row()] * load.requests)
    limit = load.requests if "requests" in load.model_fields_set else None
    window = Window(load.start_s, load.duration_s, limit or MOST_REQUESTS + 1, load.speed)
    taken = take(Trace(load.trace, load.format, load.tokenizer), window)
    _check_arrivals(load, taken)
    if len(taken.rows) > MOST_REQUESTS:
        raise ConfigError(
            f"trace {load.trace}: more than {MOST_REQUESTS:,} rows; take fewer by workload.requests or duration_s"
        )
    if limit is not None and len(taken.rows) < limit:
        raise ConfigError(
            f"workload.requests is {limit}, but {load.trace} has {len(taken.rows)} rows to take; "
            "for all of them drop it: --set workload.requests=null"
        )
    rows = _chosen(load, taken.rows)
    notes = [*taken.notes.lines(), *_idle(rows, unused), *notes_on(rows)]
    return Rows(load, rows, [f"trace {load.trace}: {note}" for note in notes])


def _check_arrivals(load: Workload, taken: Taken) -> None:
    if taken.timed and load.arrivals != "trace":
        idle = [key for key in ("arrivals", "rate", "load", "cv", "burst") if key in load.model_fields_set]
        hint = dropped(*(f"workload.{key}" for key in idle))
        raise ConfigError(f"trace {load.trace} brings its arrivals: {', '.join(idle)} do not go with it; {hint}")
    if not taken.timed and load.arrivals == "trace":
        raise ConfigError(
            f"trace {load.trace} has no arrivals: draw them, by workload.arrivals (gamma or constant) and workload.rate"
        )


def _chosen(load: Workload, rows: list[Row]) -> list[Row]:
    """The rows with nothing but the columns that the workload uses."""
    if load.columns is None:
        return rows
    fields = [name for name in Row._fields if name not in ALWAYS]
    params = {f"params.{name}" for row in rows for name in row.params}
    for name in load.columns:
        if name not in fields and name not in params:
            raise ConfigError(f"workload.columns: {name!r} is not in {load.trace}; {nearest(name, [*fields, *params])}")
    blank: dict[str, Any] = {name: None for name in fields if name not in load.columns}
    kept = {name for name in params if name in load.columns}
    return [
        row._replace(**blank, params={name: value for name, value in row.params.items() if f"params.{name}" in kept})
        for row in rows
    ]


def _idle(rows: Sequence[Row], unused: Sequence[str]) -> list[str]:
    """What rows say that changes nothing here."""
    names = ["session", "model", "hash_ids", *unused]
    idle = [name for name in names if any(getattr(row, name) is not None for row in rows)]
    return [f"not used by this config: {', '.join(idle)}"] if idle else []
