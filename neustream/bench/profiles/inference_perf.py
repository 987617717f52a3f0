"""The dialect of inference-perf: every key of its configuration (0.7), as sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from neustream.bench.profiles.inference_perf_data import Data, Trace
from neustream.bench.profiles.marks import Count, Ignored, Length, Positive, Refused, Section, Seed

WORKERS = Ignored("how its processes and connections are shared out")
REPORTS = Ignored("all results are written, whichever are asked for")
SLACK = 1e-6
"""By how much the shares of adapters may miss 1."""
SCRAPED = Ignored("a Prometheus server is not asked")


# -- load ------------------------------------------------------------------------------------------


class RateStage(Section):
    rate: Positive
    duration: Count
    num_requests: None = None
    concurrency_level: None = None


class ConcurrentStage(Section):
    num_requests: Count
    concurrency_level: Count
    rate: Annotated[float | None, Ignored("set by the tool itself")] = None
    duration: Annotated[int | None, Ignored("set by the tool itself")] = None


class SessionStage(Section):
    concurrent_sessions: int = Field(ge=0)
    session_rate: Positive | None = None
    num_sessions: Count | None = None
    timeout: Positive | None = None


class Sweep(Section):
    type: Literal["geometric", "linear"]
    num_requests: Count = 2000
    timeout: Positive = 60
    num_stages: Count = 5
    stage_duration: Count = 180
    saturation_percentile: float = Field(default=95, ge=0, le=100)


class Adapter(Section):
    name: str = Field(min_length=1)
    split: float = Field(ge=0, le=1)


def _whole(adapters: list[Adapter] | None) -> list[Adapter] | None:
    total = sum(each.split for each in adapters or ())
    if adapters and abs(total - 1) > SLACK:
        raise ValueError(f"the splits are {total:g} together; expected 1")
    return adapters


class Load(Section):
    """What all load types have."""

    interval: float = Field(default=1.0, ge=0, le=1e7)
    num_workers: Length | None = None
    worker_max_concurrency: Count = 100
    worker_max_tcp_connections: Annotated[int, WORKERS] = 2500
    trace: Trace | None = None
    circuit_breakers: Annotated[list[str], Refused("a run is not ended by circuit breakers")] = []
    request_timeout: Positive | None = None
    request_retries: int = Field(default=0, ge=0, le=1000)
    request_retry_backoff_sec: Annotated[
        float, Ignored("a request is sent again at once"), Field(ge=0)
    ] = 0.5
    stage_teardown_grace_seconds: Annotated[
        float, Ignored("a stage ends with its last request"), Field(ge=0)
    ] = 120.0
    lora_traffic_split: Annotated[list[Adapter] | None, AfterValidator(_whole)] = None
    base_seed: Seed | None = None


class RateLoad(Load):
    type: Literal["constant", "poisson"] = "constant"
    stages: list[RateStage] = []
    sweep: Sweep | None = None


class ConcurrentLoad(Load):
    type: Literal["concurrent"]
    stages: list[ConcurrentStage] = []
    sweep: None = None


class TraceLoad(Load):
    type: Annotated[Literal["trace_replay"], Refused("`neustream bench serve` replays traces")]
    stages: list[RateStage] = []
    sweep: Sweep | None = None


class SessionLoad(Load):
    type: Annotated[
        Literal["trace_session_replay"], Refused("sessions of recorded traces are not replayed")
    ]
    stages: list[SessionStage] = []
    sweep: None = None


LOADS: Mapping[str, str] = {
    "concurrent": "(concurrent)",
    "trace_replay": "(trace)",
    "trace_session_replay": "(sessions)",
}
"""Branches of the union, by names that no key has."""


def _load_type(value: Any) -> str:
    """The branch by `type`; a wrong one is told by the branch of rates."""
    named = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return LOADS.get(named, "(rates)") if isinstance(named, str) else "(rates)"


AnyLoad = Annotated[
    Annotated[RateLoad, Tag("(rates)")]
    | Annotated[ConcurrentLoad, Tag("(concurrent)")]
    | Annotated[TraceLoad, Tag("(trace)")]
    | Annotated[SessionLoad, Tag("(sessions)")],
    Discriminator(_load_type),
]

# -- requests --------------------------------------------------------------------------------------


class ResponseFormat(Section):
    type: Literal["json_schema", "json_object"] = "json_schema"
    name: str = "structured_output"
    json_schema: dict[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """As a request has it."""
        if self.type == "json_object":
            return {"type": "json_object"}
        return {
            "type": "json_schema",
            "json_schema": {"name": self.name, "schema": self.json_schema},
        }


class Api(Section):
    type: Literal["completion", "chat", "anthropic_messages"] = "completion"
    streaming: bool = False
    headers: dict[str, str] | None = None
    slo_unit: Literal["s", "ms", "us"] | None = None
    slo_tpot_header: str | None = None
    slo_ttft_header: str | None = None
    response_format: ResponseFormat | None = None
    session_id_header_key: str | None = None
    session_token_header_key: Annotated[
        str | None, Refused("headers of an answer are not sent again")
    ] = None


class Server(Section):
    type: Literal["vllm", "sglang", "tgi", "mock"] = "vllm"
    model_name: str | None = None
    base_url: str | None = None
    ignore_eos: bool = True
    api_key: str | None = None
    cert_path: Annotated[str | None, Refused("no client certificate is sent")] = None
    key_path: Annotated[str | None, Refused("no client certificate is sent")] = None


class Tokenizer(Section):
    pretrained_model_name_or_path: str | None = None
    trust_remote_code: Annotated[bool | None, Ignored("no code of a repository is run")] = None
    token: Annotated[str | None, Ignored("nothing is loaded from a hub")] = None
    load_timeout: Annotated[float | None, Ignored("nothing is loaded from a hub")] = 300.0


# -- reports ---------------------------------------------------------------------------------------


class PerRequestFields(Section):
    request: bool = True
    response: bool = True
    info: bool = True
    response_chunks: bool = True
    computed_metrics: bool = False


class RequestLifecycle(Section):
    summary: Annotated[bool | None, REPORTS] = True
    per_stage: Annotated[bool | None, REPORTS] = True
    per_request: Annotated[bool | None, REPORTS] = True
    per_request_fields: Annotated[PerRequestFields | None, REPORTS] = None
    per_adapter: Annotated[bool | None, REPORTS] = True
    per_adapter_stage: Annotated[bool | None, REPORTS] = False
    percentiles: Annotated[
        list[float] | None, Ignored("p0.1 to p99.9 are reported for every metric")
    ] = None
    use_server_output_tokens: Annotated[
        bool, Ignored("tokens are counted by the server's usage wherever it is sent")
    ] = False
    max_error_messages: Annotated[int, REPORTS] = 100


class SessionLifecycle(Section):
    summary: Annotated[bool | None, REPORTS] = True
    per_stage: Annotated[bool | None, REPORTS] = True
    per_session: Annotated[bool | None, REPORTS] = False


class PrometheusReport(Section):
    summary: Annotated[bool | None, SCRAPED] = None
    per_stage: Annotated[bool | None, SCRAPED] = None


class Goodput(Section):
    constraints: dict[Literal["ttft", "tpot", "itl", "ntpot", "request_latency"], Positive] = {}


class Report(Section):
    request_lifecycle: RequestLifecycle = RequestLifecycle()
    prometheus: PrometheusReport | None = None
    session_lifecycle: SessionLifecycle = SessionLifecycle()
    goodput: Goodput | None = None


class PrometheusClient(Section):
    scrape_interval: int = 15
    url: str | None = None
    filters: list[str] = []
    google_managed: bool = False


class Metrics(Section):
    type: Literal["prometheus", "default"]
    prometheus: PrometheusClient | None = None


class Folder(Section):
    path: str | None = None
    report_file_prefix: str | None = None


class Storage(Section):
    local_storage: Annotated[Folder | None, Ignored("--report names the folder")] = None
    google_cloud_storage: Annotated[
        dict[str, Any] | None, Refused("results are written to a folder, not to a bucket")
    ] = None
    simple_storage_service: Annotated[
        dict[str, Any] | None, Refused("results are written to a folder, not to a bucket")
    ] = None


class InferencePerf(Section):
    """A whole profile."""

    api: Api = Api()
    data: Data = Data()
    load: AnyLoad = RateLoad()
    metrics: Annotated[Metrics | None, SCRAPED] = None
    report: Report = Report()
    storage: Storage | None = None
    server: Server | None = None
    tokenizer: Tokenizer | None = None
    circuit_breakers: Annotated[
        list[dict[str, Any]] | None, Ignored("none of them is named by load.circuit_breakers")
    ] = None
