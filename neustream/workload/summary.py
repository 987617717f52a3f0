"""What a trace holds, in numbers: rows, span, rate, burstiness, lengths.

Of each row its arrival is held, and of numbers how often each came.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neustream.errors import ConfigError
from neustream.workload.row import Notes
from neustream.workload.trace import Trace

COUNTED = (
    "steps",
    "width",
    "height",
    "frames",
    "images",
    "prompt_tokens",
    "output_tokens",
    "max_tokens",
    "slo_s",
    "slo_ttft_s",
    "slo_tpot_s",
)
NAMED = ("slo_class", "session", "model")
QUANTILES = (0, 50, 90, 99, 100)
BINS, SHAPE = 60, 16


@dataclass(frozen=True)
class Summary:
    """The numbers; times in seconds. `origin`: the first arrival, where arrivals are dates.

    `rate` is of the gaps between arrivals, `cv` their coefficient of variation (1: Poisson;
    burstiness is `1 / cv**2`); None where there are too few. `per_bin` are arrivals in each of `BINS`
    equal parts of the span. `numbers` has for each field that rows have: how many do, mean,
    percentiles, and in `shape` how many are in each of `SHAPE` equal parts from the least to the
    99th percentile; `names` how many different ones of a text there are.
    """

    path: str
    format: str
    rows: int
    span_s: float | None
    rate: float | None
    cv: float | None
    origin: str
    per_bin: Sequence[int]
    numbers: dict[str, dict[str, Any]]
    names: dict[str, int]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class _Tally:
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    values: dict[str, Counter[float]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    names: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in NAMED})
    rows: int = 0


def summarize(trace: Trace) -> Summary:
    """Read all of a trace; ConfigError as from `Trace.rows`, or if there are no rows."""
    tally, notes = _Tally(), Notes()
    latest = -np.inf
    for row in trace.rows(notes):
        tally.rows += 1
        if row.arrival_s is not None:
            notes.disordered += row.arrival_s < latest
            latest = max(latest, row.arrival_s)
            tally.arrivals.append(row.arrival_s)
        for name in COUNTED:
            if (number := getattr(row, name)) is not None:
                tally.values[name][number] += 1
        for name in NAMED:
            if (text := getattr(row, name)) is not None:
                tally.names[name].add(text)
    if not tally.rows:
        skipped = "; ".join(notes.lines())
        raise ConfigError(f"trace {trace.path} has no rows" + (f" ({skipped})" if skipped else ""))
    arrivals = np.sort(np.frombuffer(tally.arrivals)) if tally.arrivals else None
    return Summary(
        path=str(trace.path),
        format=trace.known_format().name,
        rows=tally.rows,
        **_timing(arrivals),
        origin="" if notes.disordered else notes.origin,
        numbers={name: _spread(counts) for name, counts in tally.values.items() if counts},
        names={name: len(texts) for name, texts in tally.names.items() if texts},
        notes=notes.lines(),
    )


def _timing(arrivals: NDArray[np.float64] | None) -> dict[str, Any]:
    if arrivals is None:
        return {"span_s": None, "rate": None, "cv": None, "per_bin": []}
    span, gaps = float(arrivals[-1] - arrivals[0]), np.diff(arrivals)
    mean = float(gaps.mean()) if len(gaps) else 0.0
    bins = np.histogram(arrivals - arrivals[0], BINS, (0.0, span))[0] if span > 0 else [len(arrivals)]
    return {
        "span_s": span,
        "rate": 1 / mean if mean > 0 else None,
        "cv": float(gaps.std()) / mean if mean > 0 and len(gaps) > 1 else None,
        "per_bin": [int(count) for count in bins],
    }


def _spread(counts: Counter[float]) -> dict[str, Any]:
    """Of values and how often each came: the smallest that has a share of them at or below it."""
    values = sorted(counts)
    reached = np.cumsum([counts[value] for value in values])
    total = int(reached[-1])
    at = [int(np.searchsorted(reached, quantile / 100 * total)) for quantile in QUANTILES]
    mean = sum(value * count for value, count in counts.items()) / total
    quantiles = {f"p{q}": values[place] for q, place in zip(QUANTILES, at, strict=True)}
    edges = (values[0], quantiles["p99"])
    shape = np.histogram(values, SHAPE, edges, weights=[counts[value] for value in values])[0]
    return {"rows": total, "mean": mean, **quantiles, "shape": [int(count) for count in shape]}
