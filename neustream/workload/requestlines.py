"""`Request(name=value, ...)` as a mapping, by reading it: nothing is evaluated."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from neustream.workload.cells import WrongValue

ALLOWED = "Request(name=value, ...) with literals as values"

_PLAIN = r"""(-?\d{1,18}(?:\.\d{1,18}(?:[eE][+-]?\d{1,3})?)?|'[^'\\]*'|"[^"\\]*"|None)"""
"""Numbers, and texts without escapes."""


class Lines:
    """Reads lines that mostly have the names of the line before, in its order, with plain values."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._usual: re.Pattern[str] | None = None

    def parse(self, line: str) -> dict[str, Any]:
        """The names and values of a line; WrongValue for anything but literals by name."""
        match = self._usual.fullmatch(line) if self._usual is not None else None
        if match is not None:
            return dict(zip(self._names, map(_plain, match.groups()), strict=True))
        out = _any(line)
        self._names = list(out)
        pairs = r",\s*".join(rf"{name}\s*=\s*{_PLAIN}" for name in out)
        self._usual = re.compile(rf"Request\(\s*{pairs}\s*\)", re.ASCII) if len(out) < 64 else None
        return out


def _plain(text: str) -> Any:
    if text[0] in "'\"":
        return text[1:-1]
    if text == "None":
        return None
    return float(text) if "." in text else int(text)


def _any(line: str) -> dict[str, Any]:
    """What any line of the allowed kind says."""
    try:
        with warnings.catch_warnings(action="ignore"):
            call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "Request":
            raise WrongValue(line, ALLOWED)
        out: dict[str, Any] = {}
        for pair in call.keywords:
            if pair.arg is None or pair.arg in out:
                raise WrongValue(line, f"{ALLOWED}, each name once")
            out[pair.arg] = ast.literal_eval(pair.value)
        return out
    except WrongValue:
        raise
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise WrongValue(line, ALLOWED) from None
