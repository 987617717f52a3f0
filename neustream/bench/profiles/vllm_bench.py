"""The dialect of vllm-benchmark: the flags of `vllm bench serve` (0.32), as keys."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from neustream.bench.profiles.marks import Count, Ignored, Length, Refused, Section, Seed

BARE = "none"
"""The value of a flag that has none."""
SAVED = Ignored("--report names the folder, and all results are written")
SHOWN = Ignored("what its client shows")
KEPT = Ignored("it is in the report with the rest of the profile")
MEDIA = Refused("prompts are texts alone")
OTHERS = Refused("of a data set that is not read")


def _flag(value: Any) -> Any:
    """A flag without a value is on."""
    return True if value in (BARE, None, "") else value


def _words(value: Any) -> Any:
    """What stands behind a flag, apart."""
    return value.split() if isinstance(value, str) else value


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _ratio(value: Any) -> Any:
    """One number for inputs and outputs, or one each as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    return value if isinstance(value, dict) else {"input": value, "output": value}


Flag = Annotated[bool, BeforeValidator(_flag)]
Words = Annotated[list[str], BeforeValidator(_words)]
Json = Annotated[dict[str, Any], BeforeValidator(_json)]
Ratio = Annotated[
    dict[Literal["input", "output"], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_ratio)
]


class Server(Section):
    """Who is asked, and how."""

    executable: Annotated[str | None, Ignored("neustream's own client sends the requests")] = None
    backend: str = "openai"
    endpoint_type: str | None = None
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str = "/v1/completions"
    header: Words = []
    model: str | None = None
    served_model_name: str | None = None
    tokenizer: str | None = None
    tokenizer_mode: Annotated[str, Ignored("a tokenizer.json is read as it is")] = "auto"
    trust_remote_code: Annotated[Flag, Ignored("no code of a repository is run")] = False
    skip_tokenizer_init: Annotated[
        Flag, Ignored("a tokenizer is used where it is a local file")
    ] = False
    use_beam_search: Annotated[Flag, Refused("beams are not asked for")] = False
    logprobs: int | None = None
    ignore_eos: Flag = False
    insecure: Flag = False
    no_stream: Annotated[Flag, Ignored("it is of data sets of a hub; answers are streamed")] = False
    request_id_prefix: str | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    temperature: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    lora_modules: Words = []
    lora_assignment: Literal["random", "round-robin"] = "random"
    chat_template_kwargs: Annotated[Json | None, Refused("texts are put in no template here")] = (
        None
    )
    extra_body: Json | None = None
    ready_check_timeout_sec: Annotated[int, Ignored("the first request tells")] = 0
    num_warmups: Length = 0


class Load(Server):
    """How many requests, and when they come."""

    num_prompts: Count = 1000
    request_rate: Annotated[float, Field(gt=0, allow_inf_nan=True)] = float("inf")
    burstiness: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    max_concurrency: Count | None = None
    seed: Seed = 0
    ramp_up_strategy: Literal["linear", "exponential"] | None = None
    ramp_up_start_rps: Count | None = None
    ramp_up_end_rps: Count | None = None
    probe_request_rate: Annotated[float, Refused("no probes are sent beside the load")] = 0.0
    self_timed: Annotated[Flag | None, OTHERS] = None
    goodput: Words = []


class Results(Load):
    """What is written and shown."""

    label: Annotated[str | None, KEPT] = None
    metadata: Annotated[Words, KEPT] = []
    percentile_metrics: Annotated[str | None, Ignored("all metrics are reported")] = None
    metric_percentiles: Annotated[
        str | float | None, Ignored("p0.1 to p99.9 are reported for every metric")
    ] = None
    disable_tqdm: Annotated[Flag, SHOWN] = False
    profile: Annotated[Flag, Refused("the server's profiler is not started")] = False
    save_result: Annotated[Flag, SAVED] = False
    save_detailed: Annotated[Flag, SAVED] = False
    append_result: Annotated[Flag, SAVED] = False
    result_dir: Annotated[str | None, SAVED] = None
    result_filename: Annotated[str | None, SAVED] = None
    plot_timeline: Annotated[Flag, SHOWN] = False
    timeline_itl_thresholds: Annotated[str | None, SHOWN] = None
    plot_dataset_stats: Annotated[Flag, SHOWN] = False


class VllmBench(Results):
    """A whole profile, with what is asked for."""

    dataset_name: Literal[
        "sharegpt",
        "burstgpt",
        "random",
        "random-mm",
        "random-rerank",
        "hf",
        "custom",
        "custom_audio",
        "custom_image",
        "custom_mm",
        "prefix_repetition",
        "sonnet",
        "spec_bench",
        "speed_bench",
        "timed_trace",
    ] = "random"
    dataset_path: str | None = None
    no_oversample: Flag = False
    disable_shuffle: Flag = False
    skip_chat_template: Annotated[Flag, Ignored("texts are put in no template here")] = False
    input_len: Length | None = None
    output_len: Count | None = None
    random_input_len: Length = 1024
    random_output_len: Count = 128
    random_range_ratio: Ratio = {"input": 0.0, "output": 0.0}
    random_prefix_len: Length = 0
    random_batch_size: Annotated[Count, Refused("each request has one prompt")] = 1
    sharegpt_output_len: Count | None = None
    custom_output_len: int = 256
    custom_ensure_client_side_data: Annotated[
        Flag, Ignored("data is always sent by the client")
    ] = False
    prefix_repetition_prefix_len: Length = 256
    prefix_repetition_suffix_len: Length = 256
    prefix_repetition_num_prefixes: Count = 10
    prefix_repetition_output_len: Count = 128
    enable_multimodal_chat: Annotated[Flag, MEDIA] = False
    random_mm_base_items_per_request: Annotated[int | None, MEDIA] = None
    random_mm_num_mm_items_range_ratio: Annotated[float | None, MEDIA] = None
    random_mm_limit_mm_per_prompt: Annotated[Any, MEDIA] = None
    random_mm_bucket_config: Annotated[Any, MEDIA] = None
    no_reranker: Annotated[Flag, OTHERS] = False
    hf_subset: Annotated[str | None, OTHERS] = None
    hf_split: Annotated[str | None, OTHERS] = None
    hf_name: Annotated[str | None, OTHERS] = None
    hf_output_len: Annotated[int | None, OTHERS] = None
    bfcl_categories: Annotated[str | None, OTHERS] = None
    blazedit_min_distance: Annotated[float, OTHERS] = 0.0
    blazedit_max_distance: Annotated[float, OTHERS] = 1.0
    asr_max_audio_len_sec: Annotated[float | None, OTHERS] = None
    asr_min_audio_len_sec: Annotated[float, OTHERS] = 0.0
    spec_bench_output_len: Annotated[int, OTHERS] = 256
    spec_bench_category: Annotated[str | None, OTHERS] = None
    speed_bench_dataset_subset: Annotated[str | None, OTHERS] = None
    speed_bench_output_len: Annotated[int, OTHERS] = 4096
    speed_bench_category: Annotated[str | None, OTHERS] = None
    timed_trace_chunk_hash_size: Annotated[int, OTHERS] = 16
    timed_trace_sec_multiplier: Annotated[float, OTHERS] = 1
    timed_trace_label_timestamp: Annotated[str | None, OTHERS] = None
    timed_trace_label_input_length: Annotated[str | None, OTHERS] = None
    timed_trace_label_output_length: Annotated[str | None, OTHERS] = None
    timed_trace_label_hash_ids: Annotated[str | None, OTHERS] = None
