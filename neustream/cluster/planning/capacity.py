"""Requests per second that a placement can carry, and how many devices each role gets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from neustream.cluster.planning.charges import Charges
from neustream.cluster.planning.placement import Placement, Stages, Where
from neustream.cluster.planning.simplex import solve

FEW = 1000
"""So many ways to give devices to roles are all looked at."""


def capacity(charges: Charges, placement: Placement) -> float:
    """The most requests per second, if they are spread over devices as well as can be."""
    kinds = placement.as_counts()
    return _spread(charges, list(kinds), [[at] for at in range(len(kinds))], list(kinds.values()))[
        0
    ]


def _spread(
    charges: Charges, kinds: Sequence[Where], shared: Sequence[Sequence[int]], room: Sequence[int]
) -> tuple[float, list[float]]:
    """The rate, and the devices that each of `kinds` uses.

    `shared`: kinds that draw on the same devices, `room` so many. A linear program: a request that
    comes to a device goes through all stages that follow each other there, and then to another;
    what comes to a stage has to be taken, and devices have so much time.
    """
    ways = [
        (at, charges.run(stages, first), device)
        for at, (device, stages) in enumerate(kinds)
        for first in stages
    ]
    rows = np.zeros((len(charges.stages) + len(shared), 1 + len(ways)))
    place = {name: row for row, name in enumerate(charges.stages)}
    pool = {at: len(charges.stages) + row for row, some in enumerate(shared) for at in some}
    after = {
        stage: chain[at + 1] for chain in charges.chains for at, stage in enumerate(chain[:-1])
    }
    for chain in charges.chains:
        rows[place[chain[0]], 0] = 1.0
    for column, (at, run, device) in enumerate(ways, start=1):
        rows[place[run[0]], column] -= 1.0
        if run[-1] in after:
            rows[place[after[run[-1]]], column] += 1.0
        rows[pool[at], column] = charges.of_run(device, run)
    worth = np.zeros(1 + len(ways))
    worth[0] = 1.0
    right = np.array([0.0] * len(charges.stages) + [float(count) for count in room])
    found = solve(worth, rows, right).tolist()
    used = [0.0] * len(kinds)
    for (at, run, device), rate in zip(ways, found[1:], strict=True):
        used[at] += rate * charges.of_run(device, run)
    return found[0], used


def replicas(charges: Charges, roles: Sequence[Stages]) -> Placement | None:
    """The devices of each role, so that the least capacity of a role is as large as can be.

    Of few ways the best. Else the linear program's numbers rounded down, what is left one by one to
    the role with the least; then devices change roles for as long as that helps. None if a role can
    be on no device, or there are fewer devices than roles.
    """
    able = {stages: charges.fits(stages) for stages in roles}
    devices = charges.devices
    if not all(able.values()) or sum(one.count for one in devices.values()) < len(roles):
        return None
    if _ways(charges, len(roles)) <= FEW:
        every = placements(charges, roles)
        return max(every, key=lambda one: _least(charges, roles, one.as_counts()), default=None)
    kinds = [(device, stages) for stages in roles for device in able[stages]]
    counts = _rounded(charges, kinds)
    _give_rest(charges, roles, counts)
    _exchanged(charges, roles, counts)
    placement = Placement.of(counts)
    return placement if placement.stages >= set(charges.stages) else None


def _rounded(charges: Charges, kinds: Sequence[Where]) -> dict[Where, int]:
    """The linear program's numbers of devices of each kind, rounded down."""
    names = sorted({device for device, _ in kinds})
    shared = [[at for at, kind in enumerate(kinds) if kind[0] == name] for name in names]
    _, used = _spread(charges, kinds, shared, [charges.devices[name].count for name in names])
    return {kind: int(each + 1e-6) for kind, each in zip(kinds, used, strict=True)}


def _give_rest(charges: Charges, roles: Sequence[Stages], counts: dict[Where, int]) -> None:
    """Give each device that is left to the role that needs it most."""
    for name in sorted({device for device, _ in counts}):
        options = [kind for kind in counts if kind[0] == name]
        free = charges.devices[name].count - sum(counts[kind] for kind in options)
        for _ in range(free):
            best = max(options, key=lambda kind: _least(charges, roles, counts, (kind, 1)))
            counts[best] += 1


def _ways(charges: Charges, roles: int) -> int:
    """How many ways there are to give the devices to so many roles."""
    each = [math.comb(one.count + roles - 1, roles - 1) for one in charges.devices.values()]
    return math.prod(each)


def _least(
    charges: Charges,
    roles: Sequence[Stages],
    counts: Mapping[Where, int],
    *changes: tuple[Where, int],
) -> tuple[float, ...]:
    """The capacities of the roles, rising, after some changes."""
    after = dict(counts)
    for kind, more in changes:
        after[kind] += more
    found = dict.fromkeys(roles, 0.0)
    for (device, stages), count in after.items():
        found[stages] += count / charges.total(device, stages)
    return tuple(sorted(found.values()))


def _exchanged(charges: Charges, roles: Sequence[Stages], counts: dict[Where, int]) -> None:
    """Let devices change roles, one or two at once, while the least capacity gets larger."""
    best = _least(charges, roles, counts)
    while True:
        better = max(
            _exchanges(counts),
            key=lambda changes: _least(charges, roles, counts, *changes),
            default=None,
        )
        if better is None or _least(charges, roles, counts, *better) <= best:
            return
        for kind, more in better:
            counts[kind] += more
        best = _least(charges, roles, counts)


def _exchanges(counts: Mapping[Where, int]) -> list[tuple[tuple[Where, int], ...]]:
    """Every change of one device to another role, and of two devices of different kinds."""
    single = []
    for one, count in counts.items():
        others = [kind for kind in counts if kind[0] == one[0] and kind != one]
        single += [((one, -1), (other, 1)) for other in others if count]
    double = []
    for first in single:
        later = [second for second in single if first[0][0][0] < second[0][0][0]]
        double += [(*first, *second) for second in later]
    return [*single, *double]


def placements(charges: Charges, roles: Sequence[Stages]) -> list[Placement]:
    """All placements whose devices each serve one of `roles`, that serve all stages."""
    partial: list[dict[Where, int]] = [{}]
    for name, device in charges.devices.items():
        able = [role for role in roles if name in charges.fits(role)]
        options = list(_shares(device.count, len(able)))
        partial = [
            {**counts, **{(name, role): n for role, n in zip(able, option, strict=True)}}
            for counts in partial
            for option in options
        ]
    found = [Placement.of(counts) for counts in partial]
    return [one for one in found if one.stages >= set(charges.stages)]


def _shares(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to give `count` devices to `parts` roles."""
    if parts <= 1:
        yield (count,) * parts  # who can serve nothing is idle
        return
    for first in range(count + 1):
        for rest in _shares(count - first, parts - 1):
            yield (first, *rest)
