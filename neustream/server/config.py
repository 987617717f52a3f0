"""What `neustream serve` is told: models, promises, limits, HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from neustream.config.cluster import FrontConfig
from neustream.core.types import SLO

Ms = Annotated[float, Field(gt=0, le=86_400_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


ORIGIN = r"^https?://[A-Za-z0-9.\-\[\]:]+$"
"""An origin as browsers name it: no path, and no wildcard."""


OBJECT = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
"""`module:name`."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Budgets(_Section):
    """Relative budgets in milliseconds; None promises nothing."""

    ttft_ms: Ms | None = None
    tpot_ms: Ms | None = None
    e2e_ms: Ms | None = None

    def slo(self, fallback_ttft_ms: float) -> SLO:
        """The same for a scheduler."""
        first = self.ttft_ms
        if first is None and self.tpot_ms is not None:
            first = fallback_ttft_ms
        return SLO(_seconds(self.e2e_ms), _seconds(first), _seconds(self.tpot_ms))


def _seconds(milliseconds: float | None) -> float:
    return math.inf if milliseconds is None else milliseconds / 1e3


class ClassConfig(Budgets):
    """A class of promises: its defaults, its worth, and the least that clients may ask for.

    `on_miss`: what becomes of a request that cannot be on time any more: it is dropped, or served
    late, behind those that can.
    """

    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    on_miss: Literal["drop", "finish"] = "drop"
    floor: Budgets = Budgets()


class SessionConfig(_Section):
    """Sessions: calls under one promise.

    Args:
        max_open: of the callers with one key.
        forget_s: one is forgotten so long after its budget is over and its last call came.
    """

    max_open: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    forget_s: Seconds = 60.0


class PromiseConfig(_Section):
    """Promises of all models."""

    classes: dict[Name, ClassConfig] = Field(default_factory=dict)
    sessions: SessionConfig = SessionConfig()
    fallback_ttft_ms: Ms = 30_000.0
    max_weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class ModelConfig(_Section):
    """One model: from a folder, or built by a backend as in an experiment's config.

    Args:
        kind: text: a causal language model of transformers; image: a diffusers pipeline; vllm: a
            language model in an engine of vLLM's own, with our scheduler class; agent: a graph that
            calls the other models, and tools.
        graph: of an agent: `module:function` that makes its graph of the other models.
        params: of an agent: `module:Class`, a pydantic model that checks the parameters of runs.
        path: a folder that the library saved; or
        backend: options of `backend` in an experiment's config, without `kind`.
        pipeline: the class of diffusers that a folder is loaded as (StableDiffusionImg2ImgPipeline);
            None: the one that the folder names.
        tokenizer: a folder; None: the model's; "bytes": one that needs no files.
        device: where it runs; vLLM knows that itself.
        sizes: image sizes, as 512x512, that are measured before the server is ready.
        slo: what its requests are promised that bring no promise.
        adapters: of a text model: folders that PEFT saved, by the names under which requests ask for
            them as models; the model itself is without any.
        options: further ones of its mount (`TextMount`, `PipelineMount`); vLLM's engine arguments.
    """

    name: Name
    kind: Literal["text", "image", "vllm", "agent"]
    graph: Annotated[str, Field(pattern=OBJECT)] | None = None
    params: Annotated[str, Field(pattern=OBJECT)] | None = None
    path: Path | None = None
    backend: dict[str, Any] | None = None
    pipeline: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    sizes: list[Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]] = Field(default_factory=list)
    slo: Budgets = Budgets()
    adapters: dict[Name, Path] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.adapters and self.kind != "text":
            raise ValueError(f"adapters are of kind text, got kind {self.kind}")
        if self.kind == "agent":
            if self.graph is None or self.path is not None or self.backend is not None:
                raise ValueError("an agent is made by graph: module:function, of no path and no backend")
            return self
        if self.graph is not None or self.params is not None:
            raise ValueError("graph and params are of agents")
        if (self.path is None) == (self.backend is None):
            raise ValueError("give path, or backend")
        if self.kind == "vllm" and self.path is None:
            raise ValueError("vllm loads a folder: give path")
        if self.kind == "vllm" and self.tokenizer == "bytes":
            raise ValueError("vllm takes the tokenizer of a folder: bytes is for kind text")
        if self.kind == "vllm" and "device" in self.model_fields_set:
            raise ValueError("vllm takes the first device that it sees: leave device out, set CUDA_VISIBLE_DEVICES")
        return self


