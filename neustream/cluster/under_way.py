"""Messages to a head that have not arrived: if it dies, those who sent them still have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UnderWay:
    """Messages to a head, by a number of each parcel of them."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[str, Sequence[Any]]] = {}
        self._count = 0

    def sent(self, source: str, messages: Sequence[Any]) -> int:
        """Messages of an instance set out; their number."""
        self._count += 1
        self._sent[self._count] = source, messages
        return self._count

    def arrived(self, number: int) -> bool:
        """They are there; False if the head that they were for is gone."""
        return self._sent.pop(number, None) is not None

    def lost(self) -> dict[str, list[Any]]:
        """The head is gone: what it did not hear, of each instance in order."""
        found: dict[str, list[Any]] = {}
        for source, messages in self._sent.values():
            found.setdefault(source, []).extend(messages)
        self._sent.clear()
        return found
