"""A profile of inference-perf as what is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neustream.bench.plan import Target
from neustream.bench.profiles import inference_perf as tool
from neustream.bench.profiles import inference_perf_data as asked
from neustream.bench.profiles.inference_perf_lengths import Distribution
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.parts import base_url, local_file
from neustream.bench.profiles.profile import LARGEST, Load, Parts, Sweep
from neustream.errors import ConfigError
from neustream.workload.asks import Limits
from neustream.workload.conversations import Conversations, SharedPrefix
from neustream.workload.lengths import Lengths
from neustream.workload.numbers import positive
from neustream.workload.prompt_files import PromptFile
from neustream.workload.sources import RandomTexts, Source

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
BURST_S = 5.0
"""Seconds over which the burst of a sweep is spread."""
CONTEXT = 225_000
"""Tokens of a conversation, where the profile has no bound."""
MOCK_TOKENS = 30
"""Output tokens of the type mock."""


def parts(profile: tool.InferencePerf) -> Parts:
    """What it asks for; Unrunnable names the key that is not run."""
    load = profile.load
    if profile.api.type == "anthropic_messages":
        raise Unrunnable(
            "api.type: the route /v1/messages is not spoken; allowed: completion, chat"
        )
    if why := asked.NOT_RUN.get(profile.data.type):
        raise Unrunnable(f"data.type: {profile.data.type} {why}")
    source = SOURCES[profile.data.type](profile.data)
    found = Parts(_target(profile), source)
    found.loads, found.sweep = _loads(load)
    found.pause_s = load.interval
    found.seed = _seed(profile)
    found.tokenizer = _tokenizer(profile)
    found.limits, found.constraints = _limits(profile)
    found.models = tuple(each.name for each in load.lora_traffic_split or ())
    found.shares = tuple(each.split for each in load.lora_traffic_split or ())
    found.notes = _notes(profile)
    for name in sorted(OF_TYPES - USES[profile.data.type]):
        if getattr(profile.data, name) is not None:
            found.leave(f"data.{name}", f"data.type is {profile.data.type}")
    if load.trace is not None:
        found.leave("load.trace", f"load.type is {load.type}")
    if load.num_workers is None and "worker_max_concurrency" in load.model_fields_set:
        found.leave(
            "load.worker_max_concurrency", "a bound for each worker, and no number of workers"
        )
    return found


# -- who is asked ----------------------------------------------------------------------------------


def _target(profile: tool.InferencePerf) -> Target:
    server = profile.server or tool.Server()
    if server.type == "mock":
        raise Unrunnable("server.type: mock asks no server; allowed: vllm, sglang, tgi")
    headers = dict(profile.api.headers or {})
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    form = profile.api.response_format
    load = profile.load
    return Target(
        url=base_url("server.base_url", server.base_url or ""),
        api="chat" if profile.api.type == "chat" else "completions",
        model=server.model_name or "",
        stream=profile.api.streaming,
        ignore_eos=server.ignore_eos,
        headers=headers,
        body={} if form is None else {"response_format": form.body()},
        told_headers=_session_header(profile.api.session_id_header_key),
        timeout_s=load.request_timeout or Target.timeout_s,
        retries=load.request_retries,
    )


def _session_header(name: str | None) -> dict[str, str]:
    return {name: "session"} if name else {}


def _tokenizer(profile: tool.InferencePerf) -> str:
    named = profile.tokenizer and profile.tokenizer.pretrained_model_name_or_path
    return named or (profile.server and profile.server.model_name) or ""


def _seed(profile: tool.InferencePerf) -> int:
    shared, conversations = profile.data.shared_prefix, profile.data.conversation_replay
    if profile.data.type == "shared_prefix" and shared is not None and shared.seed is not None:
        return shared.seed
    if profile.data.type == "conversation_replay" and conversations is not None:
        return conversations.seed
    return profile.load.base_seed or 0


def _limits(profile: tool.InferencePerf) -> tuple[Limits, dict[str, float]]:
    """What each request is promised: by its headers, else by the report's goodput."""
    api = profile.api
    unit = api.slo_unit or "ms"
    goodput = profile.report.goodput
    given_limits = goodput.constraints if goodput else {}
    constraints: dict[str, float] = {str(name): limit for name, limit in given_limits.items()}
    for name, header in (
        ("ttft", api.slo_ttft_header or f"x-slo-ttft-{unit}"),
        ("tpot", api.slo_tpot_header or f"x-slo-tpot-{unit}"),
    ):
        given = {key.lower(): value for key, value in (api.headers or {}).items()}.get(
            header.lower()
        )
        if given is not None:
            constraints[name] = positive(f"api.headers.{header}", given) * UNITS[unit]
    limits = Limits(
        ttft_s=constraints.get("ttft", math.inf),
        tpot_s=constraints.get("tpot", math.inf),
        e2e_s=constraints.get("request_latency", math.inf),
    )
    return limits, {key: value for key, value in constraints.items() if key in ("itl", "ntpot")}


def _notes(profile: tool.InferencePerf) -> list[str]:
    notes = ["the clock of a request starts when it is due, not when it is sent; both are reported"]
    data = profile.data
    if profile.api.type == "chat" and data.type in ("random", "conversation_replay"):
        notes.append(f"inference-perf has data.type {data.type} for completions alone")
    if data.type == "synthetic":
        notes.append("texts are words drawn at random, not pieces of a poem")
    if data.type == "shareGPT" and profile.api.type == "chat":
        notes.append("of a conversation the first turn is asked, not all of it at once")
    if not profile.api.streaming:
        notes.append("answers are not streamed: there is no TTFT, TPOT or ITL")
    return notes


# -- load ------------------------------------------------------------------------------------------


