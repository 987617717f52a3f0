"""The YAML file of an experiment, as pydantic models.

A model is a pipeline of stages or a language model: which of the two is told by the key `stages` or
`llm`, and each kind is a class with the keys that it has, and no others. What else the two differ
in is in `neustream/experiment/pipelines/`. A file has one model with its keys at the top, or several
(`several.py`). `load.py` reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from neustream.config.cluster import ClusterConfig
from neustream.config.fields import (
    MOST_WORK,
    MOST_WORKERS,
    BatchSize,
    Devices,
    Factor,
    Name,
    Section,
    Share,
    TokenCount,
    mean_of,
)
from neustream.config.promises import Slo
from neustream.config.workload import StepsWorkload, TokensWorkload, Workload
from neustream.errors import nearest


class StageConfig(Section):
    """One stage of the pipeline.

    `times` names the request parameter that says how often the stage runs (its loop); without it
    the stage runs once. `profile` names files of the `profiles` folder (without .json), whose
    modules run back to back as one step; it defaults to the stage's own name.
    """

    max_batch: BatchSize = 1
    times: str | None = None
    profile: list[str] | None = Field(default=None, min_length=1)
    pool: str = "gpu"


class PoolConfig(Section):
    """Interchangeable workers, in simulations: real devices have one each."""

    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = 1
    sticky: bool = False


class MemoryConfig(Section):
    """The KV cache of one worker: room for `tokens`, in blocks of `block`.

    `host_tokens`: of requests that lost their blocks, so many are kept in the host's memory, and
    not computed again. Simulations take copying them for free.
    """

    tokens: Annotated[int, Field(ge=1, le=2**40)]
    block: Annotated[int, Field(ge=1, le=2**20)] = 16
    host_tokens: Annotated[int, Field(ge=0, le=2**40)] = 0

    @model_validator(mode="after")
    def _one_block(self) -> MemoryConfig:
        if self.tokens < self.block:
            raise ValueError(f"tokens {self.tokens} is less than one block of {self.block}")
        return self


class LlmConfig(Section):
    """A language model: prefill, then decode until the end.

    `max_batch`: the most requests in one step. `profile`: the file of the `profiles` folder
    (without .json) with its steps; `see`: that of its vision tower, where prompts have images.
    `memory`: its KV cache; without one, memory is no limit. `step_tokens`: the most tokens that
    one step computes where prompts are prefilled in parts.
    """

    max_batch: BatchSize = 256
    profile: str = "steps"
    see: str = "see"
    memory: MemoryConfig | None = None
    step_tokens: TokenCount = 2048


class Slowdown(Section):
    """A time during which the device is slower.

    Steps that start in it take `factor` times as long.
    """

    start_s: float = Field(ge=0, le=1e13)
    duration_s: float = Field(ge=1e-9, le=1e13)
    factor: Factor


class Simulation(Section):
    """How the simulated device differs from its profile.

    `truth` names profiles of how long steps really take, as stage -> files of the `profiles` folder (without
    .json) whose seconds add up; other stages take what their profiles say. `handover_s` is added to each step
    (from the end of one to the start of the next: what a table of bare model calls leaves out), `decision_s`
    passes while a policy decides, beside the step under way where there is one of at least `alone_s` (behind
    shorter ones all waits for it), `decision_request_s` more for each request that it is asked about (none
    where a step stands as decided before), `decision_new_s` more for each of these that has not run, `call_s`
    is what the call for a request takes in the serving process: it is taken in so much later, and the step
    under way takes so much longer (in clusters: of the process of the instance that it comes to).
    `latency_scale` multiplies each step's latency; by default they are what the profiles were measured with,
    or 0 and 1. `latency_noise` spreads latencies (the sigma of a log-normal factor of median 1, drawn with the
    workload's seed). `slowdowns` are times of the trace during which steps take longer still (a neighbour on
    the device, throttling); where they overlap, all of them count. Policies know of none of this.
    `mixed_devices`: profiles of different devices count as of the simulated one, which is refused otherwise.
    """

    truth: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    handover_s: float | None = Field(default=None, ge=0, le=1e6)
    decision_s: float | None = Field(default=None, ge=0, le=1e6)
    decision_request_s: float | None = Field(default=None, ge=0, le=1e6)
    decision_new_s: float | None = Field(default=None, ge=0, le=1e6)
    alone_s: float | None = Field(default=None, ge=0, le=1e6)
    call_s: float | None = Field(default=None, ge=0, le=1e6)
    latency_scale: Factor | None = None
    latency_noise: float = Field(default=0.0, ge=0, le=5)
    slowdowns: list[Slowdown] = Field(default=[])
    mixed_devices: bool = False


class Sweep(Section):
    """What `neustream sweep` varies by default.

    `values` are those of the key, `at` other keys that it holds meanwhile.
    """

    values: list[Share] = Field(min_length=1)
    at: dict[str, Any] = Field(default_factory=dict)


class Backend(BaseModel):
    """Real models for `profile` and `run`.

    `kind` is the name of a backend, or `module:function`; what is not named here are its options.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str
    check_finite: bool = False
    allow_other_device: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


