"""Runs in the files of inference-perf: a summary, one for each stage, and every request.

Names are those that llm-d-benchmark's importer and plots read; `slo`, `met` and `outcome` are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from neustream.bench.records import Record, Since
from neustream.bench.reports.figures import LATENCIES, PERCENTILES, Figures
from neustream.bench.runs import Run

PER_REQUEST = "per_request_lifecycle_metrics.json"
SUMMARY = "summary_lifecycle_metrics.json"


def stage_file(stage: int) -> str:
    """The name of the file of a stage (from 0)."""
    return f"stage_{stage}_lifecycle_metrics.json"


def per_request(runs: Sequence[Run], since: Since = "scheduled") -> list[dict[str, Any]]:
    """Every request of all stages, in order; instants are seconds since 1970.

    A request that was never sent has no times, and is left out.
    """
    return [
        _request(run, stage, record, since)
        for stage, run in enumerate(runs)
        for record in run.records
        if record.sent_s is not None and record.end_s is not None
    ]


def _request(run: Run, stage: int, record: Record, since: Since) -> dict[str, Any]:
    began, sent, end = run.started, record.sent_s or 0.0, record.end_s or 0.0
    failed = None if record.done else {"error_type": record.outcome, "error_msg": record.error}
    return {
        "id": record.id,
        "stage": stage,
        "scheduled_time": began + record.scheduled_s,
        "start_time": began + sent,
        "end_time": began + end,
        "info": {
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "output_token_times": [began + at for at in record.token_times_s],
        },
        "error": failed,
        "outcome": record.outcome,
        "status": record.status,
        "session": record.session or None,
        "slo": record.limits.to_dict() if record.limits.promises else None,
        "met": record.met(since) if record.limits.promises else None,
    }


def stage_summary(run: Run, since: Since = "scheduled") -> dict[str, Any]:
    """One stage; latencies in seconds."""
    figures = Figures(run, since)
    sent = [record.sent_s for record in run.records if record.sent_s is not None]
    load: dict[str, Any] = {
        "count": len(run.records),
        "schedule_delay": summarized(
            record.lag_s for record in run.records if record.sent_s is not None
        ),
    }
    if run.plan.get("rate") is not None:
        span = max(sent) - min(sent) if sent else 0.0
        achieved = len(sent) / span if span > 0 else 0.0
        load |= {
            "send_duration": span,
            "requested_rate": run.plan["rate"],
            "achieved_rate": achieved,
        }
    if run.plan.get("concurrency") is not None:
        load["concurrency"] = run.plan["concurrency"]
    return {
        "benchmark_time_seconds": figures.seconds,
        "load_summary": load,
        "successes": _successes(figures),
        "failures": _failures(figures),
    }


def summary(runs: Sequence[Run], since: Since = "scheduled") -> dict[str, Any]:
    """All stages as one: of their requests, over the time from the first to the last."""
    first = min((run.started for run in runs), default=0.0)
    last = max((run.started + run.duration_s for run in runs), default=0.0)
    records = [record for run in runs for record in run.records]
    return stage_summary(Run("", records, started=first, duration_s=last - first), since)


def _successes(figures: Figures) -> dict[str, Any]:
    done = figures.done
    latencies = figures.latencies()
    tokens_in, tokens_out = figures.input_tokens, figures.output_tokens
    lengths = summarized(record.output_tokens for record in done)
    return {
        "count": len(done),
        "latency": {name: summarized(latencies[name]) for name in LATENCIES},
        "throughput": {
            "input_tokens_per_sec": figures.rate(tokens_in),
            "output_tokens_per_sec": figures.rate(tokens_out),
            "total_tokens_per_sec": figures.rate(tokens_in + tokens_out),
            "requests_per_sec": figures.rate(len(done)),
        },
        "request_size_bytes": summarized(record.sent_bytes or None for record in done),
        "prompt_tokens": {"total": tokens_in, **(_prompts(done) or {})},
        "prompt_len": _prompts(done),
        "output_len": lengths,
        "output_tokens": {"total": tokens_out, **(lengths or {})},
    }


def _prompts(done: Sequence[Record]) -> dict[str, float] | None:
    return summarized(record.input_tokens for record in done)


def _failures(figures: Figures) -> dict[str, Any]:
    failed = [record for record in figures.run.records if not record.done]
    return {
        "count": len(failed),
        "request_latency": summarized(record.e2e_s(figures.since) for record in failed),
        "prompt_len": _prompts(failed),
        "by_label": {
            name: {"count": number, "messages": _messages(failed, name)}
            for name, number in figures.failures.items()
        },
    }


def _messages(failed: Sequence[Record], outcome: str) -> list[str]:
    """A few of the different ones."""
    found = dict.fromkeys(record.error for record in failed if record.outcome == outcome)
    return [text for text in found if text][:5]


def summarized(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, ends and percentiles by inference-perf's names; None of nothing."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    ranks = np.percentile(known, list(PERCENTILES.values()))
    names = ["median" if rank == 50 else f"p{rank:g}" for rank in PERCENTILES.values()]
    ends = {"mean": float(known.mean()), "min": float(known.min()), "max": float(known.max())}
    return {**ends, **dict(zip(names, map(float, ranks), strict=True))}
