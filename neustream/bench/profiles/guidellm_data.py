"""The data of guidellm's scenarios: what requests ask for, as sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from neustream.bench.profiles.marks import Count, Ignored, Positive, Refused, Section
from neustream.workload.lengths import Lengths

TOOLS = Refused("no tools are called")


def kind_of(value: Any) -> Any:
    """The key `kind` of a section, whatever it is."""
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


def drawn(mean: int, std: float | None, least: int | None, most: int | None) -> Lengths:
    """Lengths as guidellm draws them; without a deviation, from `least` to `most` equally often."""
    spread = math.ceil(5 * std) if std else 0
    low = least if least is not None else max(1, mean - spread)
    high = most if most is not None else mean + spread
    if low > high:
        raise ValueError(f"the least ({low}) is greater than the most ({high})")
    return (
        Lengths("normal", mean, std, low, high)
        if std and low < high
        else Lengths.between(low, high)
    )


class Bucket(Section):
    bucket_weight: Count = 100
    prefix_count: Count = 1
    prefix_tokens: int = Field(default=0, ge=0)


class Synthetic(Section):
    kind: Literal["synthetic_text"] = "synthetic_text"
    load_kwargs: Annotated[dict[str, Any], Ignored("nothing is loaded")] = {}
    prompt_tokens: Count
    prompt_tokens_stdev: Positive | None = None
    prompt_tokens_min: Count | None = None
    prompt_tokens_max: Count | None = None
    output_tokens: Count | None = None
    output_tokens_stdev: Positive | None = None
    output_tokens_min: Count | None = None
    output_tokens_max: Count | None = None
    first_prompt_tokens: Count | None = None
    first_prompt_tokens_stdev: Positive | None = None
    first_prompt_tokens_min: Count | None = None
    first_prompt_tokens_max: Count | None = None
    first_output_tokens: Count | None = None
    first_output_tokens_stdev: Positive | None = None
    first_output_tokens_min: Count | None = None
    first_output_tokens_max: Count | None = None
    delay: Positive | None = None
    delay_stdev: Positive | None = None
    delay_min: float | None = Field(default=None, ge=0)
    delay_max: Positive | None = None
    turns: Count = 1
    tool_call_turns: Annotated[Any, TOOLS] = []
    tools: Annotated[Any, TOOLS] = None
    tool_response_tokens: Annotated[int | None, TOOLS] = None
    tool_response_tokens_stdev: Annotated[int | None, TOOLS] = None
    tool_response_tokens_min: Annotated[int | None, TOOLS] = None
    tool_response_tokens_max: Annotated[int | None, TOOLS] = None
    server_tool_call_turns: Annotated[Any, TOOLS] = []
    branches: Annotated[
        list[Any], Refused("turns of a session follow each other; none branch")
    ] = []
    prefix_count: Count | None = None
    prefix_tokens: int | None = Field(default=None, ge=0)
    prefix_buckets: list[Bucket] | None = None

    @model_validator(mode="after")
    def _once(self) -> Synthetic:
        shorthand = self.prefix_count is not None or self.prefix_tokens is not None
        if shorthand and self.prefix_buckets:
            raise ValueError("prefix_buckets and prefix_count or prefix_tokens are both given")
        for name in ("prompt_tokens", "output_tokens"):
            self.lengths(name)
        return self

    def lengths(self, name: str) -> Lengths | None:
        """Of prompts or outputs, by the name of the key; None: not said."""
        mean = getattr(self, name)
        if mean is None:
            return None
        ends = (getattr(self, f"{name}_{end}") for end in ("stdev", "min", "max"))
        return drawn(mean, *ends)

    def buckets(self) -> list[Bucket]:
        """Prefixes that prompts share; none: prompts have none."""
        if self.prefix_count is not None or self.prefix_tokens is not None:
            return [
                Bucket(prefix_count=self.prefix_count or 1, prefix_tokens=self.prefix_tokens or 0)
            ]
        return self.prefix_buckets or []


class OtherData(Section, extra="allow"):
    kind: str


def _data(value: Any) -> str:
    return "(synthetic)" if kind_of(value) in (None, "synthetic_text") else "(other)"


AnyData = Annotated[
    Annotated[Synthetic, Tag("(synthetic)")] | Annotated[OtherData, Tag("(other)")],
    Discriminator(_data),
]
