"""Requests that go on with others: turns, each asked once the one before is answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from neustream.core.types import Request


@dataclass(frozen=True, slots=True)
class Turn:
    """A request comes `think_s` seconds after `after` is done, and not before its own arrival.

    `after`: the id of a request that comes before it.
    """

    after: str
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Next:
    """A request that can come at its `arrival`; `blocked`: why it never will, "" if it will."""

    request: Request
    blocked: str = ""


class Turns:
    """Which requests of a workload wait for others. It is told what came and ended, on any clock.

    Args:
        turns: by the ids of the requests that go on with another.
    """

    def __init__(self, turns: Mapping[str, Turn] = {}) -> None:
        self._turns = turns
        self._followed = {turn.after for turn in turns.values()}
        self._open: set[str] = set()  # came, and are followed by others
        self._ends: dict[str, float | None] = {}  # the same, ended; None: not done
        self._waiting: dict[str, list[Request]] = {}  # by the request that they go on with

    def __bool__(self) -> bool:
        return bool(self._turns)

    @property
    def waiting(self) -> bool:
        """Whether a request waits for another's end."""
        return bool(self._waiting)

    def came(self, request: Request) -> list[Next]:
        """The instant of a request's own arrival has come; it, unless it waits for another."""
        turn = self._turns.get(request.id)
        found = [Next(request)] if turn is None else self._after(turn, request)
        if request.id in self._followed and request.id not in self._ends:
            self._open.add(request.id)
        return found

    def ended(self, id: str, at: float, *, done: bool) -> list[Next]:
        """A request is over; those that waited for it."""
        if id not in self._followed or id in self._ends:
            return []
        self._open.discard(id)
        self._ends[id] = at if done else None
        found: list[Next] = []
        for request in self._waiting.pop(id, ()):
            found += self._after(self._turns[request.id], request)
        return found

    def _after(self, turn: Turn, request: Request) -> list[Next]:
        if turn.after in self._open:
            self._waiting.setdefault(turn.after, []).append(request)
            return []
        end = self._ends.get(turn.after)
        if end is not None:
            arrival = max(request.arrival, end + turn.think_s)
            return [Next(dataclasses.replace(request, arrival=arrival))]
        why = "failed" if turn.after in self._ends else "did not come before it"
        blocked = Next(request, f"the turn before it, {turn.after!r}, {why}")
        return [blocked, *self.ended(request.id, 0.0, done=False)]
