"""What came of a run, in numbers: under the names of `vllm bench serve`, and ours beside them.

Percentiles and rates of what is done are vLLM's. Ours count everything that was offered: a request
that failed has kept no promise. Latencies are in milliseconds where a name ends so, else seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from neustream.bench.records import Record, Since
from neustream.bench.runs import Run
from neustream.bench.shares import Share

PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
LATE_S, TOO_LATE_S = 0.010, 0.050
"""A client whose p99 of lag is above these is warned of; what it measured is not valid."""
LATE_SHARE = 0.05
"""It is also warned of if that is more than this share of the median TTFT."""
CELL_S = 1.0
"""The bins in which peaks are looked for."""


def summary(run: Run, since: Since = "scheduled", detailed: bool = False) -> dict[str, Any]:
    """The results of one load; `detailed` with a value for each request."""
    done = [record for record in run.records if record.done]
    told = {**_head(run), **_totals(run, done), **_peaks(done)}
    for name, values in latencies(done, since).items():
        told |= _spread(name, values)
    told |= ours(run, since)
    return {**told, **_details(run, since)} if detailed else told


def latencies(done: Sequence[Record], since: Since) -> dict[str, list[float]]:
    """Seconds of requests that are done, by vLLM's names; ITL is of all their gaps."""
    return {
        "ttft": _known(record.ttft_s(since) for record in done),
        "tpot": _known(record.tpot_s for record in done),
        "itl": [gap for record in done for gap in record.itls_s],
        "e2el": _known(record.e2e_s(since) for record in done),
    }


def ours(run: Run, since: Since = "scheduled") -> dict[str, Any]:
    """Of all that was offered: attainment, goodput, failures, classes; and how its client did."""
    records, seconds = run.records, run.duration_s
    promised = [record for record in records if record.limits.promises]
    failures = Counter(_end(record) for record in records if not record.done)
    told: dict[str, Any] = {
        "since": since,
        "offered": len(records),
        "failures": dict(sorted(failures.items())),
        "failed_share": Share(sum(failures.values()), len(records)).to_dict(),
        "tokens_counted_by": dict(Counter(each.counted_by for each in records if each.counted_by)),
        "interrupted": run.interrupted,
        "client": run.client,
        "client_lag_ms": lag_ms(records),
        "client_warnings": client_warnings(run),
    }
    if promised:
        told |= _of_promises(promised, seconds, since)
        if "bound" in run.meta:
            told["bound_ratio"] = bound_ratio(told["slo_attainment"]["number"], run.meta["bound"])
    if any(record.kind == "image" for record in records):
        images = sum(record.images for record in records if record.done)
        told |= {"images": images, "image_throughput": images / seconds if seconds > 0 else 0.0}
    return told


def _end(record: Record) -> str:
    """How a request that is not done ended: an outcome, or the status of its answer."""
    return f"status_{record.status}" if record.outcome == "status" else record.outcome


def _of_promises(promised: Sequence[Record], seconds: float, since: Since) -> dict[str, Any]:
    """Of the requests that were promised something: how many had it kept, by class too."""
    met = sum(record.met(since) for record in promised)
    told: dict[str, Any] = {
        "slo_attainment": Share(met, len(promised)).to_dict(),
        "goodput_all": met / seconds if seconds > 0 else 0.0,
        "slo_scale_at_90": scale_at(promised, 0.9, since),
        "slack_ms": _slack_ms(promised, since),
        "each": _each(promised, since),
    }
    classes = sorted({record.slo_class for record in promised})
    if classes not in ([], [""]):
        told["classes"] = {name: _class(promised, name, since) for name in classes}
    return told


def bound_ratio(met: int, bound: Mapping[str, Any]) -> float | None:
    """Requests on time, by the most that could be; None where there could be none.

    `value` of a bound rests on what a solver claims; where more were on time, `proven` is taken.
    """
    most = bound["value"] if met <= bound["value"] else bound["proven"]
    return met / most if most else None


def attainment(run: Run, since: Since = "scheduled") -> Share:
    """How many of the requests that were promised something had it kept."""
    promised = [record for record in run.records if record.limits.promises]
    return Share(sum(record.met(since) for record in promised), len(promised))


def scale_at(records: Sequence[Record], share: float, since: Since = "scheduled") -> float | None:
    """The smallest factor on all limits at which so many would be met; None: at none."""
    scales = sorted(record.scale(since) for record in records)
    needed = math.ceil(share * len(scales) - 1e-9)
    found = scales[needed - 1] if needed else 0.0
    return found if math.isfinite(found) else None


# -- the client -----------------------------------------------------------------------------


