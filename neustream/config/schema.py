"""The YAML file of an experiment, as pydantic models, and how one is read.

Unknown keys, wrong types and impossible values are ConfigErrors that name the file, the key, the
value, and for a misspelt key the nearest valid one. Paths in a file are relative to that file;
paths given by `--set` are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neustream.config.fields import (
    MOST_REQUESTS,
    MOST_WORK,
    BatchSize,
    Factor,
    Name,
    Rate,
    Requests,
    Seconds,
    Section,
    Share,
    Steps,
    TokenCount,
    Tokens,
    mean_of,
)
from neustream.config.messages import explain, keys_at
from neustream.config.overrides import anchored, check_dropped, override
from neustream.config.yaml_file import read_document
from neustream.errors import ConfigError, nearest

MOST_WORKERS = 1024


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
    """Interchangeable workers; for `run`, `devices` names one device each."""

    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = 1
    sticky: bool = False
    devices: list[str] | None = None


class Burst(Section):
    """A surge: the `requests` that come after the first `after` do so `factor` times as fast (below 1: a lull)."""

    after: int = Field(ge=0, le=MOST_REQUESTS)
    requests: Requests
    factor: Factor


class Workload(Section):
    """Arrivals and step counts. `seed` seeds each draw anew (0: the artifact's numbers).

    `rate` is in requests per second; `load` instead of it makes the rate that many times what one
    request after the other could be served at, so that a config fits any machine. `burst` speeds up
    some of the arrivals; those before it stay as they are, those behind it keep their gaps.

    For an LLM, `prompt` are the tokens of the prompts, `output` those after which the model ends (which
    no policy knows), and `max_tokens` what requests allow at most, which policies do know.

    `trace` takes arrivals, and what requests ask for, from a file, in a `format` that its content tells
    or that is named: `requests` of it at most, from `start_s` for `duration_s`, `speed` times as fast.
    What the trace does not say is drawn; `columns` names those that count. A trace of texts needs a
    `tokenizer`, and one without arrivals has `arrivals: gamma` or `constant`. `configs/README.md` has more.
    """

    arrivals: Literal["gamma", "constant", "trace"] = "gamma"
    requests: Requests = 500
    rate: Rate = 1.0
    load: Factor | None = None
    cv: float = Field(default=1.0, ge=0.001, le=1000)
    trace: Path | None = None
    format: str = "auto"
    start_s: float = Field(default=0.0, ge=0, le=1e11)
    duration_s: Seconds | None = None
    speed: Factor = 1.0
    columns: list[str] | None = Field(default=None, min_length=1)
    tokenizer: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: Steps = 1
    prompt: Tokens = 128
    output: Tokens = 128
    max_tokens: TokenCount = 256
    burst: Burst | None = None

    @model_validator(mode="before")
    @classmethod
    def _arrivals_of_trace(cls, raw: Any) -> Any:
        """A trace brings its arrivals, unless others are asked for."""
        if isinstance(raw, dict) and raw.get("trace") is not None:
            return {"arrivals": "trace", **raw}
        return raw

    @model_validator(mode="after")
    def _trace(self) -> Workload:
        given = self.model_fields_set
        own = sorted(given & {"format", "start_s", "duration_s", "speed", "columns", "tokenizer"})
        if self.trace is None and (own or self.arrivals == "trace"):
            raise ValueError(f"{own[0] if own else 'arrivals: trace'} needs a trace: FILE")
        if self.arrivals == "trace" and (idle := [key for key in ("rate", "load", "cv", "burst") if key in given]):
            hint = dropped(*(f"workload.{key}" for key in idle))
            raise ValueError(f"a trace brings its arrivals: {', '.join(idle)} do not go with it; {hint}")
        if self.load is not None and "rate" in given:
            raise ValueError(f"load takes the place of rate; {either('workload.load', 'workload.rate')}")
        if self.burst is not None and self.burst.after >= self.requests:
            raise ValueError(f"burst: none comes after {self.burst.after} of {self.requests} requests")
        return self


def dropped(*keys: str) -> str:
    """How to be rid of keys."""
    return "drop it: " + " ".join(f"--set {key}=null" for key in keys)


def either(a: str, b: str) -> str:
    """How to be rid of one of two keys."""
    return f"drop one: --set {a}=null or --set {b}=null"


TOKEN_SLOS = ("first_scale", "step_scale", "first_s", "step_s")


def _check_slo(slo: Slo | SloClass) -> None:
    """What is wrong in combinations of promises, as ValueErrors."""
    for a, b in (("scale", "total_s"), ("first_scale", "first_s"), ("step_scale", "step_s")):
        if getattr(slo, a) is not None and getattr(slo, b) is not None:
            hint = f"; {either(f'slo.{a}', f'slo.{b}')}" if isinstance(slo, Slo) else ""
            raise ValueError(f"give {a} or {b}, not both{hint}")
    if slo.first_scale is None and slo.first_s is None and (slo.step_scale or slo.step_s) is not None:
        step = "step_s" if slo.step_scale is None else "step_scale"
        hint = f"; {dropped(f'slo.{step}')}" if isinstance(slo, Slo) else ""
        raise ValueError(f"{step} needs first_scale or first_s: output k is due at first + k * step{hint}")


class SloClass(Section):
    """A class of promises: as a `scale` of the request's own solo latency, or absolute; without any, none."""

    name: str = ""
    share: Share = 1.0
    weight: Share = 1.0
    scale: Share | None = None
    total_s: Seconds | None = None
    first_scale: Share | None = None
    step_scale: Share | None = None
    first_s: Seconds | None = None
    step_s: Seconds | None = None

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> SloClass:
        _check_slo(self)
        return self


class Slo(Section):
    """What requests are promised: one `scale` or `total_s` for all, or `classes` drawn by share.

    With a scale, a request's SLO is `scale * (solo latency + extra_s)`. Outputs of an LLM: the first is
    due after `first_s` (TTFT), or `first_scale` times the prefill of that prompt alone; each further one
    `step_s` later (TPOT, cumulative: an early token buys slack), or `step_scale` times a decode alone
    in the middle of the request's `max_tokens`. A scale of an LLM's whole request is of all `max_tokens`.
    With none of them, nothing is promised: requests are on time whenever they end.
    """

    scale: Share | None = None
    total_s: Seconds | None = None
    classes: list[SloClass] | None = Field(default=None, min_length=1)
    first_scale: Share | None = None
    step_scale: Share | None = None
    first_s: Seconds | None = None
    step_s: Seconds | None = None
    extra_s: float = Field(default=0.0, ge=0, le=1e9)

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        if self.classes is not None:
            return any(some.of_tokens for some in self.classes)
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> Slo:
        _check_slo(self)
        alone = [name for name in ("scale", "total_s", *TOKEN_SLOS) if getattr(self, name) is not None]
        if self.classes is not None and alone:
            raise ValueError(f"{alone[0]} goes into the classes, or alone; {either('slo.classes', f'slo.{alone[0]}')}")
        return self


class Slowdown(Section):
    """A time during which the device is slower: steps that start in it take `factor` times as long."""

    start_s: float = Field(ge=0, le=1e13)
    duration_s: float = Field(ge=1e-9, le=1e13)
    factor: Factor


class Simulation(Section):
    """How the simulated device differs from its profile.

    `handover_s` is added to each step (from the end of one to the start of the next: what a table
    of bare model calls leaves out), `decision_s` passes while a policy decides, beside the step
    under way where there is one; by default both are what the profiles were measured with, or 0.
    `latency_scale` multiplies and `latency_noise` spreads each step's latency (the
    sigma of a log-normal factor of median 1, drawn with the workload's seed). `slowdowns` are times
    of the trace during which steps take longer still (a neighbour on the device, throttling); where
    they overlap, all of them count. Policies know of none of this.
    """

    handover_s: float | None = Field(default=None, ge=0, le=1e6)
    decision_s: float | None = Field(default=None, ge=0, le=1e6)
    latency_scale: Factor = 1.0
    latency_noise: float = Field(default=0.0, ge=0, le=5)
    slowdowns: list[Slowdown] = Field(default=[])


class Sweep(Section):
    """What `neustream sweep` varies by default: the values, and other keys that it holds meanwhile."""

    values: list[Share] = Field(min_length=1)
    at: dict[str, Any] = Field(default_factory=dict)


class Backend(BaseModel):
    """Real models for `profile` and `run`: the name of a backend, or `module:function`; and its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str
    check_finite: bool = False
    allow_other_device: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


ASIDE = "x-"
"""What keys at the top begin with that hold nothing but anchors."""

SWEEPABLE = (
    "workload.rate",
    "workload.load",
    "workload.cv",
    "workload.speed",
    "slo.scale",
    "slo.first_scale",
    "slo.step_scale",
)


class MemoryConfig(Section):
    """The KV cache of one worker: room for `tokens`, in blocks of `block`."""

    tokens: Annotated[int, Field(ge=1, le=2**40)]
    block: Annotated[int, Field(ge=1, le=2**20)] = 16

    @model_validator(mode="after")
    def _one_block(self) -> MemoryConfig:
        if self.tokens < self.block:
            raise ValueError(f"tokens {self.tokens} is less than one block of {self.block}")
        return self


class LlmConfig(Section):
    """A language model in place of `stages`: prefill, then decode until the end.

    `max_batch`: the most requests in one step. `profile`: the file of the `profiles` folder (without
    .json) with its steps. `memory`: its KV cache; without one, memory is no limit.
    `step_tokens`: the most tokens that one step computes where prompts are prefilled in parts.
    `instances`: so many of it, each on a device of its own with its own memory; a request goes to the
    one with the least work left, and stays there.
    """

    max_batch: BatchSize = 256
    profile: str = "steps"
    memory: MemoryConfig | None = None
    step_tokens: TokenCount = 2048
    instances: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = 1


class Experiment(Section):
    """One YAML file: a pipeline, its profiles, a workload, promises, and policies to compare."""

    name: Name
    about: str = ""
    stages: dict[str, StageConfig] = Field(default_factory=dict)
    llm: LlmConfig | None = None
    pools: dict[str, PoolConfig] = Field(default_factory=lambda: {"gpu": PoolConfig()})
    profiles: Path
    workload: Workload = Workload()
    slo: Slo = Slo()
    policies: dict[str, dict[str, Any]] = Field(default={"default": {}}, min_length=1)
    simulation: Simulation = Simulation()
    sweeps: dict[str, Sweep] = Field(default_factory=dict)
    backend: Backend | None = None

    @field_validator("slo", mode="before")
    @classmethod
    def _no_promise(cls, slo: Any) -> Any:
        return {} if slo is None else slo

    @model_validator(mode="before")
    @classmethod
    def _stages_of_llm(cls, raw: Any) -> Any:
        """An LLM has two stages, on the one pool, that share its profile."""
        if isinstance(raw, dict) and raw.get("llm") is not None:
            if raw.get("stages"):
                raise ValueError("give stages or llm, not both")
            llm = raw["llm"] if isinstance(raw["llm"], dict) else {}
            each = {"max_batch": llm.get("max_batch", 256), "profile": [llm.get("profile", "steps")]}
            return {**raw, "stages": {"llm.prefill": each, "llm.decode": each}}
        if isinstance(raw, dict) and not raw.get("stages"):
            raise ValueError("give stages (a pipeline) or llm (a language model)")
        return raw

    @model_validator(mode="after")
    def _tokens(self) -> Experiment:
        drawn = {"prompt", "output", "max_tokens"} & self.workload.model_fields_set
        if self.llm is None and (self.slo.of_tokens or drawn):
            what = "slo" if self.slo.of_tokens else f"workload.{min(drawn)}"
            raise ValueError(f"{what}: promises and numbers of tokens are for an llm")
        if self.llm is not None and set(self.pools) != {"gpu"}:
            raise ValueError(f"an llm runs on the one pool 'gpu', got {sorted(self.pools)}")
        if self.llm is not None and self.pools["gpu"].workers > 1:
            raise ValueError("pools.gpu.workers: an llm's memory is one worker's; for several there is llm.instances")
        return self

    @model_validator(mode="after")
    def _work(self) -> Experiment:
        """A workload that no machine finishes is not even drawn."""
        load = self.workload
        each = sum(mean_of(load.steps) for stage in self.stages.values() if stage.times == "steps")
        if self.llm is not None:
            each = min(mean_of(load.output), load.max_tokens)
        if load.requests * each > MOST_WORK:
            steps = f"{load.requests} requests of about {each:g} steps each"
            raise ValueError(f"workload: {steps} are more than {MOST_WORK} in all")
        return self

    @model_validator(mode="after")
    def _pools(self) -> Experiment:
        for name, stage in self.stages.items():
            if stage.pool not in self.pools:
                raise ValueError(f"stage {name!r}: unknown pool {stage.pool!r}; {nearest(stage.pool, self.pools)}")
        if unknown := set(self.sweeps) - set(SWEEPABLE):
            raise ValueError(f"sweeps: cannot sweep {min(unknown)!r}; {nearest(min(unknown), SWEEPABLE)}")
        if unused := set(self.pools) - {stage.pool for stage in self.stages.values()}:
            raise ValueError(f"pools without a stage: {sorted(unused)}")
        return self


PATHS = ("profiles", "workload.trace", "workload.tokenizer")
"""Keys whose values are paths."""


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read `path` and apply `overrides` of the form `dotted.key=value` (see `neustream.config.overrides`).

    Raises:
        ConfigError: it names the file, the line or the override, the key, the value, and what is allowed.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are a list of texts dotted.key=value, got {overrides!r}")
    path = Path(path)
    document = read_document(path)
    values = {key: value for key, value in document.values.items() if not str(key).startswith(ASIDE)}
    for key in PATHS:
        values = anchored(values, key, path.parent)
    changed = []
    for text in overrides:
        values, place = override(values, text, {"sweeps": SWEEPABLE}, free=["backend"])
        check_dropped(values, place, keys_at(Experiment, place[:-1]), f"--set {text}")
        changed.append(place)
        for key in PATHS:
            if tuple(key.split("."))[: len(place)] == place:
                values = anchored(values, key, Path.cwd())
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = {place: line for place, line in document.lines.items() if place not in changed}
        raise ConfigError(f"{path}: {explain(error, Experiment, lines, changed)}") from None
