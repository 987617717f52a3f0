"""The YAML file of an experiment, as pydantic models, and how one is read.

Unknown keys, wrong types and impossible values are ConfigErrors that name the file, the key, the
value, and for a misspelt key the nearest valid one. Paths in a file are relative to that file;
paths given by `--set` are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Strict,
    Tag,
    ValidationError,
    model_validator,
)

from neustream.errors import ConfigError, nearest
from neustream.explain import explain, one_line


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, raw: Any) -> Any:
        for key, field in cls.model_fields.items() if isinstance(raw, dict) else ():
            if isinstance(raw.get(key), bool) and field.annotation is not bool:
                raise ValueError(f"{key} cannot be {str(raw[key]).lower()}")
        return raw


class StageConfig(_Strict):
    """One stage of the pipeline.

    `times` names the request parameter that says how often the stage runs (its loop); without it
    the stage runs once. `profile` names files of the `profiles` folder (without .json), whose
    modules run back to back as one step; it defaults to the stage's own name.
    """

    max_batch: PositiveInt = 1
    times: str | None = None
    profile: list[str] | None = Field(default=None, min_length=1)
    pool: str = "gpu"


class PoolConfig(_Strict):
    """Interchangeable workers; for `run`, `devices` names one device each."""

    workers: PositiveInt = 1
    sticky: bool = False
    devices: list[str] | None = None


class Between(_Strict):
    """Whole numbers drawn uniformly, both ends included."""

    min: int = Field(ge=0)
    max: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Between:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Choices(_Strict):
    """One of some values, equally often."""

    choices: list[Annotated[int, Strict(), Field(ge=0)]] = Field(min_length=1)


def _kind_of_steps(value: Any) -> str:
    if isinstance(value, Choices) or (isinstance(value, dict) and not {"min", "max"} & set(value)):
        return "of choices"
    return "from to" if isinstance(value, dict | Between) else "a number"


Steps = Annotated[
    Annotated[int, Tag("a number")] | Annotated[Between, Tag("from to")] | Annotated[Choices, Tag("of choices")],
    Discriminator(_kind_of_steps),
]
"""One number for all requests, or how each request's is drawn."""


class LogNormal(_Strict):
    """Whole numbers around `median`, log-normal with `sigma`, cut off at `min` and `max`."""

    median: PositiveFloat
    sigma: float = Field(ge=0, le=5)
    min: PositiveInt = 1
    max: PositiveInt = 2**20

    @model_validator(mode="after")
    def _ordered(self) -> LogNormal:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


def _kind_of_tokens(value: Any) -> str:
    if isinstance(value, LogNormal) or (isinstance(value, dict) and "median" in value):
        return "log-normal"
    return _kind_of_steps(value)


Tokens = Annotated[
    Annotated[int, Tag("a number")]
    | Annotated[Between, Tag("from to")]
    | Annotated[Choices, Tag("of choices")]
    | Annotated[LogNormal, Tag("log-normal")],
    Discriminator(_kind_of_tokens),
]
"""How many tokens a text has: for all requests, or how each request's number is drawn."""


class Burst(_Strict):
    """A surge: the `requests` that come after the first `after` do so `factor` times as fast (below 1: a lull)."""

    after: int = Field(ge=0)
    requests: PositiveInt
    factor: PositiveFloat


