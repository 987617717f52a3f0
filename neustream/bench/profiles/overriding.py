"""`-o path=value`: what an override changes in a profile.

A path has dots; entries of lists are named by their number, as `load.stages.0.rate` or
`load.stages[0].rate`. `null` drops a key. Several stand in one option with commas between them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from neustream.config.yaml_file import parse_value
from neustream.errors import ConfigError, cut, nearest

NEXT = re.compile(r",(?=[^,=\s]+=)")
"""A comma behind which another override begins."""
INDEX = re.compile(r"\[(\d{1,9})\]")


def overridden(values: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A copy with all overrides made, one after another.

    Raises:
        ConfigError: an override is none, or names a section that there is not.
    """
    changed = copy.deepcopy(values)
    for option in options:
        for text in NEXT.split(option):
            key, equals, value = text.partition("=")
            where = f"-o {cut(text, 60)}"
            if not equals or not key.strip():
                raise ConfigError(f"{where}: expected path=value")
            put(changed, key.strip(), parse_value(where, value), where)
    return changed


def put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value at a path in place; the section that it is in must be there."""
    *sections, last = _steps(values, key)
    at: Any = values
    for step in sections:
        at = _inside(at, step, where)
    if isinstance(at, list):
        number = _number(at, last, where)
        at[number] = value
    elif not isinstance(at, dict):
        raise ConfigError(f"{where}: {'.'.join(sections)} is not a section")
    elif value is None:
        at.pop(last, None)
    else:
        at[last] = value


def put_all(values: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy with values at paths, as guidellm's `benchmarks` have them; sections are made."""
    changed = copy.deepcopy(values)
    for key, value in changes.items():
        at: Any = changed
        *sections, _ = _split(str(key))
        for step in sections:
            if isinstance(at, dict) and at.get(step) is None:
                at[step] = {}
            at = _inside(at, step, f"{where}.{key}")
        put(changed, str(key), value, f"{where}.{key}")
    return changed


def _steps(values: Any, key: str) -> list[str]:
    """The keys of a path: the longest that are there, else one for each part."""
    parts, steps, at, start = key.split("."), list[str](), values, 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            joined = ".".join(parts[start:end])
            if isinstance(at, dict) and joined in at:
                found = [joined]
                break
        else:
            end, found = start + 1, _split(parts[start])
        steps += found
        for step in found:
            at = _peek(at, step)
        start = end
    return steps


def _split(key: str) -> list[str]:
    """The keys of a path, without looking."""
    return [step for part in key.split(".") for step in _indexed(part)]


def _indexed(part: str) -> Iterator[str]:
    name = INDEX.sub("", part)
    if name:
        yield name
    yield from INDEX.findall(part)


def _peek(at: Any, step: str) -> Any:
    if isinstance(at, dict):
        return at.get(step)
    inside = isinstance(at, list) and step.isdecimal() and len(step) < 10 and int(step) < len(at)
    return at[int(step)] if inside else None


def _inside(at: Any, step: str, where: str) -> Any:
    if isinstance(at, list):
        return at[_number(at, step, where)]
    if not isinstance(at, dict) or not isinstance(at.get(step), dict | list):
        there = (
            [str(key) for key, value in at.items() if isinstance(value, dict | list)]
            if isinstance(at, dict)
            else []
        )
        raise ConfigError(f"{where}: no section {step!r}; {nearest(step, there)}")
    return at[step]


def _number(at: list[Any], step: str, where: str) -> int:
    if not step.isdecimal() or len(step) > 9 or int(step) >= len(at):
        allowed = f"0 to {len(at) - 1}" if at else "none, it is empty"
        raise ConfigError(f"{where}: {step!r} is no entry of that list; allowed: {allowed}")
    return int(step)