class HttpConfig(_Section):
    """Where it listens, and who may come.

    Args:
        uds: a socket of this machine, in the place of host and port.
        open_metrics: whether /metrics needs no key.
        cors_origins: pages of these origins may ask.
        pre_drain_s: after SIGTERM, new work is taken for so long while /ready is 503 already.
        head_after_s: a stream begins after so long without a token; None: with the first one.
        sse_keepalive_s: a comment is sent after so long without an event; None: never.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    uds: Path | None = None
    api_key_file: Path | None = None
    open_metrics: bool = False
    allowed_hosts: list[str] = Field(default_factory=list)
    cors_origins: list[Annotated[str, Field(pattern=ORIGIN)]] = Field(default_factory=list)
    pre_drain_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    head_after_s: Seconds | None = None
    sse_keepalive_s: Seconds | None = None
    keep_alive_s: Seconds = 120.0
    shutdown_timeout_s: Seconds = 30.0
    write_timeout_s: Seconds = 30.0
    body_timeout_s: Seconds = 30.0
    head_timeout_s: Seconds = 10.0

    @property
    def local(self) -> bool:
        """Whether nobody beyond this machine can ask."""
        return self.uds is not None or self.host in ("127.0.0.1", "localhost", "::1")


class LimitConfig(_Section):
    """What one server takes at once.

    Args:
        max_open: requests without an answer; max_queued: of one model that have not run, those without
            a promise by themselves; None: four times those of its largest step.
        max_wait_s: who would wait for longer is refused; None: nobody is.
        patience_s: who is promised nothing is given up when it has not gone on for so long; None:
            never.
        allow_new_sizes: whether images of sizes are made that were not measured.
        text_body_kb: None: 256, and 32 bytes for each token of the longest text that is served.
        headers: of a request, at most.
        undelivered: events of a stream that its client has not read; at more it is cancelled.
        pixels: of an image that is sent, in millions; of all images of a chat together.
        images: of a chat, at most.
    """

    max_open: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_wait_s: Seconds | None = None
    patience_s: Seconds | None = 60.0
    allow_new_sizes: bool = False
    undelivered: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    pixels: Annotated[int, Field(ge=1, le=1_000)] = 40
    images: Annotated[int, Field(ge=1, le=1_000)] = 16
    text_body_kb: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    headers: Annotated[int, Field(ge=10, le=10_000)] = 100
    image_body_kb: Annotated[int, Field(ge=1, le=1_000_000)] = 32_768


class ObserveConfig(_Section):
    """What is told of the server.

    Args:
        ui: whether there is a dashboard at /ui.
        access_log: a line of JSON for each request on stderr; None: none.
        otel_endpoint: where spans and metrics of OpenTelemetry go, by OTLP over HTTP.
    """

    ui: bool = True
    access_log: Literal["json"] | None = None
    otel_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/\S*)?$")] | None = None


class ServerConfig(_Section):
    """All of it. `cluster`: instances that all have all models; None: they are in this process."""

    models: Annotated[list[ModelConfig], Field(min_length=1)]
    policy: str | dict[str, Any] = "default"
    promises: PromiseConfig = PromiseConfig()
    http: HttpConfig = HttpConfig()
    limits: LimitConfig = LimitConfig()
    observe: ObserveConfig = ObserveConfig()
    step_timeout_s: Seconds | None = None
    exit_on_engine_death: bool = True
    cluster: FrontConfig | None = None

    @model_validator(mode="after")
    def _different_names(self) -> ServerConfig:
        names = [name for model in self.models for name in (model.name, *model.adapters)]
        if len(set(names)) < len(names):
            raise ValueError(f"models need different names, got {names}")
        return self

    @model_validator(mode="after")
    def _fit_for_instances(self) -> ServerConfig:
        if self.cluster is None:
            return self
        for model in self.models:
            if model.kind not in ("text", "image"):
                why = "has an engine of its own" if model.kind == "vllm" else "has tools in this process"
                raise ValueError(f"model {model.name!r}: kind {model.kind} {why}; a cluster has text, image")
            if model.adapters:
                raise ValueError(f"model {model.name!r}: adapters are for models in this process")
            if model.device not in ("cpu", "cuda"):
                where = f"model {model.name!r}: device {model.device!r}"
                raise ValueError(f"{where}: instances of a cluster get theirs; allowed: cpu, cuda")
            if model.device != self.models[0].device:
                raise ValueError("models of a cluster's instances are on one kind of device, got cpu and cuda")
        return self
