"""The sections of a report about who served, and what was asked."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from neustream.bench.reports.schema import Open, Section, Whole
from pydantic import ConfigDict, Field, field_validator

Some = Annotated[int, Field(ge=1)]


class ComponentMetadata(Section):
    schema_version: str = "0.0.1"
    label: str
    cfg_id: str
    description: str | None = None


class Parallelism(Section):
    tp: Whole = 1
    dp: Whole = 1
    dp_local: Whole = 1
    workers: Whole = 1
    ep: Some = 1
    pp: Some = 1


class Accelerator(Section):
    model: str
    count: Whole
    parallelism: Parallelism


class Model(Section):
    name: str


class Engine(Section):
    kind: Literal["inference_engine"]
    tool: str
    tool_version: str
    role: Literal["replica", "prefill", "decode"]
    replicas: Some
    model: Model
    accelerator: Accelerator


class Generic(Open):
    """Any other part of what serves: a router, a scheduler."""

    kind: Literal["generic"]
    tool: str
    tool_version: str


class Native(Section):
    """As the tool itself has it."""

    args: dict[str, Any] | None = None
    envars: dict[str, Any] | None = None
    config: Any = None


class Component(Section):
    metadata: ComponentMetadata
    standardized: Annotated[Engine | Generic, Field(discriminator="kind")]
    native: Native


class SequenceLength(Section):
    distribution: Literal["fixed", "gaussian", "uniform", "other"]
    value: Annotated[float, Field(ge=0)] | Whole
    std_dev: float | None = Field(default=None, ge=0)
    min: Whole | None = None
    max: Some | None = None


class Prefix(Section):
    prefix_len: SequenceLength
    num_groups: Some
    num_users_per_group: Some
    num_prefixes: Some


class MultiTurn(Section):
    enabled: bool = True
    max_turns: SequenceLength | None = None


class LoadMetadata(Section):
    schema_version: str = "0.0.1"
    cfg_id: str | None = None
    description: str | None = None


class LoadStandardized(Section):
    """A load in the words of all tools; it has none for arrivals, bursts and promises.

    inf is a rate or concurrency without a bound.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)

    tool: str
    tool_version: str
    parallelism: Some = 1
    source: Literal["random", "sampled", "unknown"]
    stage: Whole = 0
    input_seq_len: SequenceLength
    output_seq_len: SequenceLength | None = None
    prefix: Prefix | None = None
    multi_turn: MultiTurn | None = None
    rate_qps: float | None = Field(default=None, gt=0)
    concurrency: int | float | None = Field(default=None, ge=1)

    @field_validator("concurrency")
    @classmethod
    def _whole(cls, value: int | float | None) -> int | float | None:
        if isinstance(value, float) and not math.isinf(value):
            raise ValueError("expected a whole number, or .inf")
        return value


class LoadSection(Section):
    metadata: LoadMetadata
    standardized: LoadStandardized
    native: Native


class Scenario(Section):
    stack: list[Component] | None = None
    load: LoadSection | None = None
