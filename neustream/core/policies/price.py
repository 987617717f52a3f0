"""What device time is worth under the load of lately: the shadow price of `priced`, its value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import NamedTuple

from neustream.core.demand import Calls, Demand
from neustream.core.job import Job
from neustream.core.policies.curve import curve_of, profile_key
from neustream.core.policy import View

ENOUGH = 10
"""Recent requests from which on there is a price."""
MOVED = 0.05
"""Share by which the speed of a stage has to move for costs to be computed anew."""


class Cost(NamedTuple):
    """What a request costs a pool.

    `charge`: seconds, at least, were all of its budget used. `slack`: seconds that it could wait
    when it came; `alone`: that it needs alone; both inf if stages of other pools are asked for.
    `step`: seconds of the longest step, alone, of its loops.
    """

    charge: float
    slack: float
    alone: float
    step: float


class _Known(NamedTuple):
    """The latest price of a pool, and what it follows from."""

    key: Hashable
    speeds: Mapping[str, float]
    recent: tuple[Demand, ...]
    costs: Mapping[Demand, Cost]
    price: float
    value: float
    filled: float
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


def filled(view: View) -> float:
    """The part of the time that recent requests' charges fill, at most 1; 0 in a first burst."""
    return _known(view).filled


def recent_costs(view: View) -> Mapping[Demand, Cost]:
    """What each of the recent requests but the first costs the pool."""
    return _known(view).costs


def some_are_blocked(view: View) -> bool:
    """Whether a recent request had less slack than a step of a recent one's loop takes."""
    known = _known(view)
    return known.least < known.longest


def blocked_until(view: View, step: float, job: Job) -> float:
    """When steps of `step` seconds of a job, while it runs, lose no more than its weight.

    Requests like the recent ones lose by them. One that comes in the middle of a step waits for its
    end. With less slack than that it is late by a chance of 1 - slack / step. Only those count that
    bring more weight per second of work alone than the job. The longer ago they came, the fewer of
    them are to be expected while it runs.
    """
    known = _known(view)
    if known.least >= step or len(known.costs) + 1 < ENOUGH:
        return -math.inf
    density = job.weight / job.remaining_s
    lost = 0.0
    for demand, (_, slack, alone, _) in known.costs.items():
        if 0 <= slack < step and demand.weight > density * alone:
            lost += demand.weight * (1 - slack / step)
    return view.recent[0].at + lost / density


def _known(view: View) -> _Known:
    """What follows from the recent requests.

    It changes with arrivals, and with speeds that move by more than noise does; `view.memo` keeps
    the latest one.
    """
    known: _Known | None = view.memo.get(_Known)
    seen = (view.recent, view.speed, view.profiles)
    if known is not None and all(map(is_, known.seen, seen)):
        return known
    stages = view.pool.stages
    profiles = tuple([profile_key(view.profiles[name]) for name in stages])
    key = (stages, profiles, view.pool.workers)
    speeds: Mapping[str, float] = {name: view.speed.get(name, 1.0) for name in stages}
    costs: Mapping[Demand, Cost] = {}
    if known is not None and known.key == key and not _moved(known.speeds, speeds):
        if known.recent is view.recent:
            known = view.memo[_Known] = known._replace(seen=seen)
            return known
        speeds, costs = known.speeds, known.costs
    device = _Device(view, speeds)
    costs = {
        demand: costs[demand] if demand in costs else device.cost(demand)
        for demand in view.recent[1:]
    }
    least = min([cost.slack for cost in costs.values() if cost.slack >= 0], default=math.inf)
    longest = max([cost.step for cost in costs.values()], default=0.0)
    prices = _prices(view, costs)
    known = _Known(key, speeds, view.recent, costs, *prices, least, longest, seen)
    view.memo[_Known] = known
    return known


def _moved(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether the speed of a stage is another one by now."""
    return any(abs(speed - before[name]) > MOVED * before[name] for name, speed in now.items())


def _prices(view: View, costs: Mapping[Demand, Cost]) -> tuple[float, float, float]:
    """Price, value and the part of the time that is filled.

    Price and part are 0 before the recent requests are some, and longer than a burst. In a burst
    there is a value: all of the device is needed then.
    """
    recent = view.recent
    offers = [(demand, cost.charge) for demand, cost in costs.items() if cost.charge > 0]
    if not offers:
        return 0.0, 0.0, 0.0
    span = recent[-1].at - recent[0].at
    room = span * view.pool.workers
    weight = sum([demand.weight for demand, _ in offers])
    charge = sum([charge for _, charge in offers])
    value = weight / max(room, charge)
    enough = len(offers) + 1 >= ENOUGH
    if not enough or span * len(offers) < sum([demand.budget for demand, _ in offers]):
        return 0.0, value, 0.0
    price = _cleared(offers, room)
    return price, max(price, value), min(1.0, charge / room)


def _cleared(offers: Sequence[tuple[Demand, float]], room: float) -> float:
    """The price at which the recent requests would have filled the device."""
    ranked = [(demand.weight / charge, charge) for demand, charge in offers]
    for density, charge in sorted(ranked, reverse=True):
        room -= charge
        if room < 0:
            return density
    return 0.0


class _Device:
    """What requests cost a pool at given speeds of its stages; what a call takes is kept."""

    def __init__(self, view: View, speeds: Mapping[str, float]) -> None:
        self._view = view
        self._speeds = speeds
        self._calls: dict[tuple[str, float], float] = {}

    def cost(self, demand: Demand) -> Cost:
        """What a request costs."""
        speeds, away = self._speeds, False
        once = looped = alone = step = 0.0
        for name, calls in demand.calls.items():
            if name not in speeds:
                away = True
                continue
            call = self._call(name, calls)
            alone += calls.count * call * speeds[name]
            if calls.looped:
                looped += calls.count * call
                step = max(step, call * speeds[name])
            else:
                once += calls.count * call
        charge = self._charge(demand, once, looped)
        if away:
            return Cost(charge, math.inf, math.inf, step)
        return Cost(charge, demand.budget - alone, alone, step)

    def _charge(self, demand: Demand, once: float, looped: float) -> float:
        """Seconds of this pool that a request costs at least, were all of its budget used.

        It takes `once` alone outside of loops and `looped` in them. Loops share the budget in
        proportion to the time that they take alone. 0 if that is not known.
        """
        if math.isinf(demand.budget):
            return 0.0
        charge = once
        if looped:
            stretch = max(demand.budget - once, 0.0) / looped
            for name, calls in demand.calls.items():
                if calls.looped and name in self._speeds:
                    charge += self._charge_of_loop(name, calls, stretch)
        return charge

    def _charge_of_loop(self, stage: str, calls: Calls, stretch: float) -> float:
        """Seconds that a loop costs if each call may take `stretch` times what it does alone."""
        limit = min(calls.max_batch, self._view.profiles[stage].max_batch)
        curve = curve_of(self._view, stage, limit, _rounded(calls.size))
        speed = self._speeds[stage]
        pace = stretch * self._call(stage, calls) / speed
        return calls.count * curve.charge_of(pace) * speed

    def _call(self, stage: str, calls: Calls) -> float:
        """Profiled seconds of one call alone."""
        key = (stage, calls.size)
        seconds = self._calls.get(key)
        if seconds is None:
            size = _rounded(calls.size)
            seconds = self._view.profiles[stage].latency(1, size, size * size)
            self._calls[key] = seconds
        return seconds


def _rounded(size: float) -> float:
    """To two digits, so that jobs of nearly the same size share a curve."""
    return float(f"{size:.2g}")
