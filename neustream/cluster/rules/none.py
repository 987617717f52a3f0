"""The mover that moves nothing: requests leave only instances that go, and stages end elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neustream.cluster.fleet import Fleet, Move


@dataclass(frozen=True)
class Stay:
    """Nothing moves."""

    def moves(self, fleet: Fleet) -> Sequence[Move]:
        return ()
