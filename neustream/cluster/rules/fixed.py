"""A scaler: always as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neustream.cluster.fleet import Fleet
from neustream.cluster.rules.checks import at_least


@dataclass(frozen=True)
class Fixed:
    """`count` instances of a role: who is lost is replaced."""

    count: int
    role: str = "whole"

    def __post_init__(self) -> None:
        at_least("fixed", 1, count=self.count)

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        return {self.role: self.count}
