"""Results of other tools, read: `vllm bench serve`'s JSON and inference-perf's lifecycle files."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from neustream.bench.records import Record
from neustream.bench.reports.figures import LATENCIES
from neustream.bench.reports.schema import Statistics
from neustream.bench.reports.units import Units
from neustream.bench.runs import Run
from neustream.errors import ConfigError, shown

DETAILS = ("start_times", "ttfts", "itls", "input_lens", "output_lens", "errors")
"""Lists of vLLM's JSON that `--save-detailed` adds: a value for each request."""
NAMES = {
    "ttft": "time_to_first_token",
    "tpot": "time_per_output_token",
    "itl": "inter_token_latency",
    "e2el": "request_latency",
}
"""vLLM's names of latencies, and those of reports."""


# -- vllm bench serve ------------------------------------------------------------------------------


def is_vllm(content: Any) -> bool:
    """Whether it is a result of `vllm bench serve`."""
    return (
        isinstance(content, dict)
        and {"completed", "duration", "request_throughput"} <= content.keys()
    )


def run_of_vllm(content: Mapping[str, Any], where: str) -> Run | None:
    """A run with a record for each request; None if the file has only what was made of them."""
    lists = {name: content.get(name) for name in DETAILS}
    if any(value is None for value in lists.values()):
        return None
    found: dict[str, Sequence[Any]] = {
        name: _list(value, f"{where}: {name}") for name, value in lists.items()
    }
    count = len(found["ttfts"])
    took = content.get("latencies")  # of newer versions
    found["latencies"] = [None] * count if took is None else _list(took, f"{where}: latencies")
    if any(len(value) != count for value in found.values()):
        sizes = ", ".join(f"{name} {len(value)}" for name, value in found.items())
        raise ConfigError(f"{where}: lists of different lengths: {sizes}")
    starts = [number(each, f"{where}: start_times") for each in found["start_times"]]
    origin = min(starts, default=0.0)
    rows = zip(*found.values(), strict=True)
    records = [_vllm_record(at, row, origin, where) for at, row in enumerate(rows)]
    rate = content.get("request_rate")
    plan = {
        "rate": None if rate in (None, "inf") else number(rate, f"{where}: request_rate"),
        "concurrency": content.get("max_concurrency"),
    }
    return Run(
        str(content.get("label") or "vllm bench serve"),
        records,
        plan,
        {"model": content.get("model_id") or "", "api": content.get("backend")},
        started=_epoch(content.get("date"), starts),
        duration_s=number(content["duration"], f"{where}: duration"),
        meta={"converted_from": "vllm bench serve"},
    )


def _vllm_record(at: int, row: Sequence[Any], origin: float, where: str) -> Record:
    start, ttft, itls, inputs, outputs, error, took = row
    sent = number(start, f"{where}: start_times") - origin
    first = number(ttft, f"{where}: ttfts")
    gaps = [number(each, f"{where}: itls") for each in _list(itls, f"{where}: itls")]
    times = list(itertools.accumulate(gaps, initial=sent + first)) if first > 0 else []
    end = times[-1] if times else sent
    failed = bool(error) or not outputs  # of one that failed vLLM tells no tokens
    return Record(
        str(at),
        outcome="failed" if failed else "done",
        error=str(error or ""),
        scheduled_s=sent,
        sent_s=sent,
        token_times_s=times,
        end_s=end if took is None else sent + number(took, f"{where}: latencies"),
        input_tokens=int(number(inputs, f"{where}: input_lens")),
        output_tokens=int(number(outputs, f"{where}: output_lens")),
        counted_by="" if failed else "usage",
    )


def vllm_latency(content: Mapping[str, Any], where: str) -> dict[str, Statistics]:
    """Statistics of latencies in seconds, by the names of reports."""
    found = {}
    for name, theirs in NAMES.items():
        if content.get(f"mean_{name}_ms") is None:
            continue
        told = {
            "mean": content[f"mean_{name}_ms"],
            "stddev": content.get(f"std_{name}_ms"),
            "p50": content.get(f"median_{name}_ms"),
        }
        for rank, key in RANKS.items():
            if (value := content.get(f"p{rank}_{name}_ms")) is not None:
                told[key] = value
        seconds = {
            key: number(value, f"{where}: {name}") / 1000
            for key, value in told.items()
            if value is not None
        }
        found[theirs] = Statistics.model_validate({"units": LATENCIES[theirs], **seconds})
    return found


RANKS = {
    "0.1": "p0p1",
    "1": "p1",
    "5": "p5",
    "10": "p10",
    "25": "p25",
    "50": "p50",
    "75": "p75",
    "90": "p90",
    "95": "p95",
    "99": "p99",
    "99.9": "p99p9",
}
"""Percentiles as others write them, and as reports do."""


