"""The scaler `plan` at work: it plans now and then, and gets from one placement to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from neustream.cluster.fleet import Fleet
from neustream.cluster.planning.placement import Device, Placement, Where
from neustream.cluster.rules.replan import Replan
from neustream.core.outlook import Asked
from neustream.core.rates import Rates

Arrivals = Sequence[tuple[float, Asked]]
"""When requests came, and what they asked for."""
Planned = Callable[[Arrivals, Placement], Placement]
"""The placement for some arrivals, where devices are placed in a way at present."""
FEW = 20
"""Of fewer arrivals no plan is made."""


class Replanner:
    """Follows a placement, and has another one planned when the load has changed. Not pure.

    From one to the next: a device that is free starts what is lacking. Where none is, an instance
    of which there are too many is drained, one at a time, so that its device gets free.

    Args:
        names: what instances of a role are called, for all roles that there may be.
        present: the placement at the start.
    """

    def __init__(
        self,
        rule: Replan,
        names: Mapping[Where, str],
        devices: Sequence[Device],
        present: Placement,
        planned: Planned,
    ) -> None:
        self.placement = present
        self._rule = rule
        self._names = names
        self._where = {name: where for where, name in names.items()}
        self._devices = {device.name: device for device in devices}
        self._planned = planned
        self._next_at = rule.window_s
        self._demand: float | None = None

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        """The next step towards the placement."""
        if fleet.now >= self._rule.window_s and self._settled(fleet):
            self._look(fleet)
        return self._step(fleet)

    # -- planning ---------------------------------------------------------------------------------

    def _look(self, fleet: Fleet) -> None:
        """Plan, if it is time for that or the demand has changed."""
        rule = self._rule
        since = fleet.now - rule.window_s
        recent = [(at, asked) for at, asked in fleet.arrivals if at >= since]
        if len(recent) < FEW:
            return
        demand = self._asked(fleet, recent)
        before = self._demand
        changed = before is not None and abs(demand - before) > rule.range * before
        waited = fleet.now >= self._next_at - rule.plan_s + rule.window_s
        if fleet.now < self._next_at and not (changed and waited):
            return
        self.placement = self._planned(recent, self.placement)
        self._demand = demand
        self._next_at = fleet.now + rule.plan_s

    def _asked(self, fleet: Fleet, recent: Arrivals) -> float:
        """Seconds of the first kind of device that are asked for each second."""
        rates: Rates = next(iter(self._devices.values())).rates
        known = rates.profiles.keys()
        whole = [one for _, one in recent if one.calls.keys() <= known]
        return sum([rates.charge(one.calls) for one in whole]) / self._rule.window_s

    # -- getting there ----------------------------------------------------------------------------

    def _settled(self, fleet: Fleet) -> bool:
        """Whether devices serve what they are to serve."""
        return self._serving(fleet) == Counter(self._wanted())

    def _wanted(self) -> dict[str, int]:
        return {self._names[where]: count for where, count in self.placement.as_counts().items()}

    def _serving(self, fleet: Fleet) -> Counter[str]:
        """Instances by name of their role, with those that are starting."""
        found = Counter(one.role for one in fleet.instances.values() if one.state != "draining")
        found.update({role: count for role, count in fleet.starting.items() if count})
        return found

    def _step(self, fleet: Fleet) -> Mapping[str, int]:
        wanted, serving = self._wanted(), self._serving(fleet)
        target = {name: serving[name] for name in {*wanted, *serving}}
        for device in self._devices.values():
            names = [name for name, (kind, _) in self._where.items() if kind == device.name]
            lacking = [name for name in names if wanted.get(name, 0) > serving[name]]
            spare = [name for name in names if wanted.get(name, 0) < serving[name]]
            leaving = sum(
                one.state == "draining" and one.role in names for one in fleet.instances.values()
            )
            free = device.count - leaving - sum(serving[name] for name in names)
            if lacking and free > 0:
                target[lacking[0]] += 1
            elif spare and not leaving and not self._starting(fleet, names):
                target[self._first_to_go(spare, serving)] -= 1
        return target

    def _starting(self, fleet: Fleet, names: Sequence[str]) -> bool:
        return any(fleet.starting.get(name, 0) for name in names)

    def _first_to_go(self, spare: Sequence[str], serving: Counter[str]) -> str:
        """A role of which one may go while all stages stay served, if there is one; of many one."""

        def rank(name: str) -> tuple[bool, int]:
            left = serving - Counter((name,))
            others = {stage for role in left for stage in self._where[role][1]}
            return others.issuperset(self._where[name][1]), serving[name]

        return max(spare, key=rank)
