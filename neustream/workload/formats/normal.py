"""Our own format, and the only one that is written here: the fields of `Row` by their names.

Promises may be in milliseconds (`slo_ms`) or in seconds (`slo_s`). A column `params.NAME` is a
parameter of the request; in JSON there is an object `params`. Any other column is an error.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from neustream.errors import ConfigError
from neustream.workload.cells import (
    MOST_PIXELS,
    MOST_STEPS,
    MOST_TOKENS,
    Kind,
    ids,
    mapping,
    promise,
    seconds,
    text,
    value,
    whole,
)
from neustream.workload.formats.columns import PARAM, Column, Format
from neustream.workload.row import Row

_FIELDS: dict[str, Kind] = {
    "arrival_s": seconds(),
    "steps": whole(0, MOST_STEPS),
    "width": whole(1, MOST_PIXELS),
    "height": whole(1, MOST_PIXELS),
    "frames": whole(1, MOST_STEPS),
    "images": whole(0, MOST_STEPS),
    "prompt_tokens": whole(1, MOST_TOKENS),
    "output_tokens": whole(1, MOST_TOKENS),
    "max_tokens": whole(1, MOST_TOKENS),
    "slo_s": promise(),
    "slo_ttft_s": promise(),
    "slo_tpot_s": promise(),
    "slo_class": text,
    "session": text,
    "model": text,
    "hash_ids": ids,
}
_OTHER_NAMES = {
    "slo_ms": "slo_s",
    "slo_total_s": "slo_s",
    "slo_total_ms": "slo_s",
    "slo_ttft_ms": "slo_ttft_s",
    "slo_tpot_ms": "slo_tpot_s",
}

COLUMNS = [Column(name, name, kind, needed=name == "arrival_s") for name, kind in _FIELDS.items()]
COLUMNS += [
    Column(name, meant, promise(unit=1e3 if name.endswith("_ms") else 1.0), needed=False)
    for name, meant in _OTHER_NAMES.items()
]


_PARAMS = Column("params", "params", mapping(_FIELDS), needed=False)


def _fit(columns: Sequence[Column], there: Sequence[str]) -> Sequence[Column]:
    """With the file's own `params.NAME`, where NAME is no column of its own."""
    params = [name.removeprefix(PARAM) for name in there if name.startswith(PARAM)]
    known = [name for name in params if name.isidentifier() and name not in _FIELDS]
    return [*columns, _PARAMS, *(Column(PARAM + name, PARAM + name, value, needed=False) for name in known)]


NEUSTREAM = Format("neustream", "our own, written in configs/README.md", COLUMNS, strict=True, fit=_fit)


# -- writing --------------------------------------------------------------------------------------

SUFFIXES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")


def write_trace(path: Path | str, rows: Sequence[Row]) -> None:
    """Write rows in the normal form: CSV or JSON lines, also gzipped, by the suffix of `path`.

    What no row says has no column; an empty text is nothing said. `line` is not written.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if any(row.arrival_s is None for row in rows):
        raise ConfigError(f"trace {path}: a row has no arrival_s; allowed: traces with arrivals")
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_csv if ".csv" in suffix else _write_lines
    if suffix.endswith(".gz"):
        with gzip.open(path, "wt", encoding="utf-8", newline="") as packed:
            write(path, packed, rows)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            write(path, file, rows)


def suffix_of(path: Path) -> str:
    """The one of `SUFFIXES` that a file to be written has; ConfigError if it has none."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise ConfigError(f"trace {path}: written as one of {', '.join(SUFFIXES)}, by the file's suffix")


def _write_lines(path: Path, file: IO[str], rows: Sequence[Row]) -> None:
    for row in rows:
        file.write(json.dumps(_said(row), ensure_ascii=False, allow_nan=False) + "\n")


def _said(row: Row) -> dict[str, Any]:
    """The fields that the row knows, by name."""
    known = {name: cell for name, cell in zip(Row._fields, row, strict=True) if name != "line"}
    return {name: cell for name, cell in known.items() if cell not in (None, "", {})}


def _write_csv(path: Path, file: IO[str], rows: Sequence[Row]) -> None:
    said = {name for row in rows for name in _said(row)}
    names = [name for name in Row._fields if name in said or name == "arrival_s"]
    out = csv.writer(file)  # its lines end in CR LF, so that cells with either are quoted
    out.writerow(names)
    for row in rows:
        cells = _said(row)
        for name in ("hash_ids", "params"):
            if name in cells:
                cells[name] = json.dumps(cells[name], allow_nan=False)
        if any("\0" in cell for cell in cells.values() if isinstance(cell, str)):
            raise ConfigError(f"trace {path}: a text holds a NUL character; allowed in JSON lines only")
        out.writerow([cells.get(name, "") for name in names])
