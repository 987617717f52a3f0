"""The scheduler's settings inside vLLM: `additional_config={"neustream": {...}}`, or a YAML file
that it names.

policy: priced          # one of the library's, "default", or module:Class
options: {price: 0.9}   # the policy's parameters
profile: a100/llama.json    # where the step latency starts from; without it, from nothing
slo: {ttft_ms: 500, tpot_ms: 50}    # what requests are promised that say nothing themselves
log_every_s: 60
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from neustream.backends.vllm.slo_args import LARGEST_MS, LARGEST_WEIGHT
from neustream.config.messages import explain
from neustream.config.yaml_file import read_document
from neustream.core.policies import DEFAULT, POLICIES
from neustream.core.policy import Policy
from neustream.core.types import SLO
from neustream.errors import ConfigError, nearest
from neustream.experiment.policies import load_object

KEY = "neustream"
"""Where our settings are in vLLM's `additional_config`."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DefaultSLO(_Section):
    """SLOs of requests that bring none of their own."""

    ttft_ms: float | None = Field(default=None, gt=0, le=LARGEST_MS, strict=True)
    tpot_ms: float | None = Field(default=None, gt=0, le=LARGEST_MS, strict=True)
    total_ms: float | None = Field(default=None, gt=0, le=LARGEST_MS, strict=True)
    weight: float = Field(default=1.0, gt=0, le=LARGEST_WEIGHT, strict=True)

    @model_validator(mode="after")
    def _counted_from_the_first(self) -> DefaultSLO:
        if self.tpot_ms is not None and self.ttft_ms is None:
            raise ValueError("tpot_ms needs ttft_ms: token k is due at ttft_ms + k * tpot_ms")
        return self

    def slo(self) -> SLO:
        total, first, step = (
            math.inf if ms is None else ms / 1e3
            for ms in (self.total_ms, self.ttft_ms, self.tpot_ms)
        )
        return SLO(total, first, step, self.weight)


class Settings(_Section):
    """All of it; the module's docstring is an example."""

    policy: str = "default"
    options: dict[str, Any] = Field(default_factory=dict)
    profile: Path | None = None
    slo: DefaultSLO = DefaultSLO()
    log_every_s: PositiveFloat = 60.0


def load(additional: Any) -> Settings:
    """The settings in vLLM's `additional_config`; they override those of its `config` file."""
    raw = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    where = f"additional_config[{KEY!r}]"
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {raw!r}")
    given = dict(raw)
    if (path := given.pop("config", None)) is not None:
        if not isinstance(path, str | Path):
            raise ConfigError(f"{where}: config must be the path of a YAML file, got {path!r}")
        given = {**_file(Path(path)), **given}
        where = str(path)
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Settings)}") from None


def build_policy(settings: Settings) -> Policy:
    """The policy that the settings name, with their options."""
    name = DEFAULT if settings.policy == "default" else settings.policy
    make = POLICIES.get(name) or (load_object(name, "policy") if ":" in name else None)
    if make is None:
        raise ConfigError(
            f"unknown policy {name!r}; {nearest(name, [*POLICIES, 'default'])}; or module:Class"
        )
    options = dict(settings.options)
    if dataclasses.is_dataclass(make):
        hints = typing.get_type_hints(make)
        known = [field.name for field in dataclasses.fields(make)]
        for key, value in options.items():
            if key not in known:
                raise ConfigError(f"policy {name!r}: unknown option {key!r}; {nearest(key, known)}")
            try:
                options[key] = TypeAdapter(hints[key]).validate_python(value)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ConfigError(
                    f"policy {name!r}: option {key}: {problem}, got {value!r}"
                ) from None
    try:
        policy: Policy = make(**options)
    except TypeError as error:
        raise ConfigError(f"policy {name!r}: {error}") from None
    if not callable(getattr(policy, "decide", None)):
        raise ConfigError(
            f"policy {name!r} makes a {type(policy).__name__}, which has no decide(view)"
        )
    return policy


def _file(path: Path) -> dict[str, Any]:
    raw = dict(read_document(path).values)
    if isinstance(raw.get("profile"), str):
        raw["profile"] = path.parent / raw["profile"]
    return raw
