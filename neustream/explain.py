"""What pydantic has against a config, in one line that names key, value and what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Tag, ValidationError

from neustream.errors import nearest


def one_line(error: BaseException) -> str:
    """The message of an error that may come on several lines."""
    return " ".join(str(error).split())


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problems of a validation of `model`."""
    problems, tags = [], _tags(model)
    for problem in error.errors()[:3]:
        where = [str(part) for part in problem["loc"] if part not in tags]
        key = ".".join(where)
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}; {nearest(where[-1], _keys_at(model, where[:-1]))}")
        elif problem["type"] == "missing":
            problems.append(f"key {key!r} is needed")
        else:
            value = problem["input"]
            shown = f", got {value!r}" if not isinstance(value, dict) else ""
            problems.append(f"{key or 'the file'}: {problem['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(problems)


@dataclass(frozen=True)
class _Entries:
    """A mapping or list whose entries are sections."""

    model: type[BaseModel]


def _keys_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that are valid in the section at `path`; of all that it may be, where it is a union."""
    at: list[type[BaseModel] | _Entries] = [model]
    for part in path:
        inside: list[type[BaseModel] | _Entries] = []
        for section in at:
            if isinstance(section, _Entries):
                inside.append(section.model)
            elif part in section.model_fields:
                inside += _sections(section.model_fields[part].annotation)
        at = inside
    return [key for section in at if not isinstance(section, _Entries) for key in section.model_fields]


def _sections(annotation: Any) -> list[type[BaseModel] | _Entries]:
    """The sections, or the entries, that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [section for inner in typing.get_args(annotation) for section in _sections(inner)]
    if typing.get_origin(annotation) in (dict, list):
        return [_Entries(section) for section in found if not isinstance(section, _Entries)]
    return found


def _tags(model: type[BaseModel]) -> set[str]:
    """The names that pydantic puts into locations for the branches of unions."""
    found = {str(tag.tag) for field in model.model_fields.values() for tag in _tags_in(field.annotation)}
    for field in model.model_fields.values():
        for section in _sections(field.annotation):
            found |= _tags(section.model if isinstance(section, _Entries) else section)
    return found


def _tags_in(annotation: Any) -> list[Tag]:
    here = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Tag)]
    return here + [tag for inner in typing.get_args(annotation) for tag in _tags_in(inner)]
