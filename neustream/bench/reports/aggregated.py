"""What was already made of requests, from one format to another: no requests are in it any more."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from neustream.bench.reports import foreign
from neustream.bench.reports.building import UNKNOWN, engine, version
from neustream.bench.reports.figures import LATENCIES, only_mean
from neustream.bench.reports.foreign import NAMES, RANKS, number, spread
from neustream.bench.reports.observability import Report, Results
from neustream.bench.reports.scenario import (
    LoadMetadata,
    LoadSection,
    LoadStandardized,
    Native,
    Scenario,
    SequenceLength,
)
from neustream.bench.reports.schema import (
    Aggregate,
    Latency,
    RequestPerformance,
    Requests,
    RunSection,
    RunTime,
    Statistics,
    Throughput,
)
from neustream.bench.reports.units import SECONDS, Units
from neustream.errors import ConfigError

# -- into a report ---------------------------------------------------------------------------------


def report_of_vllm(content: Mapping[str, Any], where: str) -> Report:
    """A result of `vllm bench serve` without its details."""
    seconds = number(content["duration"], f"{where}: duration")
    done = int(number(content["completed"], f"{where}: completed"))
    failed = int(number(content.get("failed") or 0, f"{where}: failed"))
    inputs = number(content.get("total_input_tokens") or 0, f"{where}: total_input_tokens")
    outputs = number(content.get("total_output_tokens") or 0, f"{where}: total_output_tokens")
    aggregate = Aggregate(
        requests=Requests(
            total=done + failed,
            failures=failed,
            input_length=only_mean(inputs / done, "count") if done else None,
            output_length=only_mean(outputs / done, "count") if done else None,
        ),
        latency=Latency(**foreign.vllm_latency(content, where)),
        throughput=_rates(inputs, outputs, done, seconds),
    )
    rate, model = content.get("request_rate"), content.get("model_id")
    return _report(
        "vllm bench serve",
        aggregate,
        seconds,
        rate=None if rate in (None, "inf") else number(rate, f"{where}: request_rate"),
        concurrency=content.get("max_concurrency"),
        model=str(model or UNKNOWN),
        tokens=inputs / done if done else 0.0,
    )


def report_of_summary(content: Mapping[str, Any], where: str) -> Report:
    """A stage as inference-perf sums it up."""
    good, bad = content["successes"], content["failures"]
    load = content["load_summary"]
    if not all(isinstance(each, dict) for each in (good, bad, load)):
        raise ConfigError(f"{where}: successes, failures and load_summary are sections")
    latency = good.get("latency") or {}
    rates = good.get("throughput") or {}
    seconds = number(content.get("benchmark_time_seconds") or 0, f"{where}: benchmark_time_seconds")
    done = int(number(good.get("count") or 0, f"{where}: successes.count"))
    prompts = spread(good.get("prompt_len") or good.get("prompt_tokens"), "count", where)
    aggregate = Aggregate(
        requests=Requests(
            total=int(number(load.get("count") or done, f"{where}: load_summary.count")),
            failures=int(number(bad.get("count") or 0, f"{where}: failures.count")),
            input_length=prompts,
            output_length=spread(good.get("output_len"), "count", where),
            request_size=spread(good.get("request_size_bytes"), "bytes", where),
        ),
        latency=Latency(
            **{
                name: spread(latency.get(name), units, f"{where}: {name}")
                for name, units in LATENCIES.items()
            }
        ),
        throughput=Throughput(
            **{
                ours: only_mean(number(rates[theirs], f"{where}: {theirs}"), units)
                for theirs, (ours, units) in RATES.items()
                if rates.get(theirs) is not None
            }
        ),
    )
    return _report(
        "inference-perf",
        aggregate,
        seconds,
        rate=load.get("requested_rate"),
        concurrency=load.get("concurrency"),
        model=UNKNOWN,
        tokens=prompts.mean if prompts is not None else 0.0,
    )


RATES: Mapping[str, tuple[str, Units]] = {
    "input_tokens_per_sec": ("input_token_rate", "tokens/s"),
    "output_tokens_per_sec": ("output_token_rate", "tokens/s"),
    "total_tokens_per_sec": ("total_token_rate", "tokens/s"),
    "requests_per_sec": ("request_rate", "queries/s"),
}
"""inference-perf's names of rates; those of reports, and their units."""


def _rates(inputs: float, outputs: float, done: int, seconds: float) -> Throughput:
    def by_second(value: float) -> float:
        return value / seconds if seconds > 0 else 0.0

    return Throughput(
        input_token_rate=only_mean(by_second(inputs), "tokens/s"),
        output_token_rate=only_mean(by_second(outputs), "tokens/s"),
        total_token_rate=only_mean(by_second(inputs + outputs), "tokens/s"),
        request_rate=only_mean(by_second(done), "queries/s"),
    )


def _report(
    tool: str,
    aggregate: Aggregate,
    seconds: float,
    *,
    rate: float | None,
    concurrency: int | None,
    model: str,
    tokens: float,
) -> Report:
    load = LoadStandardized(
        tool=tool,
        tool_version=UNKNOWN,
        source="unknown",
        input_seq_len=SequenceLength(distribution="other", value=tokens),
        rate_qps=rate or None,
        concurrency=concurrency or None,
    )
    native = Native(args={"converted_by": f"neustream {version()}"})
    return Report(
        run=RunSection(uid=str(uuid.uuid4()), time=RunTime(duration=f"PT{seconds:.6f}S")),
        scenario=Scenario(
            stack=[engine({"model": model})],
            load=LoadSection(metadata=LoadMetadata(), standardized=load, native=native),
        ),
        results=Results(request_performance=RequestPerformance(aggregate=aggregate)),
    )


