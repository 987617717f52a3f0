"""Shares of requests, with how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Z = 1.959964
"""Of a normal distribution, 95 percent lie within so many deviations."""


@dataclass(frozen=True)
class Share:
    """`number` of `of`; of nothing there is no value."""

    number: int
    of: int

    @property
    def value(self) -> float | None:
        return self.number / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 percent; (0, 1) of nothing."""
        if not self.of:
            return 0.0, 1.0
        share, scale = self.number / self.of, 1 + Z**2 / self.of
        middle = (share + Z**2 / (2 * self.of)) / scale
        reach = Z * math.sqrt(share * (1 - share) / self.of + Z**2 / (4 * self.of**2)) / scale
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def to_dict(self) -> dict[str, Any]:
        told = {"value": self.value, "number": self.number, "of": self.of}
        return {**told, "interval": list(self.interval)}

    def __str__(self) -> str:
        """As `93.1 % (90.9 to 94.8)`."""
        if self.value is None:
            return "-"
        low, high = self.interval
        return f"{self.value * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"
