"""Callers of a simulated cluster: what they asked for, and what they have of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from neustream.cluster.head import Head
from neustream.core.events import Emitted, Ended, Submitted, Update
from neustream.core.types import Request


@dataclass(slots=True)
class Caller:
    """Somebody who waits for an answer. `made`: outputs so far; `late`: whether one was."""

    request: Request
    made: list[Update] = field(default_factory=list)
    late: bool = False


class Callers:
    """Those who wait. They ask again where the head that they asked is gone."""

    def __init__(self) -> None:
        self._waiting: dict[str, Caller] = {}
        self._given_up = False

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._waiting))

    def ask(self, request: Request, steps: int, now: float) -> Submitted:
        """One more waits. `steps`: calls of looped stages that it is expected to take."""
        self._waiting[request.id] = Caller(request)
        due = request.arrival + request.slo.total
        name, arrival = request.graph.name, request.arrival
        return Submitted(request.id, name, arrival, due, request.slo, steps, now)

    def got(self, emitted: Emitted) -> None:
        """An output came."""
        caller = self._waiting[emitted.id]
        caller.made.append(emitted.update)
        caller.late = caller.late or emitted.late

    def answered(self, ended: Ended) -> None:
        """The one answer came."""
        del self._waiting[ended.id]

    def give_up(self) -> None:
        """Those who wait while there is no head want nothing any more."""
        self._given_up = True

    def ask_again(self, head: Head, now: float) -> None:
        """Ask a head that began anew."""
        for caller in self._waiting.values():
            head.submit(caller.request, now, made=caller.made, late=caller.late)
            if self._given_up:
                head.cancel(caller.request.id, now)
