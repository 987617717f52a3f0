"""Overrides of a config's values: `dotted.key=value`, as `--set` has them.

Values are YAML. `null` drops a key, so that its default counts again (inside of a backend's options it is a value).
Entries of lists are named by their number. A name with dots is found where it stands in the config
(`policies.my.module:Rule.max_batch`), or is quoted (`policies."my.module:Rule".max_batch`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neustream.config.yaml_file import Place, parse_value
from neustream.errors import ConfigError, nearest

PART = re.compile(r'"([^"]*)"|([^."]+)')


def override(
    values: dict[str, Any],
    text: str,
    names: Mapping[str, Sequence[str]] = {},
    free: Sequence[Place] = (),
) -> tuple[dict[str, Any], Place]:
    """`values` with one override, and the place that it changed; what is shared with `values` stays as it is.

    Args:
        names: keys with dots in them that a section may have.
        free: sections inside of which `null` is a value; `*` is any key.
    """
    key, equals, given = text.partition("=")
    parts = _parts(key)
    if not equals or not parts:
        raise ConfigError(f"--set {text!r}: expected dotted.key=value")
    value = parse_value(f"--set {_cut(text)}", given)
    place = _place(values, parts, names)
    drop = value is None and not any(_deep_inside(place, section) for section in free)
    return _changed(values, place, value, drop, f"--set {_cut(text)}"), place


def _deep_inside(place: Place, section: Place) -> bool:
    """Whether a place is in a value of a section, and not that value itself."""
    named = zip(place, section, strict=False)
    return len(place) > len(section) + 1 and all(want in ("*", part) for part, want in named)


def _parts(key: str) -> list[tuple[str, bool]]:
    """The parts of a dotted key, and whether they were quoted; none if it is malformed."""
    found = [(match[1] if match[1] is not None else match[2], match[1] is not None) for match in PART.finditer(key)]
    whole = ".".join(f'"{part}"' if quoted else part for part, quoted in found)
    return found if whole == key else []


def _place(values: Any, parts: Sequence[tuple[str, bool]], names: Mapping[str, Sequence[str]]) -> Place:
    """The keys that the parts stand for: the longest that are there, else one each."""
    at, place, start = values, list[str](), 0
    while start < len(parts):
        end = start + 1
        for longer in range(len(parts), start + 1, -1):
            joined = ".".join(part for part, _ in parts[start:longer])
            known = [*at, *names.get(".".join(place), ())] if isinstance(at, dict) else []
            if joined in known and not any(quoted for _, quoted in parts[start:longer]):
                end = longer
                break
        place.append(".".join(part for part, _ in parts[start:end]))
        at = _inside(at, place[-1])
        start = end
    return tuple(place)


def _inside(at: Any, part: str) -> Any:
    if isinstance(at, dict):
        return at.get(part)
    if isinstance(at, list) and part.isdecimal() and len(part) < 10 and int(part) < len(at):
        return at[int(part)]
    return None


def _changed(at: Any, place: Place, value: Any, drop: bool, where: str) -> Any:
    """A copy of `at` with the value at `place`."""
    part, rest = place[0], place[1:]
    if isinstance(at, list):
        return _changed_list(at, place, value, drop, where)
    copy = dict(at)
    if rest:
        inner = at.get(part)
        if inner is not None and not isinstance(inner, dict | list):
            raise ConfigError(f"{where}: {part!r} is not a section")
        if inner is None and drop:
            return copy
        copy[part] = _changed({} if inner is None else inner, rest, value, drop, where)
    elif drop:
        copy.pop(part, None)
    else:
        copy[part] = value
    return copy


def _changed_list(at: list[Any], place: Place, value: Any, drop: bool, where: str) -> list[Any]:
    part, rest = place[0], place[1:]
    if not (part.isdecimal() and len(part) < 10 and int(part) < len(at)):
        raise ConfigError(f"{where}: {part!r} is no entry of that list; allowed: {_numbers(at)}")
    copy, number = list(at), int(part)
    if rest and not isinstance(at[number], dict | list):
        raise ConfigError(f"{where}: {part!r} is not a section")
    if rest:
        copy[number] = _changed(at[number], rest, value, drop, where)
    elif drop:
        del copy[number]
    else:
        copy[number] = value
    return copy


def _numbers(at: Sequence[Any]) -> str:
    return f"0 to {len(at) - 1}" if at else "none, it is empty"


def anchored(values: dict[str, Any], place: Place, folder: Path) -> dict[str, Any]:
    """`values` with the path at a place, if there is one, taken from `folder`."""
    at: Any = values
    for part in place:
        at = _inside(at, part)
    if not isinstance(at, str):
        return values
    key = ".".join(place)
    changed: dict[str, Any] = _changed(values, place, str(folder / at), False, key)
    return changed


def check_dropped(values: Any, place: Place, keys: Sequence[str], where: str) -> None:
    """ConfigError if a key was dropped that there cannot be: `keys` are those of its section."""
    at: Any = values
    for part in place[:-1]:
        at = _inside(at, part)
    there = [*keys, *(at if isinstance(at, dict) else ())]
    if place[-1] not in there and not isinstance(at, list):
        raise ConfigError(f"{where}: unknown key {'.'.join(place)!r}; {nearest(place[-1], map(str, there))}")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