# -- inference-perf --------------------------------------------------------------------------------


def is_per_request(content: Any) -> bool:
    """Whether it is a list of requests as inference-perf writes them."""
    return isinstance(content, list) and all(
        isinstance(each, dict) and {"start_time", "end_time", "info"} <= each.keys()
        for each in content
    )


def runs_of_requests(content: Sequence[Mapping[str, Any]], where: str) -> list[Run]:
    """A run for each stage that the requests name; one, if they name none."""
    stages: dict[int, list[Mapping[str, Any]]] = {}
    for each in content:
        stages.setdefault(int(each.get("stage") or 0), []).append(each)
    if not stages:
        raise ConfigError(f"{where}: no requests")
    return [_run_of_stage(stage, stages[stage], where) for stage in sorted(stages)]


def _run_of_stage(stage: int, rows: Sequence[Mapping[str, Any]], where: str) -> Run:
    origin = min(
        number(row.get("scheduled_time", row["start_time"]), f"{where}: start_time") for row in rows
    )
    records = [_request(at, row, origin, where) for at, row in enumerate(rows)]
    records.sort(key=lambda record: record.scheduled_s)
    return Run(
        f"stage {stage}",
        records,
        started=origin if origin > 1e9 else 0.0,  # else it is a clock that begins anywhere
        duration_s=max(record.end_s or 0.0 for record in records),
        meta={"converted_from": "inference-perf"},
    )


def _request(at: int, row: Mapping[str, Any], origin: float, where: str) -> Record:
    info = row["info"] if isinstance(row["info"], dict) else {}
    asked = info.get("request_metrics") or {}
    answered = info.get("response_metrics") or {}
    inputs = info.get("input_tokens", (asked.get("text") or {}).get("input_tokens"))
    outputs = info.get("output_tokens", answered.get("output_tokens"))
    times = info.get("output_token_times", answered.get("output_token_times")) or []
    error = row.get("error")
    outputs_at = _list(times, f"{where}: output_token_times")
    due = row.get("scheduled_time", row["start_time"])
    return Record(
        str(row.get("id", at)),
        outcome="done" if error in (None, "") else "failed",
        error=_message(error),
        scheduled_s=number(due, f"{where}: scheduled_time") - origin,
        sent_s=number(row["start_time"], f"{where}: start_time") - origin,
        token_times_s=[
            number(each, f"{where}: output_token_times") - origin for each in outputs_at
        ],
        end_s=number(row["end_time"], f"{where}: end_time") - origin,
        input_tokens=_tokens(inputs, f"{where}: input_tokens"),
        output_tokens=_tokens(outputs, f"{where}: output_tokens"),
        counted_by="" if outputs is None else "tokenizer",
        session=str(row.get("session") or ""),
    )


def _message(error: Any) -> str:
    """What an error of inference-perf says: a text, or a section with its type and message."""
    if not isinstance(error, dict):
        return str(error or "")
    told = (error.get("error_type"), error.get("error_msg"))
    return ": ".join(str(each) for each in told if each)


def _tokens(count: Any, where: str) -> int | None:
    return None if count is None else int(number(count, where))


def is_summary(content: Any) -> bool:
    """Whether it is what inference-perf says of a stage."""
    return isinstance(content, dict) and {"load_summary", "successes", "failures"} <= content.keys()


def spread(told: Any, units: Units, where: str) -> Statistics | None:
    """Statistics of a summary of inference-perf; None of nothing."""
    if not isinstance(told, dict) or told.get("mean") is None:
        return None
    found: dict[str, Any] = {"units": units, "mean": number(told["mean"], where)}
    for theirs, ours in {"min": "min", "max": "max", "median": "p50", **SUMMARY_RANKS}.items():
        if told.get(theirs) is not None:
            found[ours] = number(told[theirs], where)
    return Statistics.model_validate(found)


SUMMARY_RANKS = {f"p{rank}": name for rank, name in RANKS.items() if rank != "50"}


# -- cells -----------------------------------------------------------------------------------------


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list, got {shown(value)}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: expected a number, got {shown(value)}")
    return float(value)


def _epoch(date: Any, starts: Sequence[float]) -> float:
    """When a run began: by its date as vLLM writes it (UTC is taken), 0 if there is none."""
    try:
        when = datetime.datetime.strptime(str(date), "%Y%m%d-%H%M%S")
    except ValueError:
        return 0.0
    return when.replace(tzinfo=datetime.UTC).timestamp()
