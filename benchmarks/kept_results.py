"""What an earlier run of a benchmark computed, a line of JSON each: {"key": ..., "result": {...}}."""

from __future__ import annotations

import json
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
