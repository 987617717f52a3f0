"""The dialect of guidellm: the scenarios of 0.7 and later, and the flat ones of 0.3 to 0.6."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, Tag

from neustream.bench.profiles.guidellm_data import AnyData, kind_of
from neustream.bench.profiles.marks import Count, Ignored, Positive, Refused, Section, Seed

HTTP = Ignored("how its client speaks HTTP")
FILES = Ignored("--report names the folder, and all results are written")
ERRORS = Ignored("errors are counted; a run is not ended by them")
MANY = 4096
"""Requests at once where guidellm has no bound."""


def _listed(value: Any) -> Any:
    """A number, or a list of numbers, also as a text."""
    if isinstance(value, str):
        value = [
            part.strip() for part in value.strip().removeprefix("[").removesuffix("]").split(",")
        ]
    return value if isinstance(value, list) else [value]


Rates = Annotated[list[Positive], Field(min_length=1), BeforeValidator(_listed)]
Counts = Annotated[list[Count], Field(min_length=1), BeforeValidator(_listed)]

# -- who is asked ----------------------------------------------------------------------------------


class Extras(Section):
    """What is added to each request."""

    headers: dict[str, str] | None = None
    body: dict[str, Any] | None = None
    params: Annotated[dict[str, Any] | None, Refused("nothing is put behind the route")] = None
    files: Annotated[Any, Refused("no files are sent")] = None
    content: Annotated[Any, Refused("texts have no further fields")] = None
    method: Annotated[str | None, Refused("requests are POST")] = None
    stream: bool | None = None


class HttpBackend(Section):
    kind: Literal["openai_http"] = "openai_http"
    target: str | None = None
    model: str = ""
    request_format: Literal[
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/pooling",
    ] = "/v1/chat/completions"
    api_key: str | None = None
    api_routes: dict[str, str] = {}
    timeout: Positive | None = None
    timeout_connect: Annotated[float | None, HTTP] = 5.0
    http2: Annotated[bool, HTTP] = True
    follow_redirects: Annotated[bool, HTTP] = True
    verify: bool = False
    validate_backend: Annotated[bool, Ignored("the first request tells")] = True
    stream: bool = True
    extras: Extras | None = None
    max_tokens: int | None = Field(
        default=None, gt=0, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    server_history: Annotated[bool, Refused("the route /v1/responses is not spoken")] = False
    tool_call_missing_behavior: Annotated[str, Ignored("no tools are called")] = "error_stop"
    multiturn_reasoning: Annotated[bool | str, Ignored("the answer as it was sent is kept")] = False


class OtherBackend(Section, extra="allow"):
    kind: Annotated[str, Refused("only servers that speak OpenAI's routes over HTTP are asked")]


def _backend(value: Any) -> str:
    return "(http)" if kind_of(value) in (None, "openai_http") else "(other)"


AnyBackend = Annotated[
    Annotated[HttpBackend, Tag("(http)")] | Annotated[OtherBackend, Tag("(other)")],
    Discriminator(_backend),
]


# -- load ------------------------------------------------------------------------------------------


class Phase(Section):
    """What is left out at the beginning or the end: a share of it, or seconds, or requests."""

    percent: float | None = Field(default=None, ge=0, lt=1)
    value: float | None = Field(default=None, ge=0)
    mode: Literal["duration", "requests", "prefer_duration", "prefer_requests", "both"] = (
        "prefer_duration"
    )


def _phase(value: Any) -> Any:
    """A number below 1 is a share, others are seconds or requests."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {} if value is None else value
    if not value:
        return {}
    return {"percent": value} if value < 1 else {"value": value}


WHOLE = Refused("a report is of all requests that were offered; none are left out")
AnyPhase = Annotated[Phase, WHOLE, BeforeValidator(_phase)]


class Load(Section):
    rampup_duration: float = Field(default=0.0, ge=0, le=1e7)
    warmup: AnyPhase = Phase()
    cooldown: AnyPhase = Phase()


class Synchronous(Load):
    kind: Literal["synchronous"]


class Concurrent(Load):
    kind: Literal["concurrent"]
    streams: Counts


class Throughput(Load):
    kind: Literal["throughput"]
    max_concurrency: Count | None = None


class Rated(Load):
    kind: Literal["constant", "async", "poisson"]
    rate: Rates
    max_concurrency: Count | None = None


class Sweep(Load):
    kind: Literal["sweep"] = "sweep"
    sweep_size: int = Field(default=10, ge=2, le=1000)
    strategy_type: Literal["constant", "poisson"] = "constant"
    max_concurrency: Count | None = 512