SWEEPABLE = (
    "workload.rate",
    "workload.load",
    "workload.cv",
    "workload.speed",
    "slo.scale",
    "slo.first_scale",
    "slo.step_scale",
)


class Model(Section):
    """A model with its load, whatever it is: profiles, a workload, promises, the real model."""

    profiles: Path
    workload: Workload = Workload()
    slo: Slo = Slo()
    backend: Backend | None = None

    @field_validator("slo", mode="before")
    @classmethod
    def _no_promise(cls, slo: Any) -> Any:
        return {} if slo is None else slo

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("stages") and raw.get("llm") is not None:
            raise ValueError("give stages or llm, not both")
        return raw


class StagesModel(Model):
    """A pipeline: `stages` in their order."""

    stages: dict[str, StageConfig] = Field(min_length=1)
    workload: StepsWorkload = StepsWorkload()

    @model_validator(mode="after")
    def _no_tokens(self) -> StagesModel:
        if self.slo.of_tokens:
            raise ValueError("slo: promises of tokens are for an llm")
        return self

    @model_validator(mode="after")
    def _work(self) -> StagesModel:
        steps = mean_of(self.workload.steps)
        loops = sum(stage.times == "steps" for stage in self.stages.values())
        _check_work(self.workload, steps * loops)
        return self


class LlmModel(Model):
    """A language model."""

    llm: LlmConfig
    workload: TokensWorkload = TokensWorkload()

    @model_validator(mode="after")
    def _work(self) -> LlmModel:
        each = min(mean_of(self.workload.output), self.workload.max_tokens)
        _check_work(self.workload, each)
        return self


def _check_work(load: Workload, each: float) -> None:
    """A workload that no machine finishes is not even drawn."""
    if load.requests * each > MOST_WORK:
        steps = f"{load.requests} requests of about {each:g} steps each"
        raise ValueError(f"workload: {steps} are more than {MOST_WORK} in all")


class Config(Section):
    """What a file says beside its models: devices, policies to compare, how it is simulated.

    `devices`: as many, or their names; each has workers and memory of its own. A request goes to
    the one with the least work left of those that serve its model, and stays there. `cluster`:
    instances behind a head in their place.
    """

    name: Name
    about: str = ""
    devices: Devices = 1
    policies: dict[str, dict[str, Any]] = Field(default={"default": {}}, min_length=1)
    simulation: Simulation = Simulation()
    sweeps: dict[str, Sweep] = Field(default_factory=dict)
    cluster: ClusterConfig | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Config:
        if self.cluster is not None and "devices" in self.model_fields_set:
            raise ValueError("give devices (of one machine) or cluster, not both")
        return self

    @property
    def instances(self) -> int:
        """How many devices there are."""
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def device_names(self) -> list[str]:
        """Their names, numbers where they have none."""
        if isinstance(self.devices, int):
            return [str(number) for number in range(self.devices)]
        return self.devices

    @property
    def sweepable(self) -> list[str]:
        """The keys that a sweep may vary."""
        return list(SWEEPABLE)

    @model_validator(mode="after")
    def _sweepable(self) -> Config:
        if unknown := set(self.sweeps) - set(self.sweepable):
            hint = nearest(min(unknown), self.sweepable)
            raise ValueError(f"sweeps: cannot sweep {min(unknown)!r}; {hint}")
        return self


class Experiment(Config, Model):
    """A file with one model; an instance of it is on each device."""


class StagesExperiment(StagesModel, Experiment):
    """A pipeline on `pools` of workers."""

    pools: dict[str, PoolConfig] = Field(default_factory=lambda: {"gpu": PoolConfig()})

    @model_validator(mode="after")
    def _pools(self) -> StagesExperiment:
        for name, stage in self.stages.items():
            if stage.pool not in self.pools:
                hint = nearest(stage.pool, self.pools)
                raise ValueError(f"stage {name!r}: unknown pool {stage.pool!r}; {hint}")
        if unused := set(self.pools) - {stage.pool for stage in self.stages.values()}:
            raise ValueError(f"pools without a stage: {sorted(unused)}")
        return self

    @model_validator(mode="after")
    def _truth(self) -> StagesExperiment:
        for name in self.simulation.truth:
            if name not in self.stages:
                hint = nearest(name, self.stages)
                raise ValueError(f"simulation.truth: unknown stage {name!r}; {hint}")
        return self


class LlmExperiment(LlmModel, Experiment):
    """A language model."""

    @model_validator(mode="after")
    def _no_truth(self) -> LlmExperiment:
        if self.simulation.truth:
            raise ValueError("simulation.truth: it is of stages, and an llm has none")
        return self


KINDS: tuple[type[Experiment], ...] = (StagesExperiment, LlmExperiment)
"""Of files with one model."""


def kind_of(values: Mapping[str, Any]) -> type[Experiment] | None:
    """Which kind of model `values` describe, by the key that only it has; None if neither."""
    if values.get("stages"):
        return StagesExperiment
    return LlmExperiment if values.get("llm") is not None else None
