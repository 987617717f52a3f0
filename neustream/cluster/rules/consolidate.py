"""A mover: towards fewer instances, so that others can be let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.cluster.fleet import Fleet, Move
from neustream.cluster.rules.checks import at_least


@dataclass(frozen=True)
class Consolidate:
    """The instance with the least backlog gives a request to the fullest one where it fits.

    Only below `below` seconds of backlog, so that nothing moves while there is much to do.
    """

    below: float = 1.0
    k: int = 8

    def __post_init__(self) -> None:
        at_least("consolidate", 1, k=self.k)
        at_least("consolidate", 0, below=self.below)

    def moves(self, fleet: Fleet) -> Sequence[Move]:
        rows = np.flatnonzero(fleet.up)
        rows = rows[fleet.live[rows] > 0]
        if len(rows) < 2:
            return ()
        backlog = fleet.backlog(rows)
        order = np.argsort(backlog, kind="stable")
        if backlog[order[0]] > self.below:
            return ()
        source = fleet.at(int(rows[order[0]]))
        for place in fleet.requests(source.name):
            if not place.free:
                continue
            asked = place.asked.aged(fleet.now - place.arrival)
            able = set(fleet.able(asked).tolist())
            for row in rows[order[::-1]][: self.k].tolist():
                target = fleet.at(row)
                if row in able and target is not source and fleet.ask(target, asked).fits:
                    return (Move(place.id, source.name, target.name, "fewer instances"),)
        return ()
