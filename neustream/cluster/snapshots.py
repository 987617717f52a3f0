"""Copies of requests in the middle of their steps, so that a death does not cost all of these.

Every `Settings.snapshot_s` a request that runs is held at the end of its step, a copy goes to the
next instance of the fleet, and the request goes on where it is (`moving.py`: a move that nothing
leaves for). If its instance dies it goes on from the copy, wherever the router says. It waits for a
step each time; what its outcome is does not change. Behind a copy that came to nothing
the next one is due after twice as long as before: where none gets there in time, it has to go on.
No copies are made of language models' requests: they go on behind their outputs anyway, and their
KV cache is large.

Copies are not told to the next head: under it a request whose instance is gone begins at its start.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import replace

from neustream.cluster.book import Book, Open, Snapshot
from neustream.cluster.moving import Moves
from neustream.core.outlook import Asked


class Snapshots:
    """Orders copies. `next_at`: when it has to look again."""

    def __init__(self, book: Book, moves: Moves) -> None:
        self._book = book
        self._moves = moves
        self._due: list[tuple[float, str, int]] = []

    @property
    def next_at(self) -> float:
        return self._due[0][0] if self._due else math.inf

    def began(self, one: Open, now: float) -> None:
        """A request is in a step for the first time where it is."""
        every = self._book.settings.snapshot_s
        if every < math.inf and not one.asked.tokens:
            heapq.heappush(self._due, (now + every, one.id, one.term))

    def tick(self, now: float) -> None:
        """Have those copied whose time has come; those that move are looked at the next time."""
        while self._due and self._due[0][0] <= now:
            _, id, term = heapq.heappop(self._due)
            one = self._book.requests.get(id)
            if one is None or one.term != term or one.fixed:  # it is over, or began elsewhere
                continue
            every = self._book.settings.snapshot_s * 2.0**one.uncopied
            heapq.heappush(self._due, (now + every, id, term))
            keeper = self._keeper(one)
            if keeper and one.place().free and not one.away and not one.cancelled:
                self._moves.copy(one, keeper, now)

    def _keeper(self, one: Open) -> str:
        """The instance behind its own, in turn; "": there is no other one."""
        up = [each.name for each in self._book.fleet.instances.values() if each.state == "up"]
        others = [name for name in up if name != one.where]
        if one.where not in up:
            return others[0] if others else ""
        return up[(up.index(one.where) + 1) % len(up)] if others else ""

    def kept(self, one: Open, now: float) -> None:
        """The copy is there; it takes the place of an earlier one."""
        moving = self._moves.copied_whole(one, now)
        self._book.forget_copy(one)
        one.uncopied = 0
        one.snapshot = Snapshot(moving.target, moving.term, _rest(one.asked, moving.left))


def _rest(asked: Asked, left: Mapping[str, int]) -> Asked:
    """What is left of a request, where that is known."""
    if not left:
        return asked
    calls = {
        name: replace(call, count=left[name]) for name, call in asked.calls.items() if name in left
    }
    return replace(asked, calls=calls, stage=next(iter(left)))
