"""What became of the promises of a run: the block `neustream_slo` of a report.

Everything that was offered counts: a request that failed has met nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neustream.bench.records import Record, Since
from neustream.bench.reports.figures import Figures, statistics
from neustream.bench.shares import Share
from neustream.bench.summary import ours

REFUSED = (429, 503)
"""Statuses by which a server says that it takes nothing more in."""
ALWAYS = (
    "since",
    "offered",
    "failures",
    "failed_share",
    "tokens_counted_by",
    "interrupted",
    "client",
    "client_lag_ms",
    "client_warnings",
)
PROMISED = ("slack_ms", "slo_scale_at_90", "bound_ratio", "classes")
"""Keys of `neustream.bench.summary.ours` that are told as they are."""


def dropped(records: Sequence[Record]) -> int:
    """Requests that were refused or given up by admission, not failed."""
    return sum(each.outcome == "dropped" or each.status in REFUSED for each in records)


def block(figures: Figures, constraints: Mapping[str, float]) -> dict[str, Any]:
    """Attainment, goodput, failures, and how the client itself did.

    constraints: limits in seconds of `itl` and `ntpot`, which no request carries.
    """
    run, since = figures.run, figures.since
    told = ours(run, since)
    found: dict[str, Any] = {key: told[key] for key in ALWAYS}
    found |= {"done": len(figures.done), "dropped": dropped(run.records)}
    promised = [each for each in run.records if each.limits.promises or constraints]
    if not promised:
        return found
    met = sum(_met(each, since, constraints) for each in promised)
    share = Share(met, len(promised))
    found |= {
        "slo": _limits(promised, constraints),
        "attainment": share.value,
        "interval": list(share.interval),
        "goodput": figures.rate(met),
        "late": sum(each.done for each in promised) - met,
        "each": told.get("each", {}) | _each(promised, since, constraints),
    }
    return found | {key: told[key] for key in PROMISED if key in told}


def _met(record: Record, since: Since, constraints: Mapping[str, float]) -> bool:
    kept = (_kept(record, since, name, limit) for name, limit in constraints.items())
    return record.met(since) and all(kept)


def _kept(record: Record, since: Since, name: str, limit: float) -> bool:
    value = CONSTRAINTS[name](record, since)
    return record.done and value is not None and value <= limit


def _mean_gap(record: Record, since: Since) -> float | None:
    gaps = record.itls_s
    return sum(gaps) / len(gaps) if gaps else None


CONSTRAINTS: Mapping[str, Callable[[Record, Since], float | None]] = {
    "itl": _mean_gap,
    "ntpot": lambda record, since: record.ntpot_s(since),
}
"""What inference-perf's goodput may limit beside TTFT, TPOT and all of a request."""


def _each(
    promised: Sequence[Record], since: Since, constraints: Mapping[str, float]
) -> dict[str, Any]:
    found = {}
    for name, limit in constraints.items():
        kept = sum(_kept(each, since, name, limit) for each in promised)
        found[name] = Share(kept, len(promised)).to_dict()
    return found


def _limits(promised: Sequence[Record], constraints: Mapping[str, float]) -> dict[str, Any]:
    """The limits, in seconds, where all requests have the same; else their statistics."""
    found: dict[str, Any] = {f"{name}_s": limit for name, limit in constraints.items()}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = [getattr(each.limits, name) for each in promised]
        finite = [value for value in values if math.isfinite(value)]
        if finite and len(set(values)) == 1:
            found[name] = values[0]
        elif finite:
            spread = statistics(finite, "s")
            assert spread is not None
            found[name] = spread.model_dump(exclude_none=True)
    return found
