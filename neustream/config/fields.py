"""What the sections of a config are made of: sections without unknown keys, and numbers with bounds.

The bounds leave room for any experiment that a machine can finish, and for none that it cannot.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag, model_validator

MOST_REQUESTS = 10**7
MOST_STEPS = 10**6
"""Of one request."""
MOST_TOKENS = 2**24
"""Of one text."""
MOST_WORK = 10**9
"""Steps of all requests."""
MOST_WORKERS = 1024

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Of an experiment: it stands in tables, figures and the ids of requests."""
Requests = Annotated[int, Field(ge=1, le=MOST_REQUESTS)]
Count = Annotated[int, Field(ge=0, le=MOST_STEPS)]
TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]
"""Per second."""
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
Share = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Of a whole, in any unit."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, raw: Any) -> Any:
        for key, field in cls.model_fields.items() if isinstance(raw, dict) else ():
            if isinstance(raw.get(key), bool) and field.annotation is not bool:
                raise ValueError(f"{key} cannot be {str(raw[key]).lower()}")
        return raw


class Range(Section):
    """A section with bounds, both included; each kind says what its numbers are."""

    min: Any
    max: Any

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Between(Range):
    """Whole numbers drawn uniformly, both ends included."""

    min: Count
    max: Count


class Choices(Section):
    """One of some values, equally often."""

    choices: list[Annotated[Count, Strict()]] = Field(min_length=1)


def _kind_of_steps(value: Any) -> str:
    if isinstance(value, Choices) or (isinstance(value, dict) and not {"min", "max"} & set(value)):
        return "of choices"
    return "from to" if isinstance(value, dict | Between) else "a number"


Steps = Annotated[
    Annotated[Count, Tag("a number")] | Annotated[Between, Tag("from to")] | Annotated[Choices, Tag("of choices")],
    Discriminator(_kind_of_steps),
]
"""One number for all requests, or how each request's is drawn."""


def _kind_of_devices(value: Any) -> str:
    return "of names" if isinstance(value, list | tuple) else "a number"


Devices = Annotated[
    Annotated[int, Field(ge=1, le=MOST_WORKERS), Tag("a number")]
    | Annotated[list[str], Field(min_length=1, max_length=MOST_WORKERS), Tag("of names")],
    Discriminator(_kind_of_devices),
]
"""So many devices, or their names."""


class LogNormal(Range):
    """Whole numbers around `median`, log-normal with `sigma`, cut off at `min` and `max`."""

    median: Annotated[float, Field(ge=1e-6, le=MOST_TOKENS)]
    sigma: float = Field(ge=0, le=5)
    min: TokenCount = 1
    max: TokenCount = 2**20


def kind_of_tokens(value: Any) -> str:
    """The tag of the branch of `Tokens` that a value belongs to."""
    if isinstance(value, LogNormal) or (isinstance(value, dict) and "median" in value):
        return "log-normal"
    return _kind_of_steps(value)


Tokens = Annotated[
    Annotated[TokenCount, Tag("a number")]
    | Annotated[Between, Tag("from to")]
    | Annotated[Choices, Tag("of choices")]
    | Annotated[LogNormal, Tag("log-normal")],
    Discriminator(kind_of_tokens),
]
"""How many tokens a text has: for all requests, or how each request's number is drawn."""


def mean_of(count: int | Between | Choices | LogNormal) -> float:
    """About how many are drawn on average; of a log-normal number, its median at least."""
    if isinstance(count, Between):
        return (count.min + count.max) / 2
    if isinstance(count, Choices):
        return sum(count.choices) / len(count.choices)
    if isinstance(count, LogNormal):
        return min(max(count.median, count.min), count.max)
    return count


def dropped(*keys: str) -> str:
    """How to be rid of keys."""
    return "drop it: " + " ".join(f"--set {key}=null" for key in keys)


def either(a: str, b: str) -> str:
    """How to be rid of one of two keys."""
    return f"drop one: --set {a}=null or --set {b}=null"
