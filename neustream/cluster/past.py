"""What requests went through, kept by the instances: the next head counts on from there.

A request that began anew has a past: how often it did, how many instances died with it in a step,
and where it is. The head tells it to all instances (`Remember`), and they tell it to the head that
comes after (`Here`). An instance that is not there any more then, and had such a request, died with
it. What no head ever told of is not known: at most one death a request and head that is gone.
A request that has only its id in common with an earlier one has no part in the past of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from neustream.cluster.book import Book, Open
from neustream.cluster.messages import TERMS, Past, Remember
from neustream.core.types import Request


class Remembered:
    """What an instance keeps, by request."""

    def __init__(self) -> None:
        self._pasts: dict[str, Past] = {}

    @property
    def all(self) -> tuple[Past, ...]:
        """All that is kept."""
        return tuple(self._pasts.values())

    def hear(self, order: Remember) -> None:
        """Something happened to requests, or they are over."""
        for past in order.pasts:
            self._pasts[past.id] = past
        for id in order.over:
            self._pasts.pop(id, None)

    def end(self, epoch: int) -> None:
        """Nobody asked for what only heads before an epoch told of."""
        self._pasts = {id: past for id, past in self._pasts.items() if past.term >= epoch * TERMS}


class Pasts:
    """What a head knows of pasts, and has told. `before`: terms of earlier heads are at most so.

    `mark`: a hash of what a request asks for.
    """

    def __init__(self, book: Book, before: int, mark: Callable[[Request], bytes]) -> None:
        self._book = book
        self._before = before
        self._mark = mark
        self._told: dict[str, Past] = {}
        self._heard: dict[str, Past] = {}

    def heard(self, pasts: Iterable[Past]) -> None:
        """What an instance keeps of earlier heads. Of one request the latest counts."""
        for past in pasts:
            known = self._heard.get(past.id, past)
            self._heard[past.id] = max(known, past, key=lambda each: (each.term, each.restarts))

    def recall(self, one: Open, standing: bool) -> str:
        """What a request went through before counts for it, once.

        The instance that died with it while there was no head; "": there is none.
        """
        past = self._heard.pop(one.id, None)
        if past is None or past.asked != self._mark(one.request):
            return ""
        one.restarts, one.deaths = past.restarts, past.deaths
        self._book.changed(one)
        if standing or past.where in self._book.fleet.instances:
            return ""
        one.deaths += past.where != ""
        return past.where

    def joined(self, instance: str) -> None:
        """An instance is there: it is to know what the others do."""
        if self._told:
            told = tuple(self._told.values())
            self._book.orders.append(Remember(instance, self._before, told))

    def _of(self, one: Open) -> Past:
        """What an open request went through."""
        term, asked = max(one.term, self._before), self._mark(one.request)
        return Past(one.id, term, one.where, one.restarts, one.deaths, asked)

    def tell(self) -> None:
        """Tell all instances what happened since they were told the last time."""
        book = self._book
        if not book.begun_anew:
            return
        pasts, over = [], []
        for id in book.begun_anew:
            one = book.requests.get(id)
            if one is not None:
                past = self._told[id] = self._of(one)
                pasts.append(past)
            elif self._told.pop(id, None) is not None:
                over.append(id)
        book.begun_anew.clear()
        if not pasts and not over:
            return
        for instance in book.fleet.instances:
            book.orders.append(Remember(instance, self._before, tuple(pasts), tuple(over)))
