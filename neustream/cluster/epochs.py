"""Epochs of heads: each is of one head only, and the head of the largest has the instances.

A head that begins asks the instances for the largest that they have heard of, and takes one above.
Two that begin at the same moment may hear the same, and take different ones all the same: the
number of the one who takes it is part of it. An instance listens to the head of the largest epoch
that has come to it, from then on. So nothing has to be agreed on, whatever is lost or late on the
way: all instances that hear of both end up with the same one, and the other is told as soon as it
asks.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

HOLDERS = 2**64
"""So many numbers holders choose from: two have the same once in so many times."""


def holder() -> int:
    """A number of one that wants to be a head."""
    return secrets.randbelow(HOLDERS)


def next_epoch(known: Iterable[int], holder: int) -> int:
    """An epoch above all that are known (0: none was before), which is this holder's only."""
    return (max(known, default=0) // HOLDERS + 1) * HOLDERS + holder


class Grant:
    """Which head an instance listens to.

    Attributes:
        epoch: of that one; 0: none has come yet.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def claim(self, epoch: int) -> bool:
        """A head begins here; whether it takes the place of another one, or is the first."""
        later = epoch > self.epoch
        self.epoch = max(self.epoch, epoch)
        return later

    def holds(self, epoch: int) -> bool:
        """Whether the instance listens to the head of an epoch, as far as that one can be heard."""
        return epoch >= self.epoch
