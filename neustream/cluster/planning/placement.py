"""What a plan is about: devices, what stages need, and which device serves which stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from neustream.core.rates import Rates

Stages = tuple[str, ...]
"""The stages of a role, in the order of their graphs."""
Where = tuple[str, Stages]
"""A kind of device, by name, and what it serves."""


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of devices.

    Args:
        count: how many there are. rates: what stages take there.
        memory_bytes: room for weights. load_s: from being ordered to being there.
    """

    name: str
    count: int
    rates: Rates
    memory_bytes: float = math.inf
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Needs:
    """What stages need beside time.

    Args:
        weights_bytes: by stage; those that are not named need nothing.
        state_bytes: of a request that goes from one device to another; token_bytes: of a token in
            its KV cache; bandwidth: bytes per second.
        rooms: tokens in the KV cache of a model, by name; those that are not named have no limit.
        tied: models whose stages cannot be on different devices.
    """

    weights_bytes: Mapping[str, float] = field(default_factory=dict)
    state_bytes: float = 0.0
    token_bytes: float = 0.0
    bandwidth: float = math.inf
    rooms: Mapping[str, float] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()

    def fits(self, stages: Stages, device: Device) -> bool:
        """Whether the weights of some stages fit a device."""
        needed = sum([self.weights_bytes.get(stage, 0.0) for stage in stages])
        return needed <= device.memory_bytes

    def may_part(self, stages: Stages, others: Iterable[str]) -> bool:
        """Whether no model has to be both in `stages` and in `others`."""
        models = {stage.rpartition(".")[0] for stage in stages} & self.tied
        return models.isdisjoint(stage.rpartition(".")[0] for stage in others)


@dataclass(frozen=True, slots=True)
class Placement:
    """How many devices of each kind serve which stages; sorted, each once."""

    counts: tuple[tuple[str, Stages, int], ...]

    @classmethod
    def of(cls, counts: Mapping[Where, int]) -> Placement:
        """That of some counts; those of 0 are left out."""
        rows = [(device, stages, count) for (device, stages), count in counts.items() if count]
        return cls(tuple(sorted(rows)))

    def as_counts(self) -> dict[Where, int]:
        """Devices by kind and stages."""
        return {(device, stages): count for device, stages, count in self.counts}

    @property
    def stages(self) -> frozenset[str]:
        """Those that somebody serves."""
        return frozenset(stage for _, stages, _ in self.counts for stage in stages)

    @property
    def roles(self) -> int:
        """How many different sets of stages devices serve."""
        return len({stages for _, stages, _ in self.counts})

    def changed(self, other: Placement) -> dict[str, int]:
        """Devices of each kind that serve other stages in `other`."""
        before, after = self.as_counts(), other.as_counts()
        found: dict[str, int] = {}
        for where, count in after.items():
            more = count - before.get(where, 0)
            if more > 0:
                found[where[0]] = found.get(where[0], 0) + more
        return found

    def __str__(self) -> str:
        """As in "3 h100: unet; 1 h100: clip + vae"."""
        rows = [f"{n} {device}: {' + '.join(stages)}" for device, stages, n in self.counts]
        return "; ".join(rows)
