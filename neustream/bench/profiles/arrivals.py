"""When requests come, by the laws of the tools that the profiles are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from neustream.workload.arrivals import conditioned_arrivals, gamma_arrivals
from neustream.workload.lengths import Floats

Law = Literal["closed", "at once", "even", "poisson", "rescaled", "rescaled by second"]
LAWS: Mapping[Law, str] = {
    "closed": "as places become free",
    "at once": "all at the beginning",
    "even": "equal gaps",
    "poisson": "Poisson",
    "rescaled": "random gaps, rescaled to fill the time",
    "rescaled by second": "a Poisson number a second, random gaps within",
}
"""Each law, and what it is called in a plan."""


def arrivals(law: Law, number: int, rate: float, cv: float, seed: int) -> Floats | None:
    """Instants of `number` requests from the start of their load, in seconds, shape (number,).

    cv: of the gaps of the laws `poisson` and `rescaled`, 1 for exponential ones. None: there is no
    schedule.
    """
    if law == "closed":
        return None
    return _DRAWN[law](seed, number, rate, cv)


def arrivals_until(law: Law, duration_s: float, rate: float, cv: float, seed: int) -> Floats:
    """The arrivals of a law that has a rate, as long as they come before `duration_s`."""
    number = int(rate * duration_s * 1.2) + 50
    while True:
        found = arrivals(law, number, rate, cv, seed)
        assert found is not None
        if law != "poisson" or found[-1] >= duration_s:
            return found[found < duration_s]
        number *= 2


def growing(number: int, rate: float, seconds: float) -> Floats:
    """Even gaps, at a rate that grows from nothing to `rate` in `seconds`; shape (number,).

    As guidellm has it: the k-th request, from 1, comes when `rate * t**2 / (2 * seconds)` is k, and
    the first one at once.
    """
    order = np.arange(1, number + 1)
    within = rate * seconds / 2
    after = seconds + (order - within) / rate
    found: Floats = np.where(order <= within, np.sqrt(2 * order * seconds / rate), after)
    found[:1] = 0.0
    return found


def _at_once(seed: int, number: int, rate: float, cv: float) -> Floats:
    return np.zeros(number)


def _even(seed: int, number: int, rate: float, cv: float) -> Floats:
    return np.arange(number) / rate


def _poisson(seed: int, number: int, rate: float, cv: float) -> Floats:
    return gamma_arrivals(number, rate=rate, cv=cv, seed=seed)


def _rescaled(seed: int, number: int, rate: float, cv: float) -> Floats:
    return conditioned_arrivals(number, rate=rate, cv=cv, seed=seed)


def _by_second(seed: int, number: int, rate: float, cv: float) -> Floats:
    """The last of each second comes at its end."""
    rng = np.random.default_rng(seed)
    found, second = [np.zeros(0)], 0
    while sum(map(len, found)) < number:
        count = int(rng.poisson(rate))
        if count:
            found.append(second + _rescaled(int(rng.integers(2**32)), count, count, 1.0))
        second += 1
    return np.concatenate(found)[:number]


_DRAWN: Mapping[Law, Callable[[int, int, float, float], Floats]] = {
    "at once": _at_once,
    "even": _even,
    "poisson": _poisson,
    "rescaled": _rescaled,
    "rescaled by second": _by_second,
}