class Workload(_Strict):
    """Arrivals and step counts. `seed` seeds each draw anew (0: the artifact's numbers).

    `rate` is in requests per second; `load` instead of it makes the rate that many times what one
    request after the other could be served at, so that a config fits any machine. `burst` speeds up
    some of the arrivals; those before it stay as they are, those behind it keep their gaps.

    For an LLM, `prompt` are the tokens of the prompts, `output` those after which the model ends (which
    no policy knows), and `max_tokens` what requests allow at most, which policies do know. A trace may
    have columns `prompt_tokens`, `output_tokens` and `max_tokens` instead.
    """

    arrivals: Literal["gamma", "constant", "trace"] = "gamma"
    requests: PositiveInt = 500
    rate: PositiveFloat = 1.0
    load: PositiveFloat | None = None
    cv: float = Field(default=1.0, gt=0, le=1000)
    file: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: Steps = 1
    prompt: Tokens = 128
    output: Tokens = 128
    max_tokens: PositiveInt = 256
    burst: Burst | None = None

    @model_validator(mode="after")
    def _file(self) -> Workload:
        if (self.arrivals == "trace") != (self.file is not None):
            raise ValueError("arrivals: trace needs a file, and a file needs arrivals: trace")
        if self.load is not None and ("rate" in self.model_fields_set or self.arrivals == "trace"):
            raise ValueError("load takes the place of rate, and does not go with arrivals: trace")
        if self.burst is not None and self.arrivals == "trace":
            raise ValueError("burst does not go with arrivals: trace")
        if self.burst is not None and self.burst.after >= self.requests:
            raise ValueError(f"burst: none comes after {self.burst.after} of {self.requests} requests")
        if isinstance(self.steps, int) and self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        return self


TOKEN_SLOS = ("first_scale", "step_scale", "first_s", "step_s")


def _check_slo(slo: Any) -> None:
    """What is wrong in combinations of promises, as ValueErrors."""
    for a, b in (("scale", "total_s"), ("first_scale", "first_s"), ("step_scale", "step_s")):
        if getattr(slo, a) is not None and getattr(slo, b) is not None:
            raise ValueError(f"give {a} or {b}, not both")
    if slo.first_scale is None and slo.first_s is None and (slo.step_scale or slo.step_s) is not None:
        raise ValueError("step_scale and step_s need first_scale or first_s: output k is due at first + k * step")


class SloClass(_Strict):
    """A class of promises: as a `scale` of the request's own solo latency, or absolute."""

    name: str = ""
    share: PositiveFloat = 1.0
    weight: PositiveFloat = 1.0
    scale: PositiveFloat | None = None
    total_s: PositiveFloat | None = None
    first_scale: PositiveFloat | None = None
    step_scale: PositiveFloat | None = None
    first_s: PositiveFloat | None = None
    step_s: PositiveFloat | None = None

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> SloClass:
        _check_slo(self)
        if self.scale is None and self.total_s is None and not self.of_tokens:
            raise ValueError("an SLO is a scale or total_s, or for outputs first_* and step_*; none is given")
        return self


class Slo(_Strict):
    """What requests are promised: one `scale` or `total_s` for all, or `classes` drawn by share.

    With a scale, a request's SLO is `scale * (solo latency + extra_s)`. Outputs of an LLM: the first is
    due after `first_s` (TTFT), or `first_scale` times the prefill of that prompt alone; each further one
    `step_s` later (TPOT, cumulative: an early token buys slack), or `step_scale` times a decode alone
    in the middle of the request's `max_tokens`. A scale of an LLM's whole request is of all `max_tokens`.
    """

    scale: PositiveFloat | None = None
    total_s: PositiveFloat | None = None
    classes: list[SloClass] | None = Field(default=None, min_length=1)
    first_scale: PositiveFloat | None = None
    step_scale: PositiveFloat | None = None
    first_s: PositiveFloat | None = None
    step_s: PositiveFloat | None = None
    extra_s: float = Field(default=0.0, ge=0)

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        if self.classes is not None:
            return any(some.of_tokens for some in self.classes)
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> Slo:
        _check_slo(self)
        alone = [self.scale, self.total_s, *(getattr(self, name) for name in TOKEN_SLOS)]
        given = sum(x is not None for x in (self.scale, self.total_s, self.classes))
        if self.classes is not None and any(x is not None for x in alone):
            raise ValueError("give exactly one of scale, total_s and classes; promises of tokens go into the classes")
        if given != 1 and not (given == 0 and any(x is not None for x in alone)):
            raise ValueError("give exactly one of scale, total_s and classes (or, for an LLM, first_* and step_*)")
        return self


