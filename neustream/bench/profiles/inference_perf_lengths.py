"""Distributions of lengths in inference-perf's profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from neustream.bench.profiles.marks import Count, Ignored, Length, Section
from neustream.workload.lengths import Kind, Lengths


class Distribution(Section):
    """Lengths, in tokens; values outside of min and max are moved to these."""

    min: Length = 10
    max: Length = Field(default=1024, ge=1)
    mean: float = Field(default=512, ge=0, le=1e7)
    std_dev: float = Field(default=200, ge=0, le=1e7)
    total_count: Annotated[
        Count | None, Ignored("as many lengths are drawn as there are requests")
    ] = None
    type: Literal["normal", "skew_normal", "lognormal", "uniform", "poisson", "fixed"] = "normal"
    variance: float | None = Field(default=None, ge=0, le=1e14)
    skew: float = Field(default=0.0, ge=-1e6, le=1e6)

    @model_validator(mode="after")
    def _possible(self) -> Distribution:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is greater than max {self.max}")
        if self.variance is not None and "std_dev" in self.model_fields_set:
            raise ValueError("std_dev and variance are both given")
        return self

    def lengths(self, shifted: bool = False) -> Lengths:
        """What is drawn. `shifted`: lognormal above `min`, as prompts of the type random are."""
        spread = self.std_dev if self.variance is None else math.sqrt(self.variance)
        if self.type == "fixed":
            return Lengths.fixed(self.mean)
        if self.min == self.max or (self.type == "normal" and not spread):
            return Lengths.fixed(min(max(self.mean, self.min), self.max))
        kind: Kind = "lognormal above min" if shifted and self.type == "lognormal" else self.type
        return Lengths(kind, self.mean, spread, self.min, self.max, self.skew)


def _form(value: Any) -> str:
    return "(distribution)" if isinstance(value, Mapping | Distribution) else "(number)"


Drawn = Annotated[
    Annotated[Length, Tag("(number)")] | Annotated[Distribution, Tag("(distribution)")],
    Discriminator(_form),
]
"""A length, or a distribution of lengths."""
