"""What could have been served: a real schedule, found by search with the whole trace known.

The counterpart of the bound from below: policy <= hindsight <= bound. It is a local search over the
requests that are let in at all. What is left out is never seen; a policy schedules the rest, in the
same simulator as everything else, so that whatever is found is a schedule that the device could run.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from neustream.core.events import Ended
from neustream.core.policies import POLICIES, Priced
from neustream.core.policy import Policy
from neustream.core.types import Request
from neustream.engine.clock import stopwatch
from neustream.engine.events import Record
from neustream.errors import ConfigError
from neustream.experiment.prepared import Prepared
from neustream.experiment.running import simulate

STARTS = ("fcfs", "edf", "least_laxity", "slack_ranked", "neustream", "priced")
"""Policies (besides those that are asked for) whose schedules the search starts from."""
VARIANTS = (Priced(price=0.0), Priced(price=0.0, gain=0.03), Priced(gain=0.03), Priced(gain=0.3))


@dataclass(frozen=True, slots=True)
class Hindsight:
    """`value`: weight on time, of the requests `served`; found in `seconds`, simulating `tried` schedules."""

    value: float
    served: frozenset[str]
    tried: int
    seconds: float


def hindsight(
    prepared: Prepared, time_limit_s: float = 60.0, *, policies: Collection[str] = STARTS, seed: int = 0
) -> Hindsight:
    """The best schedule found in about `time_limit_s` (a simulation under way is finished).

    It starts from the schedules of `policies` and of some variants of `priced`, so that it is never
    below any of them. Then the trace is cut into stretches of twice the mean SLO; in every other one
    with requests that were lost, a request is left out or let in again at random, and all of these
    changes are tried in one simulation. Those that lost nothing in their neighbourhood are kept, if a
    second simulation confirms that together they lose nothing.

    Raises:
        ConfigError: for a simulation with noise, where the same schedule would not happen twice.
    """
    if any(experiment.simulation.latency_noise for experiment in prepared.experiments):
        raise ConfigError("hindsight needs a simulation without latency_noise: its schedules could not be repeated")
    return _Search(prepared, seed).run(time_limit_s, [*policies, *VARIANTS])


def served_by(prepared: Prepared, policy: str | Policy) -> frozenset[str]:
    """Ids of the requests that are on time under `policy`."""
    on_time: list[str] = []

    def watch(record: Record) -> None:
        if isinstance(record, Ended) and record.on_time:
            on_time.append(record.id)

    simulate(prepared, policy, [watch])
    return frozenset(on_time)


class _Search:
    def __init__(self, prepared: Prepared, seed: int) -> None:
        self.prepared = prepared
        self.requests = list(prepared.requests)
        self.draw = random.Random(seed)
        self.tried = 0
        budgets = [request.slo.total for request in self.requests if request.slo.total < 1e9]
        self.stretch = 2 * sum(budgets) / len(budgets) if budgets else 1.0
        self.near: dict[int, list[Request]] = {}
        for request in self.requests:
            self.near.setdefault(self._place(request), []).append(request)

    def _place(self, request: Request) -> int:
        return int(request.arrival / self.stretch)

    def run(self, limit: float, starts: Sequence[str | Policy]) -> Hindsight:
        began = stopwatch()
        everyone = frozenset(request.id for request in self.requests)
        best: frozenset[str] = frozenset()
        rule: str | Policy = VARIANTS[0]
        found: list[tuple[float, int, str | Policy, frozenset[str]]] = []
        for start in starts:
            served = self._served(start, everyone)
            found.append((self._weight(served), len(found), start, served))
            if stopwatch() - began > limit:
                break
        _, _, rule, best = max(found, key=lambda entry: entry[:2])
        if isinstance(rule, str) and POLICIES[rule] is not Priced:
            rule = VARIANTS[0]
        allowed, kept = everyone, self._served(rule, everyone)
        while stopwatch() - began < limit and len(best) < len(everyone):
            tried = self._changed(allowed, kept)
            if (changed := self._served(rule, tried)) == kept and tried == allowed:
                break  # nothing is left to change
            tried = self._without_losses(allowed, tried, kept, changed)
            served = self._served(rule, tried)
            if self._weight(served) >= self._weight(kept):
                allowed, kept = tried, served
            if self._weight(kept) > self._weight(best):
                best = kept
        return Hindsight(self._weight(best), best, self.tried, stopwatch() - began)

    def _served(self, policy: str | Policy, allowed: frozenset[str]) -> frozenset[str]:
        """Who is on time if only the requests in `allowed` come."""
        self.tried += 1
        some = [request for request in self.requests if request.id in allowed]
        return served_by(replace(self.prepared, requests=some), policy)

    def _weight(self, served: Collection[str]) -> float:
        return sum(request.slo.weight for request in self.requests if request.id in served)

    def _changed(self, allowed: frozenset[str], served: frozenset[str]) -> frozenset[str]:
        """One request left out or let in again, in every other stretch near which some were lost."""
        changed = set(allowed)
        parity = self.draw.randrange(2)
        for place, some in self.near.items():
            if place % 2 != parity or all(request.id in served for request in [*some, *self.near.get(place + 1, [])]):
                continue
            out = [request.id for request in some if request.id not in allowed]
            if out and self.draw.random() < 0.3:
                changed.add(self.draw.choice(out))
                continue
            seated = [request.id for request in some if request.id in served]
            if seated:
                changed.discard(self.draw.choice(seated))
        return frozenset(changed)

    def _without_losses(
        self, allowed: frozenset[str], tried: frozenset[str], before: frozenset[str], after: frozenset[str]
    ) -> frozenset[str]:
        """`tried`, but as it was in `allowed` in those stretches around which weight was lost."""
        gain: dict[int, float] = dict.fromkeys(self.near, 0.0)
        for request in self.requests:
            gain[self._place(request)] += request.slo.weight * ((request.id in after) - (request.id in before))
        kept = set(tried)
        for place, some in self.near.items():
            if gain[place] + gain.get(place + 1, 0.0) < 0:
                kept = kept.difference(r.id for r in some) | {r.id for r in some if r.id in allowed}
        return frozenset(kept)