class Slowdown(_Strict):
    """A time during which the device is slower: steps that start in it take `factor` times as long."""

    start_s: float = Field(ge=0)
    duration_s: PositiveFloat
    factor: PositiveFloat


class Simulation(_Strict):
    """How the simulated device differs from its profile.

    `step_overhead_s` is added to each step (launching, copying: what a table of bare model calls
    leaves out); `latency_scale` multiplies and `latency_noise` spreads each step's latency (the
    sigma of a log-normal factor of median 1, drawn with the workload's seed). `slowdowns` are times
    of the trace during which steps take longer still (a neighbour on the device, throttling); where
    they overlap, all of them count. Policies know of none of this.
    """

    step_overhead_s: float = Field(default=0.0, ge=0)
    latency_scale: PositiveFloat = 1.0
    latency_noise: float = Field(default=0.0, ge=0, le=5)
    slowdowns: list[Slowdown] = []


class Sweep(_Strict):
    """What `neustream sweep` varies by default: the values, and other keys that it holds meanwhile."""

    values: list[PositiveFloat] = Field(min_length=1)
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


SWEEPABLE = (
    "workload.rate",
    "workload.load",
    "workload.cv",
    "slo.scale",
    "slo.first_scale",
    "slo.step_scale",
)


class MemoryConfig(_Strict):
    """The KV cache of one worker: room for `tokens`, in blocks of `block`."""

    tokens: PositiveInt
    block: PositiveInt = 16

    @model_validator(mode="after")
    def _one_block(self) -> MemoryConfig:
        if self.tokens < self.block:
            raise ValueError(f"tokens {self.tokens} is less than one block of {self.block}")
        return self


class LlmConfig(_Strict):
    """A language model in place of `stages`: prefill, then decode until the end.

    `max_batch`: the most requests in one step. `profile`: the file of the `profiles` folder (without
    .json) with its steps. `memory`: its KV cache; without one, memory is no limit.
    `step_tokens`: the most tokens that one step computes where prompts are prefilled in parts.
    """

    max_batch: PositiveInt = 256
    profile: str = "steps"
    memory: MemoryConfig | None = None
    step_tokens: PositiveInt = 2048


class Experiment(_Strict):
    """One YAML file: a pipeline, its profiles, a workload, promises, and policies to compare."""

    name: str
    about: str = ""
    stages: dict[str, StageConfig] = Field(default_factory=dict)
    llm: LlmConfig | None = None
    pools: dict[str, PoolConfig] = Field(default_factory=lambda: {"gpu": PoolConfig()})
    profiles: Path
    workload: Workload = Workload()
    slo: Slo
    policies: dict[str, dict[str, Any]] = Field(default={"default": {}}, min_length=1)
    simulation: Simulation = Simulation()
    sweeps: dict[str, Sweep] = Field(default_factory=dict)
    backend: Backend | None = None

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
            raise ValueError("pools.gpu.workers: an llm's memory is one worker's; several are several pools")
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


PATHS = ("profiles", "workload.file")
"""Keys whose values are paths."""


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read `path` and apply `overrides` of the form `dotted.key=value` (values are YAML)."""
    try:
        raw = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(raw).__name__}")
    for key in PATHS:
        _anchor(raw, key, path.parent)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected dotted.key=value")
        try:
            _set(raw, key, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: {one_line(error)}") from None
        if key in PATHS:
            _anchor(raw, key, Path.cwd())
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Experiment)}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _anchor(raw: dict[str, Any], key: str, folder: Path) -> None:
    *parents, last = key.split(".")
    at: Any = raw
    for part in parents:
        at = at.get(part) if isinstance(at, dict) else None
    if isinstance(at, dict) and isinstance(at.get(last), str):
        at[last] = str(folder / at[last])


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    at: Any = raw
    for part in parents:
        at = at.setdefault(part, {})
        if at is None or not isinstance(at, dict):
            raise ConfigError(f"--set {key}: {part!r} is not a section")
    at[last] = value
