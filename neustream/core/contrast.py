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
NORMAL = 1.4826
"""Standard deviation over median distance, of what is normal."""


class Contrast:
    """Of steps with prompts beside decodes alone.

    A slow phase of the device slows both, so what prompts take beside the decodes around them is
    none of it, and is believed after a few steps, where a speed has to last. Comparisons are
    logarithms of ratios; one that is as expected counts beforehand. They are shrunk by what noise
    would explain, as James and Stein do: that of decodes, or of the comparisons where it is more.
    Where no decode ran yet, and `MANY` prompts did, these are compared with what is expected.

    `times`: how many times as long steps with prompts take.
    """

    __slots__ = ("_decodes", "_found", "_lone", "times")

    def __init__(self) -> None:
        self.times = 1.0
        self._decodes: deque[float] = deque(maxlen=KEPT)
        self._found: deque[float] = deque([0.0], maxlen=KEPT)
        self._lone = 0

    def decode(self, ratio: float) -> None:
        """A decode took `ratio` times what was expected."""
        self._decodes.append(math.log(ratio))

    def prompt(self, ratio: float) -> None:
        """A step with prompts took `ratio` times what was expected without a contrast."""
        near = list(self._decodes)[-NEAR:] or [0.0]
        if self._decodes and self._lone:  # what had nothing to be compared with
            self._found = deque([0.0], maxlen=KEPT)
            self._lone = 0
        self._found.append(math.log(ratio) - median(near))
        if not self._decodes:
            self._lone += 1
            if self._lone < MANY:
                return
        middle = median(self._found)
        noise = max(_distance(self._found), _distance(self._decodes))
        doubt = DOUBT * math.pi / 2 * (NORMAL * noise) ** 2 / len(self._found)
        share = 1 - doubt / middle**2 if middle else 0.0
        self.times = math.exp(max(share, 0.0) * middle)


def _distance(values: deque[float]) -> float:
    """The median distance of values to their median; 0 without any."""
    if not values:
        return 0.0
    middle = median(values)
    return median([abs(value - middle) for value in values])
