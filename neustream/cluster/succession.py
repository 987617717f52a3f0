"""A head that begins anew: what instances have of the one before it.

It has the next epoch. Each instance that joins is asked what is there (`Ask`, `Here`), and keeps it
for a while without telling of it. A request that its caller asks for again is sent to where it
stands, and goes on there under a new term; if it is there no more it begins anew. Until all that
joined have told, requests wait: for `send_s` seconds at the most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from neustream.cluster.book import Book
from neustream.cluster.messages import TERMS, Ask, Free, Here
from neustream.cluster.past import Pasts
from neustream.core.types import Request

THERE = "is there"
"""Why a request goes where it stands."""


class Succession:
    """What instances have of an earlier head.

    Args:
        epoch: of this one; 0: there was none before.
        mark: a hash of what a request asks for (see `Pasts`).

    Attributes:
        pasts: of requests that began anew, under any head.
    """

    def __init__(self, book: Book, epoch: int, mark: Callable[[Request], bytes]) -> None:
        self._book = book
        self._epoch = epoch
        self.pasts = Pasts(book, self.before, mark)
        self._standing: dict[str, tuple[str, int]] = {}
        self._asked: set[str] = set()
        self._until = math.inf if epoch else -math.inf

    @property
    def before(self) -> int:
        """All terms of earlier heads are at most this one."""
        return self._epoch * TERMS

    @property
    def until(self) -> float:
        """Until when requests wait to hear where they stand."""
        return self._until

    def joined(self, instance: str, now: float) -> None:
        """An instance is there; it is asked what it has."""
        self._book.orders.append(Ask(instance, self._epoch))
        self.pasts.joined(instance)
        if self._until > now:
            self._asked.add(instance)
            self._until = min(self._until, now + self._book.settings.send_s)

    def here(self, instance: str, told: Here, now: float) -> bool:
        """An instance told what is there; whether requests need not wait for that any more."""
        self.pasts.heard(told.pasts)
        for each in told.standing:
            one = self._book.requests.get(each.id)
            where, term = self._standing.get(each.id, ("", 0))
            if one is not None and one.where == instance:
                continue
            if (one is not None and one.where) or term > each.term:
                self._book.orders.append(Free(instance, each.id, self.before))
                continue
            if where:
                self._book.orders.append(Free(where, each.id, self.before))
            self._standing[each.id] = instance, each.term
        self._asked.discard(instance)
        return self._over(now)

    def _over(self, now: float) -> bool:
        """Whether all that joined have told, for the first time."""
        if self._until <= now or not self._asked.isdisjoint(self._book.fleet.instances):
            return False
        self._until = -math.inf
        return True

    def lost(self, now: float) -> bool:
        """An instance is gone; whether requests need not wait any more."""
        return bool(self._asked) and self._over(now)

    def where(self, id: str) -> str:
        """The instance that has a request, once; "": none that is known."""
        instance, _ = self._standing.pop(id, ("", 0))
        return instance if instance in self._book.fleet.instances else ""
