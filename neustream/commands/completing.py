"""What the shell offers when Tab is pressed: configs, policies, keys.

What cannot be read offers nothing: this is no place for errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neustream.commands.line import typed
from neustream.errors import NeustreamError

SUFFIXES = (".yaml", ".yml")


def configs(incomplete: str) -> list[str]:
    """YAML files that begin so, and folders to look into."""
    folder, start = os.path.split(incomplete)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            found.append(os.path.join(folder, entry.name, ""))
        elif entry.name.endswith(SUFFIXES):
            found.append(os.path.join(folder, entry.name))
    return found


def policies(incomplete: str) -> list[str]:
    """The library's policies, and those that the config names."""
    from neustream.by_name import ALIAS
    from neustream.core.policies import POLICIES

    own = _values().get("policies")
    names = dict.fromkeys([*(own if isinstance(own, dict) else ()), *POLICIES, ALIAS])
    return [name for name in map(str, names) if name.startswith(incomplete)]


def sweepable(incomplete: str) -> list[str]:
    """Keys that a sweep may vary."""
    from neustream.config.schema import SWEEPABLE

    return [key for key in SWEEPABLE if key.startswith(incomplete)]


def keys(incomplete: str) -> list[str]:
    """Keys of the config, up to the next dot; those that hold a value with `=` behind."""
    if "=" in incomplete:
        return []
    section, dot, _ = incomplete.rpartition(".")
    path = section.split(".") if dot else []
    values = _values()
    offers = []
    for key in dict.fromkeys(f"{section}{dot}{key}" for key in _keys_at(values, path)):
        if key.startswith(incomplete):
            is_section = any(True for _ in _keys_at(values, key.split(".")))
            offers.append(f"{key}." if is_section else f"{key}=")
    return offers


def _keys_at(values: dict[str, Any], path: list[str]) -> Iterator[str]:
    """The keys that a section may have, and those that it has."""
    from neustream.config.messages import keys_at
    from neustream.config.schema import KINDS, kind_of

    kind = kind_of(values)
    for each in KINDS if kind is None else (kind,):
        yield from keys_at(each, path)
    inside: Any = values
    for part in path:
        inside = inside.get(part) if isinstance(inside, dict) else None
    if isinstance(inside, dict):
        yield from map(str, inside)


def _values() -> dict[str, Any]:
    """What the config that is on the command line says."""
    from neustream.config.yaml_file import read_document

    config = next((word for word in typed([]) if word.endswith(SUFFIXES)), None)
    if config is None:
        return {}
    try:
        return read_document(Path(config)).values
    except NeustreamError:
        return {}
