"""A router for texts: where most of the prompt is already, unless much more waits there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neustream.cluster.fleet import Fleet, Place, Route
from neustream.cluster.rules.checks import at_least
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class Prefix:
    """The instance with the longest common start of the prompt among the requests that it has.

    Prompts are compared by `params[key]`: tokens, which texts of our own backend have there, or a
    string. An instance whose backlog is more than `spare_s` seconds above the least one does not
    count. Where nothing is in common, the least backlog.
    """

    reads_params: ClassVar[bool] = True

    key: str = "prompt"
    spare_s: float = 1.0
    k: int = 16

    def __post_init__(self) -> None:
        at_least("prefix", 1, k=self.k)
        at_least("prefix", 0, spare_s=self.spare_s)

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        backlog = fleet.backlog(rows)
        order = np.argsort(backlog, kind="stable")[: self.k]
        near = order[backlog[order] <= backlog[order[0]] + self.spare_s]
        prompt = asked.params.get(self.key)
        best, longest = int(near[0]), 0
        for place in near.tolist():
            shared = self._shared(prompt, fleet.requests(fleet.at(int(rows[place])).name))
            if shared > longest:
                best, longest = place, shared
        reason = f"{longest} in common" if longest else "least backlog"
        return Route(fleet.at(int(rows[best])).name, reason)

    def _shared(self, prompt: object, places: Sequence[Place]) -> int:
        if not isinstance(prompt, Sequence):
            return 0
        return max(
            [_common(prompt, place.asked.params.get(self.key)) for place in places], default=0
        )


def _common(one: Sequence[object], other: object) -> int:
    """How much two prompts have in common at their start."""
    if not isinstance(other, Sequence) or type(one) is not type(other):
        return 0
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
