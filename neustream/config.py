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
    """

    arrivals: Literal["gamma", "constant", "trace"] = "gamma"
    requests: PositiveInt = 500
    rate: PositiveFloat = 1.0
    load: PositiveFloat | None = None
    cv: float = Field(default=1.0, gt=0, le=1000)
    file: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: Steps = 1
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


class SloClass(_Strict):
    """A class of promises: as a `scale` of the request's own solo latency, or absolute."""

    name: str = ""
    share: PositiveFloat = 1.0
    weight: PositiveFloat = 1.0
    scale: PositiveFloat | None = None
    total_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one(self) -> SloClass:
        if (self.scale is None) == (self.total_s is None):
            raise ValueError("an SLO is either a scale or total_s, not both and not neither")
        return self


class Slo(_Strict):
    """What requests are promised: one `scale` or `total_s` for all, or `classes` drawn by share.

    With a scale, a request's SLO is `scale * (solo latency + extra_s)`.
    """

    scale: PositiveFloat | None = None
    total_s: PositiveFloat | None = None
    classes: list[SloClass] | None = Field(default=None, min_length=1)
    extra_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one(self) -> Slo:
        if sum(x is not None for x in (self.scale, self.total_s, self.classes)) != 1:
            raise ValueError("give exactly one of scale, total_s and classes")
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


SWEEPABLE = ("workload.rate", "workload.load", "workload.cv", "slo.scale")


class Experiment(_Strict):
    """One YAML file: a pipeline, its profiles, a workload, promises, and policies to compare."""

    name: str
    about: str = ""
    stages: dict[str, StageConfig] = Field(min_length=1)
    pools: dict[str, PoolConfig] = Field(default_factory=lambda: {"gpu": PoolConfig()})
    profiles: Path
    workload: Workload = Workload()
    slo: Slo
    policies: dict[str, dict[str, Any]] = Field(default={"default": {}}, min_length=1)
    simulation: Simulation = Simulation()
    sweeps: dict[str, Sweep] = Field(default_factory=dict)
    backend: Backend | None = None

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
