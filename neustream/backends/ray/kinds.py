"""Kinds of instances that a cluster serves on: what makes one, how many there are, what one takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neustream.cluster.fleet import Fleet
from neustream.errors import BackendError, shown

OPTIONS = ("num_cpus", "num_gpus", "memory")
"""Resources that Ray has options of their own for."""
TOTALS = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""What Ray calls them where it counts those of its machines."""


@dataclass(frozen=True)
class Kind:
    """Instances of one kind.

    Args:
        make: makes the service of one, called on its machine with the device there.
        count: how many there are at first; most: how many a scaler may have; default: `count`.
        resources: what one takes, by Ray's names ("num_gpus", "accelerator_type:H100"); default: a GPU
            where there are any, else a CPU.
    """

    make: Callable[[str], Any]
    count: int = 1
    most: int | None = None
    resources: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise BackendError(f"make is a function of a device, got {shown(self.make)}")

    @property
    def at_most(self) -> int:
        return self.count if self.most is None else max(self.most, self.count)


@dataclass(frozen=True)
class Each:
    """A scaler: always as many of each kind; who is lost is replaced."""

    counts: Mapping[str, int]

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        return self.counts


def options_of(resources: Mapping[str, float]) -> dict[str, Any]:
    """What an instance takes, as options of an actor."""
    own = {name: amount for name, amount in resources.items() if name in OPTIONS}
    custom = {name: amount for name, amount in resources.items() if name not in OPTIONS}
    return {**own, "resources": custom} if custom else own


def needs(resources: Mapping[str, float]) -> str:
    """What an instance takes, in words."""
    return ", ".join(f"{name}={amount:g}" for name, amount in resources.items())


def room(resources: Mapping[str, float], there: Mapping[str, float]) -> int:
    """How many instances that take `resources` find room where there is so much in all."""
    counts = [int(there.get(TOTALS.get(name, name), 0.0) // amount) for name, amount in resources.items() if amount > 0]
    return min(counts, default=2**31)


def check_room(
    counts: Mapping[str, int], resources: Mapping[str, Mapping[str, float]], there: Mapping[str, float]
) -> None:
    """BackendError if so many instances of each kind find no room where there is so much in all."""
    needed: dict[str, float] = {}
    for name, count in counts.items():
        able = room(resources[name], there)
        if count > able:
            of = needs(resources[name])
            raise BackendError(f"{count} instance(s) of {of} are more than the machines have room for: {able}")
        for resource, amount in resources[name].items():
            needed[resource] = needed.get(resource, 0.0) + count * amount
    for resource, amount in needed.items():
        able_in_all = there.get(TOTALS.get(resource, resource), 0.0)
        if amount > able_in_all:
            kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise BackendError(
                f"instances ({kinds}) need {resource}={amount:g} in all; the machines have {able_in_all:g}"
            )
