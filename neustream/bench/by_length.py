"""Latency against what requests ask for: tokens of a text, steps of an image."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neustream.bench.records import Record, Since
from neustream.bench.runs import Run
from neustream.errors import ConfigError

Unit = Literal["tokens", "steps"]


@dataclass(frozen=True)
class Length:
    """Requests that asked for the same: how many are done, and their mean latency in seconds."""

    length: int
    mean_s: float
    number: int


@dataclass(frozen=True)
class ByLength:
    """A mode of serving: its lengths in order, and its totals.

    Attributes:
        throughput: lengths a second of the clock.
        own_throughput: lengths by the sum of all latencies, as effective-batching's server counts;
            it knows nothing of requests that were served at the same time.
        per_unit_s: mean over requests of latency / length.
        failed: requests that are not done, and in none of these figures.
    """

    unit: Unit
    lengths: Sequence[Length]
    throughput: float
    own_throughput: float
    per_unit_s: float
    failed: int

    def csv(self) -> str:
        """Rows of a length and its mean latency, as effective-batching has them."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f"num_{self.unit}", "mean_latency"])
        writer.writerows([each.length, each.mean_s] for each in self.lengths)
        return out.getvalue()


def by_length(runs: Sequence[Run], since: Since = "scheduled") -> ByLength:
    """Of the requests of some loads, which all ask for texts or all for images.

    Raises:
        ConfigError: they do not, or none is done.
    """
    records = [record for run in runs for record in run.records]
    unit = _unit(records)
    lengths = _lengths(records, unit, since)
    if not lengths:
        raise ConfigError(f"latency by length: no request is done whose {unit} are known")
    units = sum(each.length * each.number for each in lengths)
    number = sum(each.number for each in lengths)
    seconds = sum(run.duration_s for run in runs)
    return ByLength(
        unit,
        lengths,
        units / seconds if seconds > 0 else 0.0,
        units / sum(each.mean_s * each.number for each in lengths),
        sum(each.mean_s / each.length * each.number for each in lengths) / number,
        len(records) - number,
    )


def _unit(records: Sequence[Record]) -> Unit:
    kinds = {record.kind for record in records}
    if len(kinds) != 1:
        raise ConfigError(
            "latency by length: expected texts, or images; there are both, or neither"
        )
    return "tokens" if kinds == {"text"} else "steps"


def _lengths(records: Sequence[Record], unit: Unit, since: Since) -> list[Length]:
    """The lengths of those that are done, the shortest first, with the mean of their latencies."""
    found: dict[int, list[float]] = defaultdict(list)
    for record in records:
        length, seconds = _length(record, unit), record.e2e_s(since)
        if record.done and seconds is not None and length:
            found[length].append(seconds)
    return [Length(k, sum(v) / len(v), len(v)) for k, v in sorted(found.items())]


def _length(record: Record, unit: Unit) -> int | None:
    return record.asked_tokens if unit == "tokens" else record.image.get("steps")
