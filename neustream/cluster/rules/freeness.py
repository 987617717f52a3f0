"""Llumnix's rules for dispatching, moving and scaling, on freeness (see `memory`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from neustream.cluster.fleet import Fleet, Instance, Move, Place, Route
from neustream.cluster.rules.checks import a_number, at_least
from neustream.cluster.rules.memory import (
    free_blocks,
    freeness,
    freeness_of_running,
    reserve_of,
    text_of,
)
from neustream.core.outlook import Asked, Outlook
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Freeness:
    """The instance with the most free blocks for each request (INFaaS++ as Llumnix's paper has it).

    Until all have told how they are: in turns.

    Args:
        own: whether what was sent since an instance told how it is counts; the artifact leaves that
            out.
        high: classes of promises that come first. Others count `headroom` blocks less where one is,
            they count as many less where none is: they go together, and others elsewhere.
    """

    reads_params: ClassVar[bool] = False

    own: bool = True
    headroom: float = 0.0
    high: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("freeness", 0, headroom=self.headroom)

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        instances = [fleet.at(row) for row in rows.tolist()]
        if not all(each.told for each in instances):
            return Route(fleet.at(int(rows[fleet.dispatched[rows].argmin()])).name, "its turn")
        best = max(instances, key=lambda each: self._freeness(fleet, each, asked))
        return Route(best.name, "most free")

    def _freeness(self, fleet: Fleet, instance: Instance, asked: Asked) -> float:
        reserve = reserve_of(fleet, instance, self.headroom, self.high)
        if asked.slo.name in self.high:
            reserve = self.headroom - reserve
        outlook: Outlook = fleet.seen(instance) if self.own else instance.outlook
        return freeness(text_of(outlook), reserve)


@dataclass(frozen=True)
class FreenessMover:
    """From instances with little room to those with much, one request each (Llumnix).

    A source lost a request's blocks, or its freeness is below `threshold`; a target's is above, and
    none of its requests lost theirs. The worst source gives to the best target, and so on. Its
    latest request that decodes goes.
    """

    threshold: float = 3.0
    headroom: float = 0.0
    high: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        a_number("freeness", threshold=self.threshold)
        at_least("freeness", 0, headroom=self.headroom)

    def moves(self, fleet: Fleet) -> Sequence[Move]:
        sources: list[tuple[float, str]] = []
        targets: list[tuple[float, str]] = []
        for name, instance in fleet.instances.items():
            text = text_of(instance.outlook)
            reserve = reserve_of(fleet, instance, self.headroom, self.high)
            free = freeness_of_running(text, reserve)
            if text.evicted or free < self.threshold:
                sources.append((-math.inf if text.evicted else free, name))
            elif instance.state == "up" and free > self.threshold:
                targets.append((-free, name))
        moves = []
        for (_, source), (_, target) in zip(sorted(sources), sorted(targets), strict=False):
            victim = self._victim(fleet.requests(source))
            if victim is not None:
                moves.append(Move(victim.id, source, target, "little room"))
        return moves

    def _victim(self, places: Sequence[Place]) -> Place | None:
        """The latest request that decodes; of the classes that come first only if there is none."""
        decoding = [place for place in places if place.free and place.outputs > 0]
        return max(
            decoding,
            key=lambda place: (place.asked.slo.name not in self.high, place.arrival),
            default=None,
        )


@dataclass(frozen=True)
class FreenessScaler:
    """As many instances as keep the mean freeness between `low` and `low + band` (Llumnix).

    Up by as many empty ones as bring it to `low`; down by one if without the last it were above.
    """

    min: int = 1
    max: int = 16
    low: float = 10.0
    band: float = 50.0
    role: str = "whole"

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"freeness: min must be from 1 to max ({self.max}), got {self.min!r}")
        a_number("freeness", low=self.low)
        at_least("freeness", 0, band=self.band)

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        up = [
            one for one in fleet.instances.values() if one.role == self.role and one.state == "up"
        ]
        count = len(up) + fleet.starting.get(self.role, 0)
        if not up:
            return {self.role: self.min}
        texts = [text_of(each.outlook) for each in up]
        free = sum([free_blocks(text) for text in texts])
        empty = sum([text.blocks for text in texts]) / len(texts)
        free += (count - len(up)) * empty
        requests = sum([text.decodes + text.prompts for text in texts])
        if not requests or not empty:
            return {self.role: max(count - 1, self.min)}
        wanted = count
        while wanted < self.max and (free + (wanted - count) * empty) / requests < self.low:
            wanted += 1
        if (
            wanted == count
            and count > self.min
            and (free - empty) / requests > self.low + self.band
        ):
            wanted = count - 1
        return {self.role: min(max(wanted, self.min), self.max)}
