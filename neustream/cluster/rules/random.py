"""A router: anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neustream.cluster.fleet import Fleet, Route
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class Random:
    """Each instance with the same chance."""

    reads_params: ClassVar[bool] = False

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        return Route(fleet.at(int(rows[fleet.random.integers(len(rows))])).name, "drawn")
