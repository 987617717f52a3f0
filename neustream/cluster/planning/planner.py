"""Which stages on which devices: candidates by their charges, judged by simulation. Pure.

A placement is never taken by a formula alone: charges say what a device could do if nothing ever
waited, and a stage apart waits for others. So the candidates are simulated on arrivals that were
seen, and devices of the best one change their roles one by one for as long as that serves more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neustream.cluster.planning.capacity import capacity, replicas
from neustream.cluster.planning.charges import Charges
from neustream.cluster.planning.cuts import cuts, possible_roles
from neustream.cluster.planning.placement import Placement, Stages, Where
from neustream.errors import ConfigError

Judge = Callable[[Placement], float]
"""Requests per second that are on time with a placement, by simulation."""
CLOSE = 0.005
"""Goodput within so much of the best counts as equal: the simpler placement is taken."""
PRESENT = "as it is"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a plan is made.

    Args:
        most: candidates that are simulated at first; tries: changes of one device after that.
        gain: a new placement has to serve so much more than the present one.
        plan_s: for how long it will stay, so that what the change costs pays off.
        drain_s: that a device needs to end what it has.
    """

    most: int = 10
    tries: int = 24
    gain: float = 0.03
    plan_s: float = 300.0
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("most", "plan_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)!r}")
        for name in ("tries", "gain", "drain_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that was looked at.

    `capacity`: requests per second by charges; `goodput`: those on time, by simulation.
    """

    placement: Placement
    about: str
    capacity: float
    goodput: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What came of planning. `best`: the one to have; `why`: in a sentence.

    `candidates`: all that were simulated, in that order.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    why: str

    @property
    def placement(self) -> Placement:
        return self.best.placement


def plan(
    charges: Charges,
    judge: Judge,
    present: Placement | None = None,
    settings: Settings | None = None,
) -> Plan:
    """The placement that serves most of a load, or the present one if the change does not pay.

    Raises:
        ConfigError: no placement serves all stages: there are too few devices, or weights fit none.
    """
    settings = settings or Settings()
    search = _Search(charges, judge)
    if present is not None:
        search.look(present, PRESENT)
    for placement, about in _first(charges)[: settings.most]:
        search.look(placement, about)
    if not search.seen:
        count = sum(device.count for device in charges.devices.values())
        stages = ", ".join(charges.stages)
        raise ConfigError(
            f"no placement of stages {stages} on {count} devices: too few, or weights fit none"
        )
    search.improve(settings.tries)
    best = search.best()
    if present is None or best.placement == present:
        return Plan(best, tuple(search.seen.values()), _reason(best, search))
    return _if_it_pays(charges, search, present, best, settings)


class _Search:
    """The candidates seen so far."""

    def __init__(self, charges: Charges, judge: Judge) -> None:
        self.charges = charges
        self.seen: dict[Placement, Candidate] = {}
        self._judge = judge

    def look(self, placement: Placement, about: str) -> Candidate:
        """Simulate a placement, if that was not done."""
        found = self.seen.get(placement)
        if found is None:
            most = capacity(self.charges, placement)
            found = Candidate(placement, about, most, self._judge(placement))
            self.seen[placement] = found
        return found

    def best(self) -> Candidate:
        """The simplest of those that serve about as much as the best."""
        most = max(one.goodput for one in self.seen.values())
        near = [one for one in self.seen.values() if one.goodput >= most * (1 - CLOSE)]
        return min(near, key=lambda one: (one.placement.roles, -one.goodput, -one.capacity))

    def improve(self, tries: int) -> None:
        """Change the role of one device after the other, while that serves more."""
        while tries > 0:
            best = max(self.seen.values(), key=lambda one: (one.goodput, one.capacity))
            if best.goodput >= self.charges.rate * (1 - CLOSE):
                return
            rest = [one for one in neighbours(self.charges, best.placement) if one not in self.seen]
            rest.sort(key=lambda one: -capacity(self.charges, one))
            for placement in rest[:tries]:
                tries -= 1
                if self.look(placement, "one device changed").goodput > best.goodput:
                    break
            else:
                return


def _first(charges: Charges) -> list[tuple[Placement, str]]:
    """The placements to begin with: all together, then those of the largest capacity."""
    found: dict[Placement, str] = {}
    for cut, about in cuts(charges).items():
        placement = replicas(charges, cut)
        if placement is not None:
            found.setdefault(placement, about)
    for placement in _beside(charges):
        found.setdefault(placement, "one model alone on some")
    ranked = list(found.items())
    if ranked and ranked[0][0].roles == 1:
        first, ranked = ranked[:1], ranked[1:]
    else:
        first = []
    return first + sorted(ranked, key=lambda each: -capacity(charges, each[0]))


def _beside(charges: Charges) -> Iterator[Placement]:
    """Of several models: all on some devices of each kind, one of them alone on the others."""
    whole = charges.stages
    for chain in charges.chains if len(charges.chains) > 1 else ():
        able = charges.fits(whole), charges.fits(chain)
        for share in (0.33, 0.5, 0.67):
            counts: dict[Where, int] = {}
            for name, device in charges.devices.items():
                alone = round(share * device.count) if name in able[1] else 0
                counts[name, chain] = alone
                counts[name, whole] = device.count - alone if name in able[0] else 0
            placement = Placement.of(counts)
            if placement.roles == 2:
                yield placement


def neighbours(charges: Charges, placement: Placement) -> Iterator[Placement]:
    """The placements in which one device serves other stages."""
    roles = roles_of(charges, placement)
    counts = placement.as_counts()
    for device, stages in counts:
        for other in roles:
            if other == stages or device not in charges.fits(other):
                continue
            changed = _moved(counts, (device, stages), (device, other))
            if changed.stages >= set(charges.stages):
                yield changed


def roles_of(charges: Charges, placement: Placement) -> list[Stages]:
    """The roles that a device may change to."""
    found = possible_roles(charges.stages, charges.chains)
    found += [stages for _, stages, _ in placement.counts]
    return list(dict.fromkeys(found))


def _moved(counts: dict[Where, int], source: Where, target: Where) -> Placement:
    after = dict(counts)
    after[source] -= 1
    after[target] = after.get(target, 0) + 1
    return Placement.of(after)


def _if_it_pays(
    charges: Charges, search: _Search, present: Placement, best: Candidate, settings: Settings
) -> Plan:
    """The best placement, unless what it gains is less than what the change costs."""
    now = search.seen[present]
    count = sum(device.count for device in charges.devices.values())
    away = 0.0
    for name, changed in present.changed(best.placement).items():
        away += changed * (charges.devices[name].load_s + settings.drain_s)
    cost = min(away / (settings.plan_s * count), 1.0)
    needed = now.goodput * (1 + settings.gain)
    seen = tuple(search.seen.values())
    if best.goodput * (1 - cost) < needed:
        why = (
            f"stays as it is: {best.placement} would serve {best.goodput:.3g} req/s on time, "
            f"{best.goodput * (1 - cost):.3g} with the cost of the change; it serves "
            f"{now.goodput:.3g}, and a change needs {needed:.3g}"
        )
        return Plan(now, seen, why)
    return Plan(best, seen, f"{_reason(best, search)}; as it is, {now.goodput:.3g}")


def _reason(best: Candidate, search: _Search) -> str:
    others = [one.goodput for one in search.seen.values() if one is not best]
    next_best = f"; the best other {max(others):.3g}" if others else ""
    served = f"serves {best.goodput:.3g} of {search.charges.rate:.3g} req/s on time"
    return f"{best.about}: {served}{next_best}"
