"""The results of loads, and the folder that they lie in.

    FOLDER/runs.json             what was run: for each stage how it was made, in order
    FOLDER/stage_0.records.jsonl a record a line, by scheduled arrival, for each stage

Whoever makes summaries, reports or figures of a run puts them beside these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neustream.bench.records import Record
from neustream.errors import ConfigError, told
from neustream.workload.asks import Ask

VERSION = 1
RECORD_BYTES, DETAILS_BYTES, TOKEN_BYTES = (450, 1000), (60, 500), (15, 24)
"""The fewest and the most, of a request's record, of what `--save-detailed` says of it, and of the
instant of each token in either."""
INDEX = "runs.json"


@dataclass
class Run:
    """What came of a plan.

    Attributes:
        name: of its load; plan: `Plan.about()`; target: who served, and how requests were put.
        records: one for each request that was offered, by scheduled arrival.
        started: when, as seconds since 1970.
        duration_s: from the load's start to the end of its last request.
        interrupted: whether it was ended early; what was not due by then is in no record.
        client: of the client itself: processes, cpu_s, events, warnings.
        meta: whatever else its makers want to keep; must be JSON.
    """

    name: str
    records: list[Record]
    plan: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    duration_s: float = 0.0
    interrupted: bool = False
    client: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """All but the records."""
        return {name: value for name, value in vars(self).items() if name != "records"}


@dataclass(frozen=True)
class Size:
    """How many bytes results take: at least, and at most, as far as is known."""

    least: float
    most: float

    def times(self, number: float) -> Size:
        return Size(self.least * number, self.most * number)

    def plus(self, other: Size) -> Size:
        return Size(self.least + other.least, self.most + other.most)


def expected_size(asks: Collection[Ask], exact: bool, each: tuple[int, int] = RECORD_BYTES) -> Size:
    """Of the records (or details) of these requests, if all are done; texts left out.

    exact: whether each has as many tokens as it asks for, and not fewer.
    """
    tokens = sum(ask.output_tokens or 0 for ask in asks)
    least = each[0] * len(asks) + (TOKEN_BYTES[0] * tokens if exact else 0)
    return Size(least, each[1] * len(asks) + TOKEN_BYTES[1] * tokens)


def records_file(stage: int) -> str:
    """The name of the file with the records of a stage (from 0)."""
    return f"stage_{stage}.records.jsonl"


def write_runs(
    folder: Path, runs: Sequence[Run], write: Callable[[Path, str], None], **about: Any
) -> list[Path]:
    """Write the runs of a benchmark, its stages in order, and what it was (`about`, JSON).

    `write` puts a text into a file (`neustream.commands.outputs.write_text`).
    """
    paths = []
    for stage, run in enumerate(runs):
        lines = (json.dumps(each.to_dict(), allow_nan=False) + "\n" for each in run.records)
        write(path := folder / records_file(stage), "".join(lines))
        paths.append(path)
    content = {"version": VERSION, **about, "stages": [run.about() for run in runs]}
    write(path := folder / INDEX, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return [path, *paths]


def read_runs(folder: Path) -> tuple[list[Run], Mapping[str, Any]]:
    """The runs of a folder, in order, and what else was said of them.

    Raises:
        ConfigError: it names the file and what is wrong with it.
    """
    content = _json(folder / INDEX, _text(folder / INDEX))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ConfigError(f"{folder / INDEX}: not results of a benchmark, version {VERSION}")
    try:
        stages = [Run(**stage, records=[]) for stage in content["stages"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / INDEX}: {told(error)}") from None
    for number, run in enumerate(stages):
        run.records = _records(folder / records_file(number))
    return stages, {key: value for key, value in content.items() if key != "stages"}


def _records(path: Path) -> list[Record]:
    found = []
    for number, line in enumerate(_text(path).removesuffix("\n").split("\n"), 1):
        if not line:
            continue
        try:
            found.append(Record.from_dict(_json(path, line)))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: no record: {told(error)}") from None
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {told(error)}") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON: {told(error)}") from None
