"""What pydantic has against a config, in one line that names key, value and what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from neustream.errors import cut, nearest, shown


def explain(
    error: ValidationError,
    model: type[BaseModel],
    lines: Mapping[tuple[str, ...], int] = {},
    changed: Sequence[tuple[str, ...]] = (),
) -> str:
    """The first problems of a validation of `model`.

    Args:
        lines: the line of each key in the file that was validated.
        changed: the keys that did not come from the file.
    """
    tags = _tags(model)
    return "; ".join(_told(problem, model, tags, lines, changed) for problem in error.errors()[:3])


def _told(
    problem: ErrorDetails,
    model: type[BaseModel],
    tags: set[str],
    lines: Mapping[tuple[str, ...], int],
    changed: Sequence[tuple[str, ...]],
) -> str:
    where = tuple(str(part) for part in problem["loc"] if part not in tags)
    key = shown(".".join(where), 100)
    line = _line(where, lines, changed)
    if problem["type"] == "extra_forbidden":
        chosen = {str(part) for part in problem["loc"] if part in tags}
        return f"{line}unknown key {key}; {nearest(where[-1], keys_at(model, where[:-1], chosen))}"
    if problem["type"] == "missing":
        return f"{line}key {key} is needed"
    value = problem["input"]
    got = f", got {shown(value)}" if not isinstance(value, dict) else ""
    said = cut(problem["msg"].removeprefix("Value error, "), 300)
    return f"{line}{key[1:-1] or 'the file'}: {said}{got}"


def _line(where: tuple[str, ...], lines: Mapping[tuple[str, ...], int], changed: Sequence[tuple[str, ...]]) -> str:
    """The line of a key, or of the section that it should be in; nothing for what came from elsewhere."""
    for end in range(len(where), 0, -1):
        place = where[:end]
        if any(other[: len(place)] == place or place[: len(other)] == other for other in changed):
            return ""
        if place in lines:
            return f"line {lines[place]}: "
    return ""


@dataclass(frozen=True)
class _Entries:
    """A mapping or list whose entries are sections."""

    model: type[BaseModel]


def keys_at(model: type[BaseModel], path: Sequence[str], chosen: Set[str] = frozenset()) -> list[str]:
    """The keys that are valid in the section at `path`.

    Where it is a union: of its branch with a tag that is `chosen`, else of all.
    """
    at: list[type[BaseModel] | _Entries] = [model]
    for part in path:
        inside: list[type[BaseModel] | _Entries] = []
        for section in at:
            if isinstance(section, _Entries):
                inside.append(section.model)
            elif part in section.model_fields:
                inside += _sections(section.model_fields[part].annotation, chosen)
        at = inside
    keys = [key for section in at if not isinstance(section, _Entries) for key in section.model_fields]
    return list(dict.fromkeys(keys))


def _sections(annotation: Any, chosen: Set[str] = frozenset()) -> list[type[BaseModel] | _Entries]:
    """The sections, or the entries, that a field of this type may hold; of chosen branches if there are some."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = typing.get_args(annotation)
    branches = [each for each in inner if any(tag in chosen for tag in _tags_on(each))]
    found = [section for each in branches or inner for section in _sections(each, chosen)]
    if typing.get_origin(annotation) in (dict, list):
        return [_Entries(section) for section in found if not isinstance(section, _Entries)]
    return found


def _tags(model: type[BaseModel], known: tuple[type[BaseModel], ...] = ()) -> set[str]:
    """The names that pydantic puts into locations for the branches of unions.

    `known`: sections around it, which it may have in it again.
    """
    if model in known:
        return set()
    found = {tag for field in model.model_fields.values() for tag in _tags_in(field.annotation)}
    for field in model.model_fields.values():
        for section in _sections(field.annotation):
            inner = section.model if isinstance(section, _Entries) else section
            found |= _tags(inner, (*known, model))
    return found


def _tags_in(annotation: Any) -> list[str]:
    return _tags_on(annotation) + [tag for inner in typing.get_args(annotation) for tag in _tags_in(inner)]


def _tags_on(annotation: Any) -> list[str]:
    return [str(meta.tag) for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Tag)]
