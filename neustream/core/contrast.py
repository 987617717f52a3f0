"""How many times as long one kind of step takes beside another kind, over what is expected of
both."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

NEAR = 5
"""Latest steps of the other kind that one is compared with."""
KEPT = 31
"""Latest comparisons that the contrast is the median of."""
MANY = 8
"""Steps with prompts without a decode in front of them that no phase is made of."""
DOUBT = 2.0
"""A contrast counts for nothing until it is so many times what noise would explain."""
LEAST = 1 / 16
"""The least share of a step that prompts are taken for, and the least times that they may take."""
AT_MOST = math.log(2)
"""By how much one comparison may be off what is known."""
NORMAL = 1.4826
"""Standard deviation over median distance, of what is normal."""


class Contrast:
    """Of what prompts add to a step, beside decodes.

    A slow phase of the device slows both, so what prompts take beside the decodes around them is
    none of it, and is believed after a few steps, where a speed has to last. Comparisons are
    logarithms of ratios; one that is as expected counts beforehand. They are shrunk by what noise
    would explain, as James and Stein do: that of decodes, or of the comparisons where it is more.
    Where no decode ran yet, and `MANY` prompts did, these are compared with what is expected.

    Noise is that of whole steps. The decodes of a step with prompts take as long as those around
    it, and what is left is the prompts': one step counts as at most twice and at least half of what
    is known, so that a phase does not make all prompts look hopeless, and none would show better.

    `times`: how many times as long what prompts add takes.
    """

    __slots__ = ("_added", "_decodes", "_lone", "_wholes", "times")

    def __init__(self) -> None:
        self.times = 1.0
        self._decodes: deque[float] = deque(maxlen=KEPT)
        self._lone = 0
        self._begin()

    def _begin(self) -> None:
        self._wholes: deque[float] = deque([0.0], maxlen=KEPT)
        self._added: deque[float] = deque([0.0], maxlen=KEPT)

    def decode(self, ratio: float) -> None:
        """A decode took `ratio` times what was expected."""
        self._decodes.append(math.log(ratio))

    def prompt(self, ratio: float, decodes: float = 0.0) -> None:
        """A step with prompts took `ratio` times what was expected without a contrast, of which its
        decodes were the share `decodes`."""
        near = list(self._decodes)[-NEAR:] or [0.0]
        if self._decodes and self._lone:  # what had nothing to be compared with
            self._begin()
            self._lone = 0
        whole = math.log(ratio) - median(near)
        self._wholes.append(whole)
        added, known = _added(whole, decodes) if decodes else whole, math.log(self.times)
        self._added.append(min(max(added, known - AT_MOST), known + AT_MOST))
        if not self._decodes:
            self._lone += 1
            if self._lone < MANY:
                return
        self.times = math.exp(self._share() * median(self._added))

    def _share(self) -> float:
        """How much of what was found is believed: from 0 to 1."""
        middle = median(self._wholes)
        if not middle:
            return 0.0
        noise = max(_distance(self._wholes), _distance(self._decodes))
        doubt = DOUBT * math.pi / 2 * (NORMAL * noise) ** 2 / len(self._wholes)
        return max(1 - doubt / middle**2, 0.0)


def _added(whole: float, decodes: float) -> float:
    """The logarithm for what prompts add, from that of a step of which decodes are a share."""
    over = (math.exp(whole) - 1) / max(1 - decodes, LEAST)
    return math.log(max(1 + over, LEAST))


def _distance(values: deque[float]) -> float:
    """The median distance of values to their median; 0 without any."""
    if not values:
        return 0.0
    middle = median(values)
    return median([abs(value - middle) for value in values])
