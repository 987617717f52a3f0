"""Copies of other instances' requests, kept for when those are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from neustream.cluster.messages import HEAD, Kept, Parcel, Restore


class Keeping:
    """Copies by request and term: the head says of each when nobody needs it any more.

    Args:
        name: of the instance that keeps them; send: a message to an address; take: has the
            instance go on with a request.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[str, Any], None],
        take: Callable[[Parcel, float], None],
    ) -> None:
        self._name = name
        self._send = send
        self._take = take
        self._copies: dict[tuple[str, int], Parcel] = {}

    def keep(self, parcel: Parcel) -> None:
        """A copy comes."""
        self._copies[parcel.id, parcel.term] = parcel
        self._send(HEAD, Kept(parcel.id, parcel.term))

    def restore(self, order: Restore, now: float) -> None:
        """Pass a copy on, if it is here. It is as old as it is: see `Parcel.sent_at`."""
        copy = self._copies.get((order.id, order.term))
        if copy is None:
            return
        parcel = replace(copy, term=order.next_term, keep=False)
        if order.target == self._name:
            self._take(parcel, now)
        else:
            self._send(order.target, parcel)

    def free(self, id: str, term: int) -> None:
        """Nobody needs that copy any more."""
        self._copies.pop((id, term), None)

    def clear(self) -> None:
        """Nor any."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)
