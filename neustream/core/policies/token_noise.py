"""What is kept of a step of decodes so that its noise makes few outputs late."""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

SAFE = 1.0, 2.0
"""Least and most times the median error of predictions that is kept as slack of single steps."""
LATE = 0.5
"""Outputs that the noise of a step may make late, on average."""
MOST_SLACK = 0.4
"""Share of a step that is kept as slack for its noise at most."""


@lru_cache(maxsize=4096)
def safe(error: float, decodes: int) -> float:
    """Share of a step that is kept as slack, so that its noise makes `LATE` outputs late.

    A step that takes longer makes the outputs of all its decodes late: the more decode, the more
    is kept.

    Args:
        error: median error of predictions, as a share; errors are taken as normal.
        decodes: outputs that a long step makes late.
    """
    least, most = SAFE
    chance = min(LATE / max(decodes, 1), 0.5)
    times = NormalDist().inv_cdf(1 - chance) / NormalDist().inv_cdf(0.75)
    return min(MOST_SLACK, error * min(max(times, least), most))
