"""A simulated network between a head and instances, and what breaks: data, known beforehand.

Messages between two sides arrive each once and in order, as over TCP: a lost one comes later, and
those of a pair that cannot reach each other wait until they can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from neustream.cluster.messages import HEAD, Parcel, Piece
from neustream.cluster.ways import Took
from neustream.errors import ConfigError

Kind = Literal["crash", "hang", "slow", "partition", "head"]
AGAIN_S = 0.2
"""A lost message is sent again after so long."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to an instance (by its number, from 0) at `at_s`, for `for_s` seconds.

    crash: its process is gone for good. hang: it does nothing meanwhile. slow: its steps take
    `factor` times as long. partition: nobody reaches it, it goes on working. head: the head is
    gone, with all it knew, and then another one begins; `instance` is None.
    """

    at_s: float
    instance: int | None
    kind: Kind
    for_s: float = math.inf
    factor: float = 1.0

    @property
    def until(self) -> float:
        return self.at_s + self.for_s

    def holds(self, now: float) -> bool:
        """Whether it is so at some instant."""
        return self.at_s <= now < self.until


class Faults:
    """The faults of one instance. `any`: whether it has some."""

    def __init__(self, faults: Sequence[Fault], instance: int) -> None:
        mine = [fault for fault in faults if fault.instance == instance]
        self.any = bool(mine)
        self.crash_at = min([f.at_s for f in mine if f.kind == "crash"], default=math.inf)
        self._slow = [fault for fault in mine if fault.kind == "slow"]
        self._hang = sorted([f for f in mine if f.kind == "hang"], key=lambda fault: fault.at_s)
        self._apart = sorted(
            [f for f in mine if f.kind in ("hang", "partition")], key=lambda fault: fault.at_s
        )

    def factor(self, now: float) -> float:
        """How many times as long a step takes that begins now."""
        factor = 1.0
        for fault in self._slow:
            if fault.holds(now):
                factor *= fault.factor
        return factor

    def awake(self, at: float) -> float:
        """When something that would be at `at` is: later if the instance hangs then."""
        for fault in self._hang:
            if fault.holds(at):
                at = fault.until
        return at

    def reached(self, at: float) -> float:
        """When a message to or from it that would arrive at `at` does."""
        for fault in self._apart:
            if fault.holds(at):
                at = fault.until
        return at


class Network:
    """When messages arrive.

    Args:
        delay_s: of each message; bandwidth: bytes per second between two instances; loss: share of
            the messages that are sent again; state_bytes: of a request that has begun, beside its
            KV cache.
        ways: what messages between the head and instances take in place of `delay_s`.
    """

    def __init__(
        self,
        delay_s: float = 0.0,
        bandwidth: float = 3e8,
        loss: float = 0.0,
        seed: int = 0,
        state_bytes: float = 0.0,
        ways: Took | None = None,
    ) -> None:
        if not 0 <= loss < 1:
            raise ConfigError(f"network: loss must be from 0 to below 1, got {loss!r}")
        self.delay_s = delay_s
        self.bandwidth = bandwidth
        self.state_bytes = state_bytes
        self._loss = loss
        self._ways = ways
        self._random = np.random.default_rng([seed, 7])
        self._latest: dict[tuple[str, str], float] = {}

    def size_of(self, messages: Sequence[Any]) -> float:
        """Bytes that take time beside the delay."""
        size = 0.0
        for message in messages:
            kind = type(message)
            if kind is Piece or kind is Parcel:
                size += message.size
            if kind is Parcel and message.carry.started_ago is not None:
                size += self.state_bytes
        return size

    def arrives(
        self, source: str, target: str, now: float, size: float, faults: Sequence[Faults]
    ) -> float:
        """When a message of `size` bytes from `source` is at `target`; inf: never."""
        at = now + self._delay(source, target, now)
        if size:
            at += size / self.bandwidth
        while self._loss and self._random.random() < self._loss:
            at += AGAIN_S
        for some in faults:
            at = some.reached(at)
        at = max(at, self._latest.get((source, target), 0.0))
        self._latest[source, target] = at
        return at

    def _delay(self, source: str, target: str, now: float) -> float:
        """Seconds of an empty message on a network that works."""
        if self._ways is None or HEAD not in (source, target):
            return self.delay_s
        way = self._ways.back if target == HEAD else self._ways.there
        return way.took(now)
