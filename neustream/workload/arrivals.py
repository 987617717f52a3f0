"""Arrival processes, as instants in seconds from the start of the trace.

Randomness is numpy's legacy generator, seeded anew for each draw: with seed 0 the numbers are bit
for bit those of the NeuStream artifact's traces.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gamma_arrivals(requests: int, *, rate: float, cv: float, seed: int) -> NDArray[np.float64]:
    """Gamma-distributed gaps of mean `1 / rate` and coefficient of variation `cv`; cv 1 is Poisson.

    cv is the burstiness: vLLM's `--burstiness` is `1 / cv**2`. The first request comes after the
    first gap.
    """
    shape, scale = 1 / cv**2, cv**2 / rate
    return np.cumsum(np.random.RandomState(seed).gamma(shape, scale, requests))


def constant_arrivals(requests: int, *, rate: float) -> NDArray[np.float64]:
    """Evenly spaced arrivals, the first after one gap."""
    return np.arange(1, requests + 1) / rate
