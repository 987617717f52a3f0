"""`Request(name=value, ...)` as a mapping, by reading it: nothing is evaluated."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from neustream.workload.cells import WrongValue

ALLOWED = "Request(name=value, ...) with literals as values"

_PAIR = re.compile(
    r"\s*([A-Za-z_]\w*)\s*=\s*"
    r"(?:(-?\d{1,18})|(-?\d+\.\d+(?:[eE][+-]?\d+)?)|'([^'\\]*)'|\"([^\"\\]*)\"|(None))"
    r"\s*(?:,|$)",
    re.ASCII,
)


def parse(line: str) -> dict[str, Any]:
    """The names and values of a line; WrongValue for anything but literals by name."""
    if not (line.startswith("Request(") and line.endswith(")")):
        raise WrongValue(line, ALLOWED)
    plain = _plain(line[len("Request(") : -1])
    return _general(line) if plain is None else plain


def _plain(body: str) -> dict[str, Any] | None:
    """The usual line, whose values are numbers and texts without escapes; None for any other."""
    out: dict[str, Any] = {}
    position = 0
    while position < len(body):
        match = _PAIR.match(body, position)
        if match is None or match[1] in out:
            return None
        name, integer, number, single, double, _ = match.groups()
        if integer is not None:
            out[name] = int(integer)
        elif number is not None:
            out[name] = float(number)
        else:
            out[name] = single if single is not None else double
        position = match.end()
    return out


def _general(line: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):
            call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
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
