"""Numbers that stand in texts: of options, of headers."""

from __future__ import annotations

import math

from neustream.errors import ConfigError, shown


def positive(name: str, text: str) -> float:
    """A finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{name}: expected a number above 0, got {shown(text)}")
    return found
