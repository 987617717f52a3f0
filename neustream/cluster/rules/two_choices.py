"""A router: the better of two that are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neustream.cluster.fleet import Fleet, Route
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class TwoChoices:
    """Of two instances that are drawn, the one with fewer requests (Mitzenmacher, 2001)."""

    reads_params: ClassVar[bool] = False

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        drawn = rows[fleet.random.integers(0, len(rows), 2)]
        return Route(fleet.at(int(drawn[fleet.live[drawn].argmin()])).name, "fewer requests of two")
