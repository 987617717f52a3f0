"""A router after llm-d's: instances that keep the promise first, those with the least to spare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from neustream.cluster.fleet import Fleet, Route
from neustream.core.outlook import Asked
from neustream.errors import ConfigError

MANY = 64


@dataclass(frozen=True)
class Headroom:
    """Of the instances whose forecast keeps the request's promise, the one that is closest to it.

    With `strategy` "most" the one with the most to spare. If none keeps it, the one that misses it
    by the least. One request in `1 / explore` goes to one that would miss it. At most 64 instances,
    those with the least backlog, are asked.
    """

    reads_params: ClassVar[bool] = False

    strategy: Literal["least", "most"] = "least"
    explore: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.explore < 1:
            raise ConfigError(f"headroom: explore must be from 0 to below 1, got {self.explore!r}")

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        few = rows[np.argsort(fleet.backlog(rows), kind="stable")[:MANY]]
        spare, told = [], []
        for row in few.tolist():
            found = fleet.ask(fleet.at(row), asked)
            told.append(found)
            left = min(asked.due_in - found.finish, asked.first_in - found.first)
            spare.append(min(left, 1e9) if left > -math.inf else -1e9)
        keeps = [index for index, left in enumerate(spare) if left >= 0]
        misses = [index for index, left in enumerate(spare) if left < 0]
        if misses and (not keeps or fleet.random.random() < self.explore):
            chosen = max(misses, key=spare.__getitem__)
            name = fleet.at(int(few[chosen])).name
            return Route(name, "misses least", forecast=told[chosen])
        choose = min if self.strategy == "least" else max
        chosen = choose(keeps, key=spare.__getitem__)
        name = fleet.at(int(few[chosen])).name
        return Route(name, f"{self.strategy} headroom", forecast=told[chosen])
