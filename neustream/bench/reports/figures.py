"""Figures of records: what reports, lifecycle files and other tools' results have in common."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from neustream.bench.records import Record, Since
from neustream.bench.reports.schema import Statistics
from neustream.bench.reports.units import Units
from neustream.bench.runs import Run

PERCENTILES: Mapping[str, float] = {
    "p0p1": 0.1,
    "p1": 1,
    "p5": 5,
    "p10": 10,
    "p25": 25,
    "p50": 50,
    "p75": 75,
    "p90": 90,
    "p95": 95,
    "p99": 99,
    "p99p9": 99.9,
}
"""Names that reports have for percentiles."""


def statistics(values: Iterable[float | None], units: Units) -> Statistics | None:
    """Of values that are known and finite; None if there are none."""
    known = np.array([value for value in values if value is not None and math.isfinite(value)])
    if not len(known):
        return None
    ranks = np.percentile(known, list(PERCENTILES.values()))
    return Statistics(
        units=units,
        mean=float(known.mean()),
        stddev=float(known.std()),
        min=float(known.min()),
        max=float(known.max()),
        **dict(zip(PERCENTILES, map(float, ranks), strict=True)),
    )


def only_mean(value: float, units: Units) -> Statistics:
    """Of a figure of the whole run."""
    return Statistics(units=units, mean=value)


def instant(seconds: float) -> datetime.datetime:
    """Seconds since 1970 with their zone."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)


@dataclass(frozen=True)
class Figures:
    """A run, by what reports tell of it.

    Attributes:
        since: what latencies count from: the scheduled arrival, or when a request was sent.
    """

    run: Run
    since: Since = "scheduled"

    @property
    def done(self) -> list[Record]:
        return [record for record in self.run.records if record.done]

    @property
    def incomplete(self) -> int:
        """Requests that were under way when the run was interrupted."""
        return sum(record.outcome == "interrupted" for record in self.run.records)

    @property
    def failures(self) -> dict[str, int]:
        """How many requests came to which end, of those that are not done."""
        found: dict[str, int] = {}
        for record in self.run.records:
            if not record.done:
                found[record.outcome] = found.get(record.outcome, 0) + 1
        return dict(sorted(found.items()))

    @property
    def seconds(self) -> float:
        """From the load's start to its last request's end."""
        return self.run.duration_s

    def rate(self, number: float) -> float:
        """By the second; 0 of a run that took no time."""
        return number / self.seconds if self.seconds > 0 else 0.0

    @property
    def input_tokens(self) -> int:
        return sum(record.input_tokens or 0 for record in self.done)

    @property
    def output_tokens(self) -> int:
        return sum(record.output_tokens or 0 for record in self.done)

    def latencies(self, records: Sequence[Record] | None = None) -> dict[str, list[float | None]]:
        """Seconds of requests that are done, by the names of reports; ITL is of all their gaps."""
        done = self.done if records is None else records
        return {
            "time_to_first_token": [each.ttft_s(self.since) for each in done],
            "normalized_time_per_output_token": [each.ntpot_s(self.since) for each in done],
            "time_per_output_token": [each.tpot_s for each in done],
            "inter_token_latency": [gap for each in done for gap in each.itls_s],
            "request_latency": [each.e2e_s(self.since) for each in done],
        }


LATENCIES: Mapping[str, Units] = {
    "time_to_first_token": "s",
    "normalized_time_per_output_token": "s/token",
    "time_per_output_token": "s/token",
    "inter_token_latency": "s/token",
    "request_latency": "s",
}
"""Latencies of a report, and their units."""
