"""What graphs turned out to do: rounds of loops, branches of switches, seconds of legs.

A scheduler learns it from its jobs. Nodes are held weakly: no graph is kept alive by it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from neustream.core.graph import Loop, Switch

LATEST = 100
"""Ends of a loop, or ways through a switch, that are remembered."""
ENOUGH = 4
"""Legs that ended before their mean is believed."""
FORGET = 0.05
"""Weight of the latest leg in running means."""


class Residence:
    """Seconds from the start of a leg to its end: a running mean, and the mean distance to it."""

    __slots__ = ("count", "mean", "spread")

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.spread = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        weight = max(FORGET, 1 / self.count)
        distance = abs(seconds - self.mean) if self.count > 1 else 0.0
        self.spread += (distance - self.spread) * weight
        self.mean += (seconds - self.mean) * weight

    @property
    def known(self) -> bool:
        """Whether enough have ended."""
        return self.count >= ENOUGH

    def expected(self, alone: float) -> float:
        """Seconds that a leg should take, with its spread; `alone` while few have ended."""
        return self.mean + self.spread if self.known else alone


class Seen:
    """What one scheduler has seen of graphs."""

    def __init__(self) -> None:
        self._rounds: WeakKeyDictionary[Loop, deque[int]] = WeakKeyDictionary()
        self._cases: WeakKeyDictionary[Switch, deque[Any]] = WeakKeyDictionary()
        self._legs: dict[tuple[str, str], Residence] = {}

    # -- loops ------------------------------------------------------------------------------------

    def rounds(self, loop: Loop, done: int = 0) -> int:
        """Rounds in all that a loop which has `done` so many should take.

        The mean of those that took more; one more where none did.
        """
        longer = [rounds for rounds in self._rounds.get(loop, ()) if rounds > done]
        return math.ceil(sum(longer) / len(longer)) if longer else done + 1

    def looped(self, loop: Loop, rounds: int) -> None:
        """A loop without `expect` ended after `rounds`."""
        seen = self._rounds.get(loop)
        if seen is None:
            seen = self._rounds[loop] = deque(maxlen=LATEST)
        seen.append(rounds)

    # -- switches ---------------------------------------------------------------------------------

    def likely(self, switch: Switch) -> Any:
        """The case that was taken most lately; the first one before any was."""
        seen = self._cases.get(switch)
        if not seen:
            return next(iter(switch.cases))
        return max(switch.cases, key=seen.count)

    def chose(self, switch: Switch, case: Any) -> None:
        """A switch without `likely` took a case."""
        seen = self._cases.get(switch)
        if seen is None:
            seen = self._cases[switch] = deque(maxlen=LATEST)
        seen.append(case)

    # -- legs -------------------------------------------------------------------------------------

    def leg(self, graph: str, name: str) -> Residence:
        """What is known of a leg of the graph with a print."""
        key = graph, name
        known = self._legs.get(key)
        if known is None:
            known = self._legs[key] = Residence()
        return known


class _Unseen(Seen):
    """Of jobs that no scheduler has."""

    def looped(self, loop: Loop, rounds: int) -> None:
        pass

    def chose(self, switch: Switch, case: Any) -> None:
        pass

    def leg(self, graph: str, name: str) -> Residence:
        return Residence()


UNSEEN = _Unseen()
