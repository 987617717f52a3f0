"""Sections of profiles: every key that the tool knows, and what becomes of it here.

A field without a mark is used. `Ignored` is listed by `--dry-run`; `Refused` cannot be run.
Both count only for a key that is given, with another value than it has when it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from neustream.errors import NeustreamError


class Unrunnable(NeustreamError):
    """A profile that its tool may run, and neustream does not; the message names key and reason."""


@dataclass(frozen=True)
class Ignored:
    """A key that changes nothing here."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A key that asks for something that is not run."""

    why: str


Count = Annotated[int, Field(gt=0, le=10_000_000)]
Length = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e7)]
"""Numbers, lengths in tokens, and rates or seconds: none needs more."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Section(BaseModel):
    """A section of a profile: an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Marked:
    """A marked key that a profile gives."""

    key: str
    mark: Ignored | Refused


def marked(section: Any, path: str = "") -> Iterator[Marked]:
    """The marked keys that are given, from the top of a profile down."""
    if isinstance(section, list):
        for number, entry in enumerate(section):
            yield from marked(entry, f"{path}.{number}")
    if not isinstance(section, BaseModel):
        return
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        key = f"{path}.{name}" if path else name
        if name not in section.model_fields_set:
            continue
        marks = [each for each in field.metadata if isinstance(each, Ignored | Refused)]
        if not marks:
            yield from marked(value, key)
        elif value is not None and value != field.get_default(call_default_factory=True):
            yield Marked(key, marks[0])