def _loads(load: tool.AnyLoad) -> tuple[tuple[Load, ...], Sweep | None]:
    if isinstance(load, tool.ConcurrentLoad):
        _needed(load.stages)
        loads = [
            Load("closed", each.num_requests, None, each.concurrency_level) for each in load.stages
        ]
        return tuple(loads), None
    assert isinstance(load, tool.RateLoad)
    law: Any = "rescaled" if load.type == "constant" else "rescaled by second"
    workers = load.num_workers
    bound = None if not workers else workers * load.worker_max_concurrency
    if load.sweep is not None:
        return (), _sweep(load.sweep, law, bound)
    _needed(load.stages)
    return tuple(_rated(each.rate, each.duration, law, bound) for each in load.stages), None


def _needed(stages: Any) -> None:
    if not stages:
        raise ConfigError("load.stages: there are none, and no load.sweep that makes some")


def _rated(rate: float, seconds: int, law: Any, bound: int | None) -> Load:
    requests = int(rate * seconds)
    if not requests:
        raise ConfigError(f"load.stages: {rate:g} requests/s for {seconds} s are no request")
    return Load(law, requests, rate, bound, float(seconds))


def _sweep(sweep: tool.Sweep, law: Any, bound: int | None) -> Sweep:
    rate = sweep.num_requests / BURST_S
    burst = Load(law, sweep.num_requests, rate, bound, sweep.timeout)
    after = Load(law, None, 1.0, bound, float(sweep.stage_duration))
    return Sweep(
        "saturation", (burst,), sweep.num_stages, after, sweep.type, sweep.saturation_percentile
    )


# -- data ------------------------------------------------------------------------------------------


def _random(data: asked.Data) -> Source:
    inputs, outputs = data.input_distribution, data.output_distribution
    if inputs is None or outputs is None:
        raise ConfigError(
            f"data: type {data.type} needs input_distribution and output_distribution"
        )
    for name, each in (("input", inputs), ("output", outputs)):
        if each.type == "normal" and not each.min <= each.mean <= each.max:
            raise ConfigError(
                f"data.{name}_distribution.mean: {each.mean:g} is not between "
                f"min {each.min} and max {each.max}"
            )
    return RandomTexts(inputs.lengths(shifted=True), _at_least_one(outputs.lengths(shifted=True)))


def _at_least_one(lengths: Lengths) -> Lengths:
    """Outputs: none of them is empty."""
    if lengths.kind == "fixed":
        return Lengths.fixed(max(1.0, lengths.mean))
    least = max(1, lengths.least)
    return Lengths(
        lengths.kind, lengths.mean, lengths.std, least, max(least, lengths.most), lengths.skew
    )


def _shared(data: asked.Data) -> Source:
    shared = data.shared_prefix
    if shared is None:
        raise ConfigError("data: type shared_prefix needs data.shared_prefix")
    if shared.num_groups * shared.num_prompts_per_group > LARGEST:
        raise ConfigError(f"data.shared_prefix: more than {LARGEST:,} prompts")
    return SharedPrefix(
        shared.num_groups,
        shared.num_prompts_per_group,
        shared.lengths("system_prompt"),
        shared.lengths("question"),
        _at_least_one(shared.lengths("output")),
        shared.enable_multi_turn_chat,
    )


def _conversations(data: asked.Data) -> Source:
    given = data.conversation_replay
    if given is None:
        raise ConfigError("data: type conversation_replay needs data.conversation_replay")
    most = given.max_model_len or CONTEXT
    outputs = _or(given.output_tokens_per_turn, 256)
    if outputs.most >= most:
        raise ConfigError(
            f"data.conversation_replay.output_tokens_per_turn.max: {outputs.most} leaves no room "
            f"for a prompt within {most} tokens (max_model_len)"
        )
    return Conversations(
        given.num_conversations,
        given.shared_system_prompt_len,
        _or(given.dynamic_system_prompt_len, 0),
        _or(given.turns_per_conversation, 10),
        _or(given.input_tokens_per_turn, 512),
        _at_least_one(outputs),
        _or(given.tool_call_latency_sec, 0),
        most,
    )


def _or(given: Distribution | None, length: int) -> Lengths:
    return Lengths.fixed(length) if given is None else given.lengths()


def _sharegpt(data: asked.Data) -> Source:
    if data.path is None:
        raise Unrunnable(f"data.path: data.type shareGPT {asked.HUB}; give a local file")
    inputs, outputs = data.input_distribution, data.output_distribution
    return PromptFile(
        local_file("data.path", data.path),
        inputs=None if inputs is None else (inputs.min, inputs.max),
        outputs=None if outputs is None else (outputs.min, outputs.max),
    )


def _mock(data: asked.Data) -> Source:
    return RandomTexts(Lengths.fixed(3), Lengths.fixed(MOCK_TOKENS))


LENGTHS = {"input_distribution", "output_distribution"}
USES: Mapping[str, set[str]] = {
    "mock": set(),
    "random": LENGTHS,
    "synthetic": LENGTHS,
    "shared_prefix": {"shared_prefix"},
    "conversation_replay": {"conversation_replay"},
    "shareGPT": {*LENGTHS, "path"},
}
"""Keys of `data` that a type has."""
OF_TYPES = {
    *LENGTHS,
    "path",
    "shared_prefix",
    "conversation_replay",
    "otel_trace_replay",
    "weka_trace_replay",
    "visionarena",
    "synthetic_agentic",
}
"""Keys of `data` that only some types have."""
SOURCES: Mapping[str, Callable[[asked.Data], Source]] = {
    "mock": _mock,
    "random": _random,
    "synthetic": _random,
    "shared_prefix": _shared,
    "conversation_replay": _conversations,
    "shareGPT": _sharegpt,
}
