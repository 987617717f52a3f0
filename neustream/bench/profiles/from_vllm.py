"""A profile of vllm-benchmark as what is run."""

from __future__ import annotations

import math
from typing import Any

from neustream.bench.plan import Target
from neustream.bench.profiles import vllm_bench as tool
from neustream.bench.profiles.files import PromptFile
from neustream.bench.profiles.lengths import Lengths
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.parts import base_url, refuse_media
from neustream.bench.profiles.profile import Load, Parts
from neustream.bench.profiles.sessions import SharedPrefix
from neustream.bench.profiles.sources import Prefixes, RandomTexts, Source
from neustream.errors import ConfigError
from neustream.workload.asks import Limits

BACKENDS = ("vllm", "openai", "openai-chat")
SAMPLED = (
    "top_p",
    "top_k",
    "min_p",
    "temperature",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
MEDIA = ("random-mm", "custom_audio", "custom_image", "custom_mm")


def parts(profile: tool.VllmBench) -> Parts:
    """What it asks for; Unrunnable names the key that is not run."""
    found = Parts(_target(profile), _source(profile))
    found.loads = (_load(profile),)
    found.warmups = profile.num_warmups
    found.seed = profile.seed
    found.tokenizer = profile.tokenizer or profile.model or ""
    found.limits = _limits(profile.goodput)
    if profile.max_concurrency and not math.isinf(profile.request_rate):
        found.notes.append(
            "a request that waits for a place is late by that; vLLM does not count it"
        )
    return found


def _target(profile: tool.VllmBench) -> Target:
    backend = profile.endpoint_type or profile.backend
    if backend not in BACKENDS:
        raise Unrunnable(f"backend: {backend} is not spoken; allowed: {', '.join(BACKENDS)}")
    chat = backend == "openai-chat"
    url = profile.base_url
    if url is None and {"host", "port"} & profile.model_fields_set:
        url = f"http://{profile.host}:{profile.port}"
    return Target(
        url=base_url("base-url", url or ""),
        api="chat" if chat else "completions",
        path=_path(profile, chat),
        model=profile.served_model_name or profile.model or "",
        ignore_eos=profile.ignore_eos,
        headers=_pairs("header", profile.header),
        body=_body(profile, chat) | (profile.extra_body or {}),
        verify_tls=not profile.insecure,
        id_prefix=profile.request_id_prefix or "",
    )


def _path(profile: tool.VllmBench, chat: bool) -> str:
    """The route that is asked, "" where the profile names none."""
    path = profile.endpoint if "endpoint" in profile.model_fields_set else ""
    if chat and path and not path.endswith("chat/completions"):
        raise ConfigError(f"endpoint: {path!r} is no route of chats, which openai-chat needs")
    return path


def _body(profile: tool.VllmBench, chat: bool) -> dict[str, Any]:
    """How tokens are chosen and told, as a request has it."""
    named = {name: getattr(profile, name) for name in SAMPLED}
    body = {name: value for name, value in named.items() if value is not None}
    if profile.logprobs is None:
        return body
    if chat:
        return body | {"logprobs": True, "top_logprobs": profile.logprobs}
    return body | {"logprobs": profile.logprobs}


def _pairs(key: str, texts: list[str]) -> dict[str, str]:
    """KEY=VALUE, each in its text."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{key}: {text!r} is not KEY=VALUE")
        found[name] = value
    return found


def _limits(goodput: list[str]) -> Limits:
    """NAME:MILLISECONDS, each in its text."""
    found = {}
    for text in goodput:
        name, _, value = text.partition(":")
        try:
            limit = float(value) / 1000
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not 0 <= limit < math.inf:
            raise ConfigError(f"goodput: {text!r}; allowed: ttft:MS, tpot:MS, e2el:MS")
        found[name] = limit
    return Limits(*(found.get(name, math.inf) for name in ("ttft", "tpot", "e2el")))


def _load(profile: tool.VllmBench) -> Load:
    requests, concurrency = profile.num_prompts, profile.max_concurrency
    if profile.dataset_name == "prefix_repetition":
        kinds = profile.prefix_repetition_num_prefixes
        requests = requests // kinds * kinds
        if not requests:
            raise ConfigError(
                f"num-prompts: {profile.num_prompts} are fewer than the {kinds} prefixes"
            )
    if math.isinf(profile.request_rate):
        return Load("closed" if concurrency else "at once", requests, None, concurrency)
    cv = 0.0 if math.isinf(profile.burstiness) else 1 / math.sqrt(profile.burstiness)
    return Load("rescaled", requests, profile.request_rate, concurrency, cv=cv)


# -- data ------------------------------------------------------------------------------------------


def _source(profile: tool.VllmBench) -> Source:
    name = profile.dataset_name
    if name == "random":
        return _random(profile)
    if name == "prefix_repetition":
        return _repeated(profile)
    if name in ("sharegpt", "custom"):
        return _file(profile)
    if name in MEDIA:
        raise refuse_media(f"dataset-name: {name}")
    if name == "hf":
        raise Unrunnable(
            "dataset-name: hf needs a data set of the Hugging Face hub; nothing is loaded"
        )
    if name in ("burstgpt", "timed_trace"):
        raise Unrunnable(f"dataset-name: {name}: `neustream bench serve` replays traces")
    raise Unrunnable(
        f"dataset-name: {name} is not read; allowed: random, prefix_repetition, sharegpt, custom"
    )


def _random(profile: tool.VllmBench) -> Source:
    inputs = profile.random_input_len if profile.input_len is None else profile.input_len
    outputs = profile.random_output_len if profile.output_len is None else profile.output_len
    prefix = profile.random_prefix_len
    if inputs + prefix < 1:
        raise ConfigError("random-input-len: 0, and no random-prefix-len: prompts would be empty")
    prefixes = (Prefixes(1, prefix),) if prefix else ()
    return RandomTexts(
        _around(inputs, profile.random_range_ratio["input"], 0),
        _around(outputs, profile.random_range_ratio["output"], 1),
        prefixes,
    )


def _around(length: int, ratio: float, least: int) -> Lengths:
    """From `length * (1 - ratio)` to `length * (1 + ratio)`, each as often."""
    low = max(least, math.floor(length * (1 - ratio)))
    return Lengths.between(low, max(low, math.ceil(length * (1 + ratio))))


def _repeated(profile: tool.VllmBench) -> Source:
    groups = profile.prefix_repetition_num_prefixes
    output = (
        profile.prefix_repetition_output_len if profile.output_len is None else profile.output_len
    )
    return SharedPrefix(
        groups,
        max(1, profile.num_prompts // groups),
        Lengths.fixed(profile.prefix_repetition_prefix_len),
        Lengths.fixed(profile.prefix_repetition_suffix_len),
        Lengths.fixed(output),
    )


def _file(profile: tool.VllmBench) -> Source:
    name = profile.dataset_name
    if profile.dataset_path is None:
        raise Unrunnable(f"dataset-path: dataset-name {name} needs a local file; nothing is loaded")
    output = profile.output_len
    if output is None:
        output = profile.sharegpt_output_len if name == "sharegpt" else profile.custom_output_len
    return PromptFile.local(
        "dataset-path",
        profile.dataset_path,
        inputs=(4, 1024) if name == "sharegpt" else None,
        output_tokens=None if output is None or output < 1 else output,
        shuffled=not profile.disable_shuffle,
    )
