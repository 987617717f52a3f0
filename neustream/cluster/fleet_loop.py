"""The loop of a simulated cluster: many members, and a head in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neustream.core.events import Emitted, Ended, Given, Held, Left, Submitted
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock
from neustream.engine.events import Finished, Record, Started
from neustream.engine.loop import Loop
from neustream.engine.member import Member
from neustream.engine.routing import LeastWork

if TYPE_CHECKING:
    from neustream.cluster.simulation import Cluster

OF_INSTANCES = frozenset((Submitted, Emitted, Ended, Held, Left, Given))
"""Records of a member that are not for callers."""
NOTED = OF_INSTANCES | {Started, Finished}
"""Those that its instance is told."""


class FleetLoop(Loop):
    """The loop, whose requests go to a head, and whose members' records go to their instances."""

    def __init__(self, members: Sequence[Member], clock: VirtualClock, fleet: Cluster) -> None:
        super().__init__(members, clock, LeastWork())
        self._fleet = fleet
        self._noted: list[Record] = []

    @property
    def open(self) -> int:
        return self._fleet.open

    @property
    def busy(self) -> bool:
        return self._fleet.open > 0

    def accept(self, request: Request, now: float) -> Submitted:
        return self._fleet.submit(request, now)

    def cancel_all(self, now: float) -> None:
        self._fleet.cancel_all(now)

    def tell(self, record: Record) -> None:
        kind = type(record)
        if kind in NOTED:
            self._noted.append(record)
        if kind not in OF_INSTANCES:
            super().tell(record)

    def answer(self, record: Record) -> None:
        """Tell what a caller sees."""
        super().tell(record)

    def note(self) -> None:
        """Instances know what happened so far, before they read a message of the same instant."""
        if self._noted:
            noted, self._noted = self._noted, []
            self._fleet.noted(noted)

    def publish(self) -> None:
        self.note()
        self._fleet.post()
        super().publish()
