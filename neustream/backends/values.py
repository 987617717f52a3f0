"""What callers give, checked by name: numbers, of Python or numpy, as plain ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from neustream.errors import BackendError, NeustreamError, RequestError, shown


def whole(
    name: str,
    value: object,
    low: int,
    high: float = math.inf,
    *,
    allowed: str = "",
    error: type[NeustreamError] = RequestError,
) -> int:
    """`value` as an int; `error` for what is no whole number from `low` to `high`. Truth values are none."""
    if not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high:
        return int(value)
    most = "on" if high == math.inf else f"to {high}"
    raise error(f"{name} must be {allowed or f'a whole number from {low} {most}'}, got {shown(value)}")


def number(
    name: str,
    value: object,
    allowed: str,
    fits: Callable[[float], bool],
    error: type[NeustreamError] = RequestError,
) -> float:
    """`value` as a float; `error` for what is no number, or does not fit."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if fits(found):
            return found
    raise error(f"{name} must be {allowed}, got {shown(value)}")


def flag(name: str, value: object) -> bool:
    """`value` as a bool; RequestError for others."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise RequestError(f"{name} must be True or False, got {shown(value)}")


def check_option(name: str, value: object, kinds: Any, allowed: str) -> None:
    """BackendError if an option is of none of `kinds`."""
    if not isinstance(value, kinds):
        raise BackendError(f"{name} must be {allowed}, got {shown(value)}")
