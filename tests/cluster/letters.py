"""What a head and its instances need over a network that loses, repeats and delays letters.

Their contract wants each message once and in order.

Each side numbers what it sends and sends it again until the other one says that it has it. Whoever
carries letters may lose, repeat, delay and reorder them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Letter:
    """What goes over the wire. `messages[i]` has the number `first + i`.

    `heard`: all of the other side's messages up to this number are here.
    """

    epoch: int
    first: int
    messages: tuple[Any, ...]
    heard: int


class Mailbox:
    """One side of a pair.

    Args:
        again_s: what is not acknowledged after so long is sent again.
        epoch: letters of another one are not read: a side that begins anew takes a new number, and
            so has the other one to.
    """

    def __init__(self, again_s: float = 0.2, epoch: int = 0) -> None:
        self._again_s = again_s
        self.epoch = epoch
        self._next = 1
        self._unheard: dict[int, Any] = {}
        self._heard = 0
        self._early: dict[int, Any] = {}
        self._again_at = math.inf
        self._told = 0  # what of the other side's was acknowledged

    @property
    def unheard(self) -> Sequence[Any]:
        """What was sent and is not acknowledged, in order."""
        return list(self._unheard.values())

    def send(self, messages: Sequence[Any], now: float) -> Letter:
        """A letter with more messages; without any, it acknowledges."""
        first = self._next
        for message in messages:
            self._unheard[self._next] = message
            self._next += 1
        if messages and self._again_at == math.inf:
            self._again_at = now + self._again_s
        self._told = self._heard
        return Letter(self.epoch, first, tuple(messages), self._heard)

    def read(self, letter: Letter, now: float) -> list[Any]:
        """The messages that are to be read now, in order."""
        if letter.epoch != self.epoch:
            return []
        for number in [number for number in self._unheard if number <= letter.heard]:
            del self._unheard[number]
        self._again_at = now + self._again_s if self._unheard else math.inf
        for place, message in enumerate(letter.messages):
            number = letter.first + place
            if number > self._heard:
                self._early[number] = message
            else:
                self._told = -1  # it does not know that it was heard
        ready = []
        while self._heard + 1 in self._early:
            self._heard += 1
            ready.append(self._early.pop(self._heard))
        return ready

    @property
    def owes(self) -> bool:
        """Whether the other side is to be told what was heard."""
        return self._told != self._heard

    @property
    def wake_at(self) -> float:
        """When something is to be sent again; inf: nothing is."""
        return self._again_at

    def again(self, now: float) -> Letter | None:
        """All that is not acknowledged, if it is time."""
        if now < self._again_at or not self._unheard:
            return None
        self._again_at = now + self._again_s
        first = next(iter(self._unheard))
        return Letter(self.epoch, first, tuple(self._unheard.values()), self._heard)
