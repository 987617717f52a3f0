"""The access log: a line of JSON for each request, with ids and sizes and nothing of its text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from neustream.engine.clock import date


class AccessLog:
    """Writes to `stream`; None: to stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, facts: Mapping[str, Any]) -> None:
        """One request is over."""
        line = json.dumps({"at": round(date(), 3), **facts}, allow_nan=False)
        stream = sys.stderr if self._stream is None else self._stream
        stream.write(line + "\n")
        stream.flush()
