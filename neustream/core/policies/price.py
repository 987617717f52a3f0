"""What device time is worth under the load of lately: the shadow price of `priced`, its value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import NamedTuple

from neustream.core.demand import Calls, Demand
from neustream.core.policies.curve import curve_of, profile_key
from neustream.core.policy import View

ENOUGH = 10
"""Recent requests from which on there is a price."""


class _Known(NamedTuple):
    """The latest price of a pool, and what it follows from."""

    key: Hashable
    recent: tuple[Demand, ...]
    charges: Mapping[Demand, float]
    price: float
    value: float
    slacks: Mapping[Demand, tuple[float, float]]
    least: float
    longest: float
    seen: tuple[object, object, object]


def price_of(view: View) -> float:
    """Weight per second of charge of the best recent request that the device had no time for.

    The recent requests, at the charges that they came with and the most weight per charge first,
    fill the time between the first and the last of them. The price is 0 if that suffices for all,
    and as long as that time is shorter than their mean budget: a first burst is no load yet.
    Requests without a deadline pay nothing.
    """
    return _known(view).price


def value_of(view: View) -> float:
    """Weight per second that device time is worth: what it earns, by how much of it is needed.

    Below capacity that is what recent requests bring per second of charge, times the share of the
    time that all their charges fill: as often as that a second less makes somebody wait. Above it,
    the price where that is more.
    """
    return _known(view).value


def some_are_blocked(view: View) -> bool:
    """Whether a recent request had less slack than a step of a recent one's loop takes."""
    known = _known(view)
    return known.least < known.longest


def blocked(view: View, step: float, density: float) -> float:
    """Weight per second that requests like the recent ones lose while steps of `step` seconds run.

    One that comes in the middle of a step waits for its end. With less slack than that it is late
    by a chance of 1 - slack / step. Only those count that bring more than `density`, in weight per
    second of work alone.
    """
    known = _known(view)
    if known.least >= step or len(known.slacks) + 1 < ENOUGH:
        return 0.0
    lost = 0.0
    for demand, (slack, alone) in known.slacks.items():
        if 0 <= slack < step and demand.weight > density * alone:
            lost += demand.weight * (1 - slack / step)
    span = view.recent[-1].at - view.recent[0].at
    return lost / span if span > 0 else 0.0


def _known(view: View) -> _Known:
    """What follows from the recent requests.

    It changes with arrivals and, slightly, with speeds; `view.memo` keeps the latest one.
    """
    known: _Known | None = view.memo.get(_Known)
    seen = (view.recent, view.speed, view.profiles)
    if known is not None and all(map(is_, known.seen, seen)):
        return known
    stages = view.pool.stages
    profiles = tuple([profile_key(view.profiles[name]) for name in stages])
    speeds = tuple([round(view.speed.get(name, 1.0), 2) for name in stages])
    key = (stages, profiles, speeds, view.pool.workers)
    charges: Mapping[Demand, float] = {}
    slacks: Mapping[Demand, tuple[float, float]] = {}
    if known is not None and known.key == key:
        if known.recent is view.recent:
            known = view.memo[_Known] = known._replace(seen=seen)
            return known
        charges, slacks = known.charges, known.slacks
    speed = dict(zip(stages, speeds, strict=True))
    charges = {
        demand: charges[demand] if demand in charges else _charge_of(view, demand, speed)
        for demand in view.recent[1:]
    }
    slacks = {
        demand: slacks[demand] if demand in slacks else _slack_of(view, demand, speed)
        for demand in view.recent[1:]
    }
    least = min([slack for slack, _ in slacks.values() if slack >= 0], default=math.inf)
    known = _Known(
        key,
        view.recent,
        charges,
        *_prices(view, charges),
        slacks,
        least,
        _longest_step(view, speed),
        seen,
    )
    view.memo[_Known] = known
    return known


def _prices(view: View, charges: Mapping[Demand, float]) -> tuple[float, float]:
    """Price and value; the price is 0 before the recent requests are some, and longer than a burst.

    In a burst there is a value: all of the device is needed then.
    """
    recent = view.recent
    offers = [(demand, charges[demand]) for demand in recent[1:] if charges[demand] > 0]
    if not offers:
        return 0.0, 0.0
    span = recent[-1].at - recent[0].at
    room = span * view.pool.workers
    weight = sum([demand.weight for demand, _ in offers])
    charge = sum([charge for _, charge in offers])
    value = weight / max(room, charge)
    enough = len(offers) + 1 >= ENOUGH
    if not enough or span * len(offers) < sum([demand.budget for demand, _ in offers]):
        return 0.0, value
    price = _cleared(offers, room)
    return price, max(price, value)


def _cleared(offers: Sequence[tuple[Demand, float]], room: float) -> float:
    """The price at which the recent requests would have filled the device."""
    ranked = [(demand.weight / charge, charge) for demand, charge in offers]
    for density, charge in sorted(ranked, reverse=True):
        room -= charge
        if room < 0:
            return density
    return 0.0


def _charge_of(view: View, demand: Demand, speeds: Mapping[str, float]) -> float:
    """Seconds of this pool that a request costs at least, were all of its budget used.

    Loops share the budget in proportion to the time that they take alone. 0 if that is not known.
    """
    if math.isinf(demand.budget):
        return 0.0
    calls_here = {name: calls for name, calls in demand.calls.items() if name in speeds}
    loops = [name for name, calls in calls_here.items() if calls.looped]
    once = everything = 0.0
    for name, calls in calls_here.items():
        seconds = calls.count * _one_call(view, name, calls)
        everything += seconds
        if not calls.looped:
            once += seconds
    looped = everything - once
    if not looped:
        return once
    stretch = max(demand.budget - once, 0.0) / looped
    charge = once
    for name in loops:
        charge += _charge_of_loop(view, name, calls_here[name], stretch, speeds[name])
    return charge


def _charge_of_loop(view: View, stage: str, calls: Calls, stretch: float, speed: float) -> float:
    """Seconds that the calls of a loop cost if each may take `stretch` times what it does alone."""
    limit = min(calls.max_batch, view.profiles[stage].max_batch)
    curve = curve_of(view, stage, limit, _rounded(calls.size))
    pace = stretch * _one_call(view, stage, calls) / speed
    return calls.count * curve.charge_of(pace) * speed


def _longest_step(view: View, speeds: Mapping[str, float]) -> float:
    """Seconds of the longest step, alone, of a loop that a recent request asked for."""
    steps = {
        _one_call(view, name, calls) * speeds[name]
        for demand in view.recent
        for name, calls in demand.calls.items()
        if calls.looped and name in speeds
    }
    return max(steps, default=0.0)


def _slack_of(view: View, demand: Demand, speeds: Mapping[str, float]) -> tuple[float, float]:
    """Seconds that a request could wait when it came, and that it needs alone; inf if unknown."""
    alone = 0.0
    for name, calls in demand.calls.items():
        if name not in speeds:
            return math.inf, math.inf
        alone += calls.count * _one_call(view, name, calls) * speeds[name]
    return demand.budget - alone, alone


def _one_call(view: View, stage: str, calls: Calls) -> float:
    """Profiled seconds of one call alone."""
    size = _rounded(calls.size)
    return view.profiles[stage].latency(1, size, size * size)


def _rounded(size: float) -> float:
    """To two digits, so that jobs of nearly the same size share a curve."""
    return float(f"{size:.2g}")
