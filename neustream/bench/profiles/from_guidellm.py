"""A profile of guidellm as what is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from neustream.bench.plan import Target
from neustream.bench.profiles import guidellm as tool
from neustream.bench.profiles import guidellm_data as asked
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.parts import base_url, each_or_last, local_file, refuse_media
from neustream.bench.profiles.profile import Load, Parts, Sweep
from neustream.workload.asks import Limits
from neustream.workload.lengths import Lengths
from neustream.workload.prompt_files import PromptFile
from neustream.workload.sources import Prefixes, RandomTexts, Source

ROUTES = ("/v1/completions", "/v1/chat/completions")
FILES = ("text_file", "json_file", "csv_file")
HUB = ("huggingface", "hf")
UNGROWN = (tool.Concurrent, tool.Throughput, tool.Sweep)
"""Kinds of load of which guidellm opens the places one after another."""
WITHOUT = ("poisson", "synchronous")
"""Kinds of load in which guidellm itself does nothing with `rampup_duration`."""
TRACES = ("mooncake", "weka", "otel", "opentelemetry", "trace_synthetic")


def parts(spec: tool.Spec, where: str) -> Parts:
    """What one benchmark asks for; Unrunnable names the key that is not run.

    where: stands before the keys of the spec.
    """
    backend = spec.backend
    assert isinstance(backend, tool.HttpBackend)
    found = Parts(_target(backend, where), _source(spec.data, backend, where))
    found.loads, found.sweep = _loads(spec, where)
    found.seed = spec.seed.value
    found.tokenizer = spec.tokenizer.model or backend.model
    if spec.metrics.slo is not None:
        found.limits = _limits(spec.metrics.slo)
    if not spec.metrics.prefer_response_metrics:
        found.leave(
            f"{where}metrics.prefer_response_metrics", "the server's usage is believed first"
        )
    if spec.profile.rampup_duration and spec.profile.kind in WITHOUT:
        found.leave(
            f"{where}profile.rampup_duration", f"guidellm has none for {spec.profile.kind} either"
        )
    if any(isinstance(each, tool.Longest) for each in spec.constraints):
        found.notes.append("requests under way at the end of a load are waited for, not given up")
    return found


def joined(benchmarks: Sequence[Parts]) -> Parts:
    """Benchmarks one after another; they may differ in their loads alone."""
    first = benchmarks[0]
    for each in benchmarks[1:]:
        for name in ("target", "source", "seed", "tokenizer", "limits", "sweep"):
            if getattr(each, name) != getattr(first, name):
                raise Unrunnable(f"benchmarks: they differ in more than their loads ({name})")
    loads = tuple(load for each in benchmarks for load in each.loads)
    if first.sweep is not None and len(benchmarks) > 1:
        raise Unrunnable("benchmarks: a sweep is one benchmark")
    return dataclasses.replace(first, loads=loads)


def _target(backend: tool.HttpBackend, where: str) -> Target:
    extras = backend.extras or tool.Extras()
    headers = dict(extras.headers or {})
    if backend.api_key:
        headers["Authorization"] = f"Bearer {backend.api_key}"
    if backend.request_format not in ROUTES:
        raise Unrunnable(
            f"{where}backend.request_format: {backend.request_format} is not spoken; "
            f"allowed: {', '.join(ROUTES)}"
        )
    chat = backend.request_format == "/v1/chat/completions"
    body: dict[str, Any] = {}
    if backend.max_tokens is not None:
        body["max_tokens"] = backend.max_tokens
    return Target(
        url=base_url(f"{where}backend.target", backend.target or ""),
        api="chat" if chat else "completions",
        path=backend.api_routes.get(backend.request_format, ""),
        model=backend.model,
        stream=backend.stream if extras.stream is None else extras.stream,
        ignore_eos=True,  # where an output length is said, guidellm asks for exactly that
        headers=headers,
        body=body | (extras.body or {}),
        timeout_s=backend.timeout or Target.timeout_s,
        verify_tls=backend.verify,
    )


def _limits(slo: tool.Slo) -> Limits:
    def seconds(value: float | None) -> float:
        return math.inf if value is None else value / 1000

    return Limits(seconds(slo.ttft_ms), seconds(slo.tpot_ms), seconds(slo.e2el_ms))


# -- load ------------------------------------------------------------------------------------------


def _loads(spec: tool.Spec, where: str) -> tuple[tuple[Load, ...], Sweep | None]:
    profile = spec.profile
    counts = _constraint(spec, tool.Most, "count")
    seconds = _constraint(spec, tool.Longest, "seconds")
    if not counts and not seconds:
        raise Unrunnable(
            f"{where}constraints: nothing ends the load; give max_requests (count) "
            "or max_duration (seconds)"
        )
    if profile.rampup_duration and isinstance(profile, UNGROWN):
        raise Unrunnable(
            f"{where}profile.rampup_duration: places of the kind {profile.kind} are all there from "
            "the beginning on; the rate of the kind constant grows"
        )
    if isinstance(profile, tool.Sweep):
        return (), _sweep(profile, counts, seconds)
    bare = _bare(profile)
    loads = []
    for at, load in enumerate(bare):
        count = each_or_last(counts, at, len(bare), f"{where}constraints.count") if counts else None
        most = (
            each_or_last(seconds, at, len(bare), f"{where}constraints.seconds") if seconds else None
        )
        requests = None if count is None else math.ceil(count)
        loads.append(dataclasses.replace(load, requests=requests, duration_s=most))
    return tuple(loads), None


def _constraint(spec: tool.Spec, kind: type, name: str) -> list[float]:
    found = [getattr(each, name) for each in spec.constraints if isinstance(each, kind)]
    return [float(value) for value in found[0]] if found else []


def _bare(profile: Any) -> list[Load]:
    """The loads, but for what ends them."""
    if isinstance(profile, tool.Synchronous):
        return [Load("closed", concurrency=1)]
    if isinstance(profile, tool.Concurrent):
        return [Load("closed", concurrency=streams) for streams in profile.streams]
    if isinstance(profile, tool.Throughput):
        return [Load("closed", concurrency=profile.max_concurrency or tool.MANY)]
    most = profile.max_concurrency
    if profile.kind == "poisson":
        return [Load("poisson", rate=rate, concurrency=most) for rate in profile.rate]
    grown = profile.rampup_duration
    return [Load("even", rate=rate, concurrency=most, rampup_s=grown) for rate in profile.rate]


def _sweep(profile: tool.Sweep, counts: list[float], seconds: list[float]) -> Sweep:
    requests = math.ceil(counts[0]) if counts else None
    duration = seconds[0] if seconds else None
    many = profile.max_concurrency or tool.MANY
    law: Any = "poisson" if profile.strategy_type == "poisson" else "even"
    probes = tuple(Load("closed", requests, None, streams, duration) for streams in (1, many))
    after = Load(law, requests, 1.0, profile.max_concurrency, duration)
    return Sweep("between", probes, profile.sweep_size - len(probes), after)


# -- data ------------------------------------------------------------------------------------------


def _source(data: Sequence[asked.AnyData], backend: tool.HttpBackend, where: str) -> Source:
    if len(data) > 1:
        raise Unrunnable(f"{where}data: {len(data)} sources; one is read")
    only = data[0]
    if isinstance(only, asked.Synthetic):
        return _synthetic(only)
    key, more = f"{where}data.0", only.model_extra or {}
    if only.kind in FILES:
        return PromptFile(
            local_file(f"{key}.path", str(more.get("path"))), output_tokens=backend.max_tokens
        )
    if only.kind in HUB:
        return PromptFile(
            local_file(f"{key}.source", str(more.get("source"))), output_tokens=backend.max_tokens
        )
    if only.kind in TRACES:
        raise Unrunnable(f"{key}.kind: {only.kind}: `neustream bench serve` replays traces")
    if only.kind in ("synthetic_image", "synthetic_video"):
        raise refuse_media(f"{key}.kind: {only.kind}")
    raise Unrunnable(
        f"{key}.kind: data of kind {only.kind!r} is not read; "
        f"allowed: synthetic_text, {', '.join(FILES)}"
    )


def _synthetic(data: asked.Synthetic) -> Source:
    inputs = data.lengths("prompt_tokens")
    assert inputs is not None
    prefixes = tuple(
        Prefixes(each.prefix_count, each.prefix_tokens, each.bucket_weight)
        for each in data.buckets()
    )
    return RandomTexts(
        inputs,
        data.lengths("output_tokens"),
        prefixes if any(each.tokens for each in prefixes) else (),
        data.turns,
        data.lengths("first_prompt_tokens"),
        data.lengths("first_output_tokens"),
        _think(data),
    )


def _think(data: asked.Synthetic) -> Lengths | None:
    """Milliseconds between turns."""
    if data.delay is None:
        return None
    ends = (data.delay_stdev, data.delay_min, data.delay_max)
    std, least, most = (None if value is None else round(1000 * value) for value in ends)
    return asked.drawn(max(1, round(1000 * data.delay)), std, least, most)