class OtherLoad(Load, extra="allow"):
    kind: Annotated[
        Literal["goodput", "knee", "replay"],
        Refused(
            "`neustream bench search` looks for rates, and `neustream bench serve` replays traces"
        ),
    ]


LOADS: Mapping[str, str] = {
    "synchronous": "(synchronous)",
    "concurrent": "(concurrent)",
    "throughput": "(throughput)",
    "constant": "(rated)",
    "async": "(rated)",
    "poisson": "(rated)",
    "sweep": "(sweep)",
}


def _load(value: Any) -> str:
    return LOADS.get(str(kind_of(value)), "(other)")


AnyLoad = Annotated[
    Annotated[Synchronous, Tag("(synchronous)")]
    | Annotated[Concurrent, Tag("(concurrent)")]
    | Annotated[Throughput, Tag("(throughput)")]
    | Annotated[Rated, Tag("(rated)")]
    | Annotated[Sweep, Tag("(sweep)")]
    | Annotated[OtherLoad, Tag("(other)")],
    Discriminator(_load),
]


class Constraint(Section):
    stopping_scope: Annotated[
        Literal["current", "all"], Ignored("each load is ended for itself")
    ] = "current"


class Most(Constraint):
    kind: Literal["max_requests", "min_requests"]
    count: Counts


class Longest(Constraint):
    kind: Literal["max_duration"]
    seconds: Rates


class Errors(Constraint):
    kind: Annotated[Literal["max_errors", "max_error_rate", "max_global_error_rate"], ERRORS]
    count: Any = None
    rate: Any = None
    window: float = 30
    minimum: float | None = None


class Saturation(Constraint, extra="allow"):
    kind: Annotated[
        Literal["over_saturation"], Refused("a load is not ended because the server falls behind")
    ]


CONSTRAINTS: Mapping[str, str] = {
    "max_requests": "(most)",
    "min_requests": "(most)",
    "max_duration": "(longest)",
    "over_saturation": "(saturation)",
}


def _constraint(value: Any) -> str:
    return CONSTRAINTS.get(str(kind_of(value)), "(errors)")


AnyConstraint = Annotated[
    Annotated[Most, Tag("(most)")]
    | Annotated[Longest, Tag("(longest)")]
    | Annotated[Errors, Tag("(errors)")]
    | Annotated[Saturation, Tag("(saturation)")],
    Discriminator(_constraint),
]

# -- the whole -------------------------------------------------------------------------------------


class Kind(Section, extra="allow"):
    """A section of which neustream uses nothing."""

    kind: str = ""


class Random(Section):
    kind: Literal["static"] = "static"
    value: Seed = 42


class Tokenizer(Section):
    kind: Literal["huggingface_auto", "hf_auto"] = "huggingface_auto"
    model: str | None = None
    load_kwargs: Annotated[dict[str, Any], Ignored("nothing is loaded from a hub")] = {}


class Slo(Section):
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2el_ms: Positive | None = None


class Metrics(Section):
    kind: Literal["generative"] = "generative"
    warnings: Annotated[list[Any] | None, Ignored("a run tells of its own client's lag")] = None
    sample_size: Annotated[int | None, Ignored("a record of every request is kept")] = None
    prefer_response_metrics: bool = True
    confidence: Annotated[float | None, Ignored("intervals are of 95 percent")] = 0.95
    slo: Slo | None = None


class Spec(Section):
    backend: AnyBackend = HttpBackend()
    profile: AnyLoad
    constraints: list[AnyConstraint] = []
    tokenizer: Tokenizer = Tokenizer()
    data: list[AnyData] = Field(min_length=1)
    data_column_mapper: Annotated[Kind | None, Ignored("of data that is loaded")] = None
    data_preprocessors: Annotated[list[Kind], Ignored("of data that is loaded")] = []
    data_finalizer: Annotated[Kind | None, Ignored("of data that is loaded")] = None
    data_loader: Annotated[Kind | None, Ignored("of data that is loaded")] = None
    seed: Random = Random()
    outputs: Annotated[list[Kind], FILES] = []
    metrics: Metrics = Metrics()


class Benchmark(Section):
    """One of a scenario."""

    spec: Spec


class Labels(Section, extra="allow"):
    labels: dict[str, str] = {}


ONE: list[dict[str, Any] | None] = [None]
"""The benchmarks of a scenario that names none."""


class Scenario(Section):
    """A whole profile; `benchmarks` are put into `spec`, one after another."""

    metadata: Labels = Labels()
    spec: dict[str, Any] = {}
    benchmarks: Annotated[
        list[dict[str, Any] | None],
        BeforeValidator(lambda given: ONE if given is None or given == [] else given),
    ] = ONE
