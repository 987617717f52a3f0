"""A scaler: always as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neustream.cluster.fleet import Fleet
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Fixed:
    """`count` instances of a role: who is lost is replaced."""

    count: int
    role: str = "whole"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"fixed: count must be 1 or more, got {self.count!r}")

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        return {self.role: self.count}