def lag_ms(records: Sequence[Record]) -> dict[str, float]:
    """How late the client itself sent: median, p99 and most."""
    lags = [record.lag_s * 1e3 for record in records if record.sent_s is not None] or [0.0]
    p50, p99 = np.percentile(lags, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": max(lags)}


def valid(run: Run) -> bool:
    """Whether the client kept its schedule well enough for the results to mean something."""
    return lag_ms(run.records)["p99"] <= TOO_LATE_S * 1e3


def client_warnings(run: Run) -> list[str]:
    """What is to be said of the client, a sentence each."""
    lag = lag_ms(run.records)["p99"]
    ttfts = latencies([record for record in run.records if record.done], "scheduled")["ttft"]
    if not valid(run):
        limit = f"{TOO_LATE_S * 1e3:g} ms"
        return [f"not valid: the client sent its requests late (p99 {lag:.1f} ms, limit {limit})"]
    if lag > LATE_S * 1e3:
        return [f"the client sent its requests late: p99 {lag:.1f} ms"]
    if ttfts and lag > LATE_SHARE * float(np.median(ttfts)) * 1e3 and lag > 1.0:
        return [f"the client's lag (p99 {lag:.1f} ms) is more than 5 % of the median TTFT"]
    return []


# -- parts ----------------------------------------------------------------------------------


def _head(run: Run) -> dict[str, Any]:
    plan, target = run.plan, run.target
    rate = plan.get("rate")
    return {
        "date": datetime.fromtimestamp(run.started, UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": target.get("backend") or target.get("api"),
        "endpoint_type": target.get("backend") or target.get("api"),
        "label": run.name,
        "model_id": target.get("model"),
        "tokenizer_id": run.meta.get("tokenizer"),
        "num_prompts": len(run.records),
        "request_rate": "inf" if rate is None else rate,
        "burstiness": run.meta.get("burstiness", 1.0),
        "max_concurrency": plan.get("concurrency"),
    }


def _totals(run: Run, done: Sequence[Record]) -> dict[str, Any]:
    seconds = run.duration_s
    prompts = sum(record.input_tokens or 0 for record in done)
    outputs = sum(record.output_tokens or 0 for record in done)
    promised = any(record.limits.promises for record in run.records)
    good = sum(record.met("sent") for record in run.records)

    def rate(number: float) -> float:
        return number / seconds if seconds > 0 else 0.0

    return {
        "duration": seconds,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(done)),
        "request_goodput": rate(good) if promised else None,
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(prompts + outputs),
    }


def _peaks(done: Sequence[Record]) -> dict[str, float]:
    """The most tokens in a second, and the most requests under way in one."""
    tokens: Counter[int] = Counter()
    for record in done:
        tokens.update(int(at // CELL_S) for at in record.token_times_s)
    edges = [(record.sent_s, 1) for record in done if record.sent_s is not None]
    edges += [(record.end_s, -1) for record in done if record.end_s is not None]
    open_now = most = 0
    for _, change in sorted(edges):
        open_now += change
        most = max(most, open_now)
    return {
        "max_output_tokens_per_s": float(max(tokens.values(), default=0)),
        "max_concurrent_requests": most,
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    ms = np.array(seconds) * 1e3
    known = len(ms) > 0
    told: dict[str, float | None] = {
        f"mean_{name}_ms": float(np.mean(ms)) if known else None,
        f"median_{name}_ms": float(np.median(ms)) if known else None,
        f"std_{name}_ms": float(np.std(ms)) if known else None,
    }
    for rank in PERCENTILES:
        told[f"p{rank:g}_{name}_ms"] = float(np.percentile(ms, rank)) if known else None
    return told


def _details(run: Run, since: Since) -> dict[str, Any]:
    """A value for each request, in order; what is not known is 0, as in vLLM's files."""
    records = run.records
    return {
        "input_lens": [record.input_tokens or 0 for record in records],
        "output_lens": [record.output_tokens or 0 for record in records],
        "ttfts": [record.ttft_s(since) or 0.0 for record in records],
        "itls": [record.itls_s for record in records],
        "start_times": [record.sent_s or 0.0 for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }


def _slack_ms(promised: Sequence[Record], since: Since) -> dict[str, float]:
    """By how much the tightest promise of requests that are done was kept (negative: broken)."""
    slacks = [slack * 1e3 for record in promised if (slack := _slack_s(record, since)) is not None]
    if not slacks:
        return {}
    ranks = (1, 10, 50, 90, 99)
    return {f"p{k}": float(v) for k, v in zip(ranks, np.percentile(slacks, ranks), strict=True)}


def _slack_s(record: Record, since: Since) -> float | None:
    if not record.done:
        return None
    limits = record.limits
    pairs = (
        (record.ttft_s(since), limits.ttft_s),
        (record.tpot_s, limits.tpot_s),
        (record.e2e_s(since), limits.e2e_s),
    )
    left = [limit - took for took, limit in pairs if took is not None and math.isfinite(limit)]
    return min(left, default=None)


def _each(promised: Sequence[Record], since: Since) -> dict[str, Any]:
    """Each promise apart: how many of those who had it had it kept."""
    told = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        having = [record for record in promised if math.isfinite(getattr(record.limits, name))]
        kept = sum(_kept(record, name, since) for record in having)
        if having:
            told[name.removesuffix("_s")] = Share(kept, len(having)).to_dict()
    return told


def _kept(record: Record, name: str, since: Since) -> bool:
    took = record.tpot_s if name == "tpot_s" else getattr(record, name)(since)
    return record.done and (took is None or took <= getattr(record.limits, name))


def _class(promised: Sequence[Record], name: str, since: Since) -> dict[str, Any]:
    own = [record for record in promised if record.slo_class == name]
    done = [record for record in own if record.done]
    told = Share(sum(record.met(since) for record in own), len(own)).to_dict()
    medians = {
        f"median_{key}_ms": float(np.median(values)) * 1e3 if values else None
        for key, values in latencies(done, since).items()
    }
    return {"slo_attainment": told, "completed": len(done), **medians}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
