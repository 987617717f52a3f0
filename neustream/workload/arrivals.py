"""Arrival processes, as instants in seconds from the start of the trace.

Randomness is numpy's legacy generator, seeded anew for each draw: with seed 0 the numbers are bit
for bit those of the NeuStream artifact's traces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def gamma_arrivals(requests: int, *, rate: float, cv: float, seed: int) -> NDArray[np.float64]:
    """Gamma-distributed gaps of mean `1 / rate` and coefficient of variation `cv`; cv 1 is Poisson, 0 even.

    cv is the burstiness: vLLM's `--burstiness` is `1 / cv**2`. The first request comes after the
    first gap.
    """
    if not cv:
        return constant_arrivals(requests, rate=rate)
    shape, scale = 1 / cv**2, cv**2 / rate
    return np.cumsum(np.random.RandomState(seed).gamma(shape, scale, requests))


def constant_arrivals(requests: int, *, rate: float) -> NDArray[np.float64]:
    """Evenly spaced arrivals, the first after one gap."""
    return np.arange(1, requests + 1) / rate


def conditioned_arrivals(requests: int, *, rate: float, cv: float, seed: int) -> NDArray[np.float64]:
    """The same with all gaps scaled so that the last request comes at `requests / rate`.

    vLLM's client and inference-perf draw so: the rate of each run is the one that was asked for.
    """
    arrivals = gamma_arrivals(requests, rate=rate, cv=cv, seed=seed)
    return arrivals * (requests / rate / arrivals[-1]) if requests else arrivals


@dataclass(frozen=True)
class Ramp:
    """A rate that goes from `start` to `end` requests a second."""

    start: float
    end: float
    exponential: bool = False

    def __str__(self) -> str:
        return f"{'exponential' if self.exponential else 'linear'} ramp from {self.start:g} to {self.end:g} requests/s"

    def arrivals(self, requests: int, *, cv: float, seed: int) -> NDArray[np.float64]:
        """Gamma-distributed gaps at that rate.

        The k-th of n requests comes at the rate `start + (end - start) * k / n`, or, if
        `exponential`, `start * (end / start) ** (k / n)`, as vLLM's client has it.
        """
        progress = np.arange(requests) / max(requests, 1)
        linear = self.start + (self.end - self.start) * progress
        rates = self.start * (self.end / self.start) ** progress if self.exponential else linear
        gaps = np.diff(gamma_arrivals(requests, rate=1.0, cv=cv, seed=seed), prepend=0.0)
        return np.cumsum(gaps / rates)


def with_burst(arrivals: NDArray[np.float64], *, after: int, requests: int, factor: float) -> NDArray[np.float64]:
    """The same arrivals, but for `requests` gaps behind the first `after` arrivals, divided by `factor`.

    What comes before is left as it is, bit for bit; what comes behind keeps its gaps and moves up.
    """
    edges = np.concatenate([[0.0], arrivals])
    burst = arrivals[after : after + requests]
    if not len(burst):
        return arrivals.copy()
    start, end = edges[after], burst[-1]
    last = start + (end - start) / factor
    parts = [arrivals[:after], start + (burst - start) / factor, last + (arrivals[after + requests :] - end)]
    return np.concatenate(parts)
