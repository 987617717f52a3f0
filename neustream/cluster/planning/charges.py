"""The charge table: seconds of a device that a request of a load costs at a stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from neustream.cluster.planning.placement import Device, Needs, Stages
from neustream.core.demand import Calls
from neustream.core.outlook import Asked
from neustream.core.profile import LatencyProfile
from neustream.core.rates import Rates
from neustream.errors import ConfigError

SAMPLE = 200
"""So many requests of a load are looked at."""
LEAST = 1e-9
"""Seconds: what costs nothing costs so much."""


class Charges:
    """What a load costs, on average over its requests.

    Args:
        load: requests that came within `span` seconds.
        stages: all that are to be served, in the order of their graphs.

    Attributes:
        rate: requests per second.
        chains: the stages of each model.
        seconds: of a kind of device by stage; inf: the device does not know it.
    """

    def __init__(
        self,
        load: Sequence[Asked],
        span: float,
        stages: Sequence[str],
        devices: Sequence[Device],
        needs: Needs,
    ) -> None:
        if not load or not span > 0:
            raise ConfigError("a placement needs a load: there are no requests to plan for")
        self.devices = {device.name: device for device in devices}
        self.needs = needs
        self.rate = len(load) / span
        few = [load[at] for at in np.linspace(0, len(load) - 1, min(len(load), SAMPLE), dtype=int)]
        self.stages: Stages = tuple(stages)
        self.chains = chains_of(self.stages)
        self.seconds = {device.name: self._column(few, device) for device in devices}
        self._moved = _moved(few, needs)

    def _column(self, few: Sequence[Asked], device: Device) -> dict[str, float]:
        column = dict.fromkeys(self.stages, 0.0)
        for asked in few:
            for name, seconds in charged(asked, device.rates, self.needs).items():
                column[name] += seconds / len(few)
        return {name: max(seconds, LEAST) for name, seconds in column.items()}

    def run(self, stages: Stages, first: str) -> Stages:
        """The stages that a request goes through from `first` on, where `stages` are served."""
        chain = next(chain for chain in self.chains if first in chain)
        here = chain[chain.index(first) :]
        return tuple(itertools.takewhile(stages.__contains__, here))

    def of_run(self, device: str, run: Stages) -> float:
        """Seconds of stages one after the other on a device, hand-overs included.

        State that comes in or goes out keeps both sides busy.
        """
        column = self.seconds[device]
        moved = [
            seconds
            for (before, after), seconds in self._moved.items()
            if (after == run[0]) != (before == run[-1])
        ]
        return sum([column[name] for name in run]) + sum(moved)

    def total(self, device: str, stages: Stages) -> float:
        """Seconds of a request on a device that serves `stages`."""
        seconds, left = 0.0, list(stages)
        while left:
            run = self.run(stages, left[0])
            seconds += self.of_run(device, run)
            left = [stage for stage in left if stage not in run]
        return seconds

    def fits(self, stages: Stages) -> list[str]:
        """The kinds of devices that can serve some stages."""
        rest = [stage for stage in self.stages if stage not in stages]
        if not self.needs.may_part(stages, rest):
            return []
        found = []
        for name, device in self.devices.items():
            known = all(self.seconds[name][stage] < math.inf for stage in stages)
            if device.count and known and self.needs.fits(stages, device):
                found.append(name)
        return found


def chains_of(stages: Stages) -> list[Stages]:
    """The stages of each of several models, whose names stand in front of theirs."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        found.setdefault(stage.partition(".")[0] if "." in stage else "", []).append(stage)
    return [tuple(some) for some in found.values()]


def charged(asked: Asked, rates: Rates, needs: Needs) -> dict[str, float]:
    """Seconds of a device that a request costs by stage, in the batches that its slack allows."""
    if any(name not in rates.profiles for name in asked.calls):
        known = {name: each for name, each in asked.calls.items() if name in rates.profiles}
        missing = dict.fromkeys(asked.calls.keys() - known.keys(), math.inf)
        return missing | _charged(asked, known, rates, needs)
    return _charged(asked, asked.calls, rates, needs)


def _charged(
    asked: Asked, calls: Mapping[str, Calls], rates: Rates, needs: Needs
) -> dict[str, float]:
    alone = rates.alone(calls)
    spare = asked.due_in / alone if alone > 0 else math.inf
    found = {}
    for name, call in calls.items():
        profile = rates.profiles[name]
        longest = spare * _latency(profile, call, 1)
        most = min(call.max_batch, profile.max_batch)
        if asked.tokens:
            longest = min(longest, asked.step if call.looped else asked.first_in)
            room = needs.rooms.get(name.rpartition(".")[0], math.inf)
            context = asked.tokens + call.count / 2 * call.looped
            most = max(min(most, int(min(room / max(context, 1.0), 1e9))), 1)
        found[name] = call.count * _cheapest(profile, call, most, longest)
    return found


def _cheapest(profile: LatencyProfile, call: Calls, most: int, longest: float) -> float:
    """Least seconds of a call in a batch of up to `most` that takes no longer than `longest`."""
    best = _latency(profile, call, 1)
    sizes = range(2, most + 1) if most <= 32 else np.unique(np.geomspace(2, most, 32).astype(int))
    for size in sizes:
        seconds = _latency(profile, call, int(size))
        if seconds <= longest:
            best = min(best, seconds / int(size))
    return best


def _latency(profile: LatencyProfile, call: Calls, batch: int) -> float:
    return profile.latency(batch, batch * call.size, batch * call.size * call.size)


def _moved(few: Sequence[Asked], needs: Needs) -> dict[tuple[str, str], float]:
    """Seconds of the network, by two stages that follow each other."""
    found: dict[tuple[str, str], float] = {}
    for asked in few:
        size = needs.state_bytes + asked.tokens * needs.token_bytes
        for pair in itertools.pairwise(asked.calls):
            found[pair] = found.get(pair, 0.0) + size / needs.bandwidth / len(few)
    return found
