"""Figures of a run over its time: a point a second, by when requests ended."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Mapping

from neustream.bench.records import Record
from neustream.bench.reports.figures import LATENCIES, Figures, instant, statistics
from neustream.bench.reports.schema import (
    AllSeries,
    LatencySeries,
    Point,
    Series,
    ThroughputSeries,
)
from neustream.bench.reports.units import Units

POINTS = 3600
"""The most points of a series; a longer run has points further apart."""


def series(figures: Figures) -> AllSeries | None:
    """Latencies and rates over time; None if nothing was done."""
    done = [record for record in figures.done if record.end_s is not None]
    if not done:
        return None
    width = max(1, -(-int(figures.seconds) // POINTS))
    bins: dict[int, list[Record]] = defaultdict(list)
    for record in done:
        bins[int((record.end_s or 0.0) // width)].append(record)
    return AllSeries(
        latency=_latency(figures, bins, width), throughput=_throughput(figures, bins, width)
    )


def _latency(figures: Figures, bins: Mapping[int, list[Record]], width: int) -> LatencySeries:
    points: dict[str, list[Point]] = {name: [] for name in LATENCIES}
    for number in sorted(bins):
        for name, values in figures.latencies(bins[number]).items():
            spread = statistics(values, LATENCIES[name])
            if spread is not None:
                told = {key: getattr(spread, key) for key in ("mean", "p50", "p90", "p99")}
                points[name].append(Point(ts=_instant(figures, number, width), **told))
    return LatencySeries(
        **{
            name: Series(units=LATENCIES[name], series=found)
            for name, found in points.items()
            if found
        }
    )


def _throughput(figures: Figures, bins: Mapping[int, list[Record]], width: int) -> ThroughputSeries:
    """Rates; of a second in which nothing ended, 0."""
    measured: Mapping[str, tuple[Units, Callable[[Record], float]]] = {
        "input_token_rate": ("tokens/s", lambda each: each.input_tokens or 0),
        "output_token_rate": ("tokens/s", lambda each: each.output_tokens or 0),
        "total_token_rate": (
            "tokens/s",
            lambda each: (each.input_tokens or 0) + (each.output_tokens or 0),
        ),
        "request_rate": ("queries/s", lambda each: 1),
    }
    found = {}
    for name, (units, measure) in measured.items():
        points = [
            Point(
                ts=_instant(figures, number, width),
                value=float(sum(measure(each) for each in bins.get(number, ())) / width),
            )
            for number in range(max(bins) + 1)
        ]
        found[name] = Series(units=units, series=points)
    return ThroughputSeries.model_validate(found)


def _instant(figures: Figures, number: int, width: int) -> datetime.datetime:
    return instant(figures.run.started + number * width)
