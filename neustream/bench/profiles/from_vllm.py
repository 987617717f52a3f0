"""A profile of vllm-benchmark as what is run."""

from __future__ import annotations

import math
from typing import Any

from neustream.bench.plan import Target
from neustream.bench.profiles import vllm_bench as tool
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.parts import base_url, local_file, refuse_media
from neustream.bench.profiles.profile import Load, Parts
from neustream.errors import ConfigError
from neustream.workload.arrivals import Ramp
from neustream.workload.asks import Limits
from neustream.workload.conversations import SharedPrefix
from neustream.workload.lengths import Lengths
from neustream.workload.prompt_files import UNSAID, PromptFile
from neustream.workload.sources import Prefixes, RandomTexts, Source

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
    found.models = tuple(profile.lora_modules)
    found.in_turns = profile.lora_assignment == "round-robin"
    for name in ("ramp_up_start_rps", "ramp_up_end_rps"):
        if profile.ramp_up_strategy is None and getattr(profile, name) is not None:
            found.leave(name.replace("_", "-"), "it is of a ramp, and there is no ramp-up-strategy")
    if profile.max_concurrency and found.loads[0].law != "closed":
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
    ramp, cv = _ramp(profile), 0.0
    if not math.isinf(profile.burstiness):
        cv = 1 / math.sqrt(profile.burstiness)
    if ramp is not None:
        return Load("poisson", requests, None, concurrency, cv=cv, ramp=ramp)
    if math.isinf(profile.request_rate):
        return Load("closed" if concurrency else "at once", requests, None, concurrency)
    return Load("rescaled", requests, profile.request_rate, concurrency, cv=cv)


def _ramp(profile: tool.VllmBench) -> Ramp | None:
    """Rates that grow or fall; ConfigError where vLLM has one too."""
    start, end = profile.ramp_up_start_rps, profile.ramp_up_end_rps
    if profile.ramp_up_strategy is None:
        return None
    if start is None or end is None:
        raise ConfigError("ramp-up-strategy: needs ramp-up-start-rps and ramp-up-end-rps")
    if not math.isinf(profile.request_rate):
        raise ConfigError("ramp-up-strategy: takes the place of request-rate")
    return Ramp(start, end, profile.ramp_up_strategy == "exponential")


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
        Lengths.around(inputs, profile.random_range_ratio["input"], 0),
        Lengths.around(outputs, profile.random_range_ratio["output"]),
        prefixes,
    )


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
    path, shuffled = local_file("dataset-path", profile.dataset_path), not profile.disable_shuffle
    once = profile.no_oversample
    if name == "sharegpt":
        output = profile.output_len or profile.sharegpt_output_len
        return PromptFile.sharegpt(path, output, shuffled=shuffled, once=once)
    own = profile.custom_output_len if profile.custom_output_len > 0 else None
    output = profile.output_len or own
    return PromptFile(
        path,
        output_tokens=output,
        shuffled=shuffled,
        once=once,
        default=UNSAID,
        strict=True,
    )