# -- out of a report -------------------------------------------------------------------------------


def summary_of_report(report: Report) -> dict[str, Any]:
    """A stage as inference-perf sums it up."""
    aggregate, requests = _needed(report)
    latency = aggregate.latency or Latency()
    rates = aggregate.throughput or Throughput()
    failures = requests.failures or 0
    load: dict[str, Any] = {"count": requests.total, "schedule_delay": None}
    rate, concurrency = _load_of(report)
    if rate is not None:
        load["requested_rate"] = rate
    if concurrency is not None:
        load["concurrency"] = concurrency
    return {
        "benchmark_time_seconds": seconds_of(report),
        "load_summary": load,
        "successes": {
            "count": requests.total - failures - (requests.incomplete or 0),
            "latency": {name: _summed(getattr(latency, name)) for name in LATENCIES},
            "throughput": {
                theirs: mean
                for theirs, (ours, _) in RATES.items()
                if (mean := _mean(getattr(rates, ours))) is not None
            },
            "request_size_bytes": _summed(requests.request_size),
            "prompt_len": _summed(requests.input_length),
            "output_len": _summed(requests.output_length),
        },
        "failures": {"count": failures},
    }


def vllm_of_report(report: Report) -> dict[str, Any]:
    """As `vllm bench serve` writes it without details."""
    aggregate, requests = _needed(report)
    rates = aggregate.throughput or Throughput()
    seconds = seconds_of(report)
    if seconds is None:
        raise ConfigError("run.time.duration is not in there as PT..S, and duration needs it")
    rate, concurrency = _load_of(report)
    failed = (requests.failures or 0) + (requests.incomplete or 0)
    inputs, outputs = _mean(rates.input_token_rate), _mean(rates.output_token_rate)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": requests.total - failed,
        "failed": failed,
        "num_prompts": requests.total,
        "total_input_tokens": _in_all(inputs, seconds),
        "total_output_tokens": _in_all(outputs, seconds),
        "request_throughput": _mean(rates.request_rate),
        "output_throughput": outputs,
        "total_token_throughput": _mean(rates.total_token_rate),
        "request_rate": "inf" if rate is None else rate,
        "max_concurrency": concurrency,
    }
    for name, ours in NAMES.items():
        spread_ = getattr(aggregate.latency or Latency(), ours)
        if spread_ is not None:
            found |= _in_ms(name, spread_)
    return {key: value for key, value in found.items() if value is not None}


def _load_of(report: Report) -> tuple[float | None, float | None]:
    """Requests a second, and how many at a time; None where it says nothing of them."""
    if not report.scenario or not report.scenario.load or not report.scenario.load.standardized:
        return None, None
    told = report.scenario.load.standardized
    return told.rate_qps, told.concurrency


def _in_all(rate: float | None, seconds: float) -> int | None:
    return None if rate is None else round(rate * seconds)


def _needed(report: Report) -> tuple[Aggregate, Requests]:
    performance = report.results.request_performance
    aggregate = performance.aggregate if performance is not None else None
    if aggregate is None or aggregate.requests is None:
        raise ConfigError("results.request_performance.aggregate.requests is not in there")
    return aggregate, aggregate.requests


def seconds_of(report: Report) -> float | None:
    """How long a report's run took; None if it says so in no way that is read."""
    time = report.run.time
    if time is None:
        return None
    text = time.duration or ""
    try:
        return float(text.removeprefix("PT").removesuffix("S"))
    except ValueError:
        both = time.start is not None and time.end is not None
        return (time.end - time.start).total_seconds() if both and time.end and time.start else None


def _mean(statistics: Statistics | None) -> float | None:
    return None if statistics is None else statistics.mean


def _summed(statistics: Statistics | None) -> dict[str, float] | None:
    """By inference-perf's names, in seconds."""
    if statistics is None:
        return None
    scale = SECONDS.get(statistics.units, 1.0)
    names = {"min": "min", "max": "max", "p50": "median"}
    names |= {name: f"p{rank}" for rank, name in RANKS.items() if rank != "50"}
    found = {"mean": statistics.mean * scale}
    for ours, theirs in names.items():
        if (value := getattr(statistics, ours)) is not None:
            found[theirs] = value * scale
    return found


def _in_ms(name: str, statistics: Statistics) -> dict[str, float]:
    """By vLLM's names."""
    scale = SECONDS[statistics.units] * 1000
    found = {f"mean_{name}_ms": statistics.mean * scale}
    keys = {"stddev": f"std_{name}_ms", "p50": f"median_{name}_ms"}
    for ours, theirs in keys.items():
        if (value := getattr(statistics, ours)) is not None:
            found[theirs] = value * scale
    for rank, ours in RANKS.items():
        if (value := getattr(statistics, ours)) is not None:
            found[f"p{rank}_{name}_ms"] = value * scale
    return found
