"""Ways to cut the stages of a load into roles: what a planner tries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from neustream.cluster.planning.charges import Charges
from neustream.cluster.planning.placement import Stages

Cut = tuple[Stages, ...]
"""Roles, each stage in one of them."""
Best = dict[tuple[int, int], tuple[float, tuple[int, ...]]]
"""By stages in front and devices used: the largest charge, and the places of the cuts."""
MOST_GROUPS = 4
LARGE = 0.1
"""A stage with so much of all charges is large."""


def cuts(charges: Charges) -> dict[Cut, str]:
    """Ways to cut, with what each is; all together first."""
    stages = charges.stages
    found: dict[Cut, str] = {(stages,): "all together"}
    for groups in range(2, min(MOST_GROUPS, len(stages)) + 1):
        best = cheapest_cut(charges, groups)
        if best:
            found.setdefault(best, f"least charge in {groups} groups")
    if len(charges.chains) > 1:
        found.setdefault(tuple(charges.chains), "each model apart")
    for stage in _large(charges):
        rest = tuple(other for other in stages if other != stage)
        found.setdefault(_in_order(stages, (stage,), rest), f"{stage} apart")
    for at in range(1, len(stages)):
        found.setdefault((stages[:at], stages[at:]), f"cut before {stages[at]}")
    return found


def segments(stages: Stages) -> list[Stages]:
    """All roles of stages that follow each other, the longest first."""
    count = len(stages)
    spans = itertools.combinations(range(count + 1), 2)
    found = [stages[first:stop] for first, stop in spans]
    return sorted(found, key=len, reverse=True)


def possible_roles(stages: Stages, chains: Sequence[Stages]) -> list[Stages]:
    """All roles that a planner may come to."""
    found = [*segments(stages), *chains]
    found += [tuple(other for other in stages if other != stage) for stage in stages]
    return [role for role in dict.fromkeys(found) if role]


def cheapest_cut(charges: Charges, groups: int) -> Cut:
    """The cut in so many groups whose largest charge for each device is the least.

    best[g][i][n]: the least, for the first i stages in g groups on n devices. It is the least, over
    places k of the last cut and numbers r of devices behind it, of the larger of two:
    best[g - 1][k][n - r], and the charge of stages k to i over r. Groups that fit no kind of device
    are none. () if there is no cut.
    """
    stages = charges.stages
    devices = sum(device.count for device in charges.devices.values())
    one = {
        (first, stop): _on_average(charges, stages[first:stop])
        for first, stop in itertools.combinations(range(len(stages) + 1), 2)
    }
    best: Best = {(0, used): (0.0, ()) for used in range(devices + 1)}
    for _ in range(groups):
        after: Best = {}
        for (k, used), (worst, places) in best.items():
            for stop in range(k + 1, len(stages) + 1):
                for more in range(1, devices - used + 1):
                    value = max(worst, one[k, stop] / more)
                    there = after.get((stop, used + more), (math.inf, ()))
                    if value < there[0]:
                        after[stop, used + more] = value, (*places, stop)
        best = after
    whole = [found for (stop, _), found in best.items() if stop == len(stages)]
    value, places = min(whole, default=(math.inf, ()))
    if value == math.inf:
        return ()
    return tuple(stages[first:stop] for first, stop in itertools.pairwise((0, *places)))


def _on_average(charges: Charges, stages: Stages) -> float:
    """The charge of a group on a device of the fleet's mean speed; inf: it fits none."""
    able = charges.fits(stages)
    count = sum(device.count for device in charges.devices.values())
    speed = sum(charges.devices[name].count / charges.total(name, stages) for name in able)
    return count / speed if speed > 0 else math.inf


def _large(charges: Charges) -> Iterator[str]:
    """Stages that take much of the time on some device."""
    for stage in charges.stages:
        shares = [column[stage] / sum(column.values()) for column in charges.seconds.values()]
        if len(charges.stages) > 1 and max(shares) >= LARGE:
            yield stage


def _in_order(stages: Sequence[str], *roles: Stages) -> Cut:
    """Roles by their first stage."""
    return tuple(sorted(roles, key=lambda role: stages.index(role[0])))
