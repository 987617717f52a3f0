"""What an earlier run of a benchmark computed, a line of JSON each: {"key": ..., "result": {...}}."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """What a work file holds, by key; a line that was cut off when a run was killed is no result."""
    found = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry["result"]
    return found


def keep(path: Path, key: str, result: Mapping[str, Any]) -> None:
    """Add a result to a work file, whole: in one write, which other runs that add to it do not part.

    Behind a line that was cut off it begins a line of its own.
    """
    line = json.dumps({"key": key, "result": result}) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, ("\n" * cut + line).encode())
    finally:
        os.close(descriptor)
