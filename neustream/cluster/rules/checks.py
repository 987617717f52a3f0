"""What parameters of rules may be. Each ConfigError names the rule, the parameter and its value."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from neustream.errors import ConfigError, nearest, shown


def at_least(rule: str, least: float, **given: float) -> None:
    """ConfigError for a number below `least`, or for none."""
    for name, value in given.items():
        if not value >= least:
            raise ConfigError(f"{rule}: {name} must be {least:g} or more, got {value!r}")


def above_zero(rule: str, **given: float) -> None:
    """ConfigError for a number that is not above 0."""
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"{rule}: {name} must be greater than 0, got {value!r}")


def a_number(rule: str, **given: float) -> None:
    """ConfigError for NaN."""
    for name, value in given.items():
        if math.isnan(value):
            raise ConfigError(f"{rule}: {name} must be a number, got {value!r}")


def check_role(scaler: Any, roles: Collection[str]) -> None:
    """ConfigError for a scaler of a kind of instances that there is not."""
    role = getattr(scaler, "role", None)
    if role is not None and role not in roles:
        raise ConfigError(f"cluster.scaler: no role {shown(role)}; {nearest(role, roles)}")
