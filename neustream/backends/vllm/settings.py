"""The scheduler's settings inside vLLM: `additional_config={"neustream": {...}}`, or a YAML file
that it names.

policy: priced          # one of the library's, "default", or module:Class
options: {price: 0.9}   # the policy's parameters
profile: a100/llama.json    # where the step latency starts from; without it, from nothing
slo: {ttft_ms: 500, tpot_ms: 50}    # what requests are promised that say nothing themselves
log_every_s: 60
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from neustream.backends.vllm.slo_args import LARGEST_MS, LARGEST_WEIGHT
from neustream.by_name import make_policy
from neustream.config.messages import explain
from neustream.config.yaml_file import read_document
from neustream.core.policy import Policy
from neustream.core.types import SLO
from neustream.errors import ConfigError

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
    return make_policy(settings.policy, settings.options, where="options")


def _file(path: Path) -> dict[str, Any]:
    raw = dict(read_document(path).values)
    if isinstance(raw.get("profile"), str):
        raw["profile"] = path.parent / raw["profile"]
    return raw
