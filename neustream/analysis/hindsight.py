"""What could have been served: a real schedule, found by search with the whole trace known.

The counterpart of the bound from below: policy <= hindsight <= bound. It is a local search over the
requests that are let in at all. What is left out is never seen; a policy schedules the rest, in the
same simulator as everything else, so that whatever is found is a schedule that the device could run.
Of a language model's requests the policy is told how long they get: as their `max_tokens`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from neustream.core.events import Ended
from neustream.core.policies import POLICIES, Priced
from neustream.core.policy import Policy
from neustream.core.types import Request
from neustream.engine.clock import stopwatch
from neustream.engine.events import Record
from neustream.errors import ConfigError
from neustream.experiment.pipelines import LlmPipeline
from neustream.experiment.prepared import Prepared
from neustream.experiment.running import simulate

STARTS = ("fcfs", "edf", "least_laxity", "slack_ranked", "neustream", "priced")
"""Policies (besides those that are asked for) whose schedules the search starts from."""
TEXT_STARTS = ("fcfs", "edf", "sarathi", "neustream_llm", "priced")
"""The same for language models."""
MIXED_STARTS = ("fcfs", "edf", "priced")
"""The same where both share a device."""
VARIANTS = (Priced(price=0.0), Priced(price=0.0, gain=0.03), Priced(gain=0.03), Priced(gain=0.3))


@dataclass(frozen=True, slots=True)
class Hindsight:
    """`value`: weight on time, of the requests `served`; found in `seconds`, simulating `tried` schedules."""

    value: float
    served: frozenset[str]
    tried: int
    seconds: float


def hindsight(
    prepared: Prepared,
    time_limit_s: float = 60.0,
    *,
    policies: Collection[str] | None = None,
    seed: int = 0,
) -> Hindsight:
    """The best schedule found in about `time_limit_s` (a simulation under way is finished).

    It starts from the schedules of `policies` (`starts_of` if None) and, for pipelines, of some
    variants of `priced`, so that it is never below any of them that the time suffices for. It
    ends early only where nothing is left to change. Then the trace is cut into
    stretches of twice the mean SLO; in every other one with requests that were lost, a request is
    left out or let in again at random, and all of these changes are tried in one simulation. Those
    that lost nothing in their neighbourhood are kept, if a second simulation confirms that together
    they lose nothing.

    Raises:
        ConfigError: for a simulation with noise, where the same schedule would not happen twice.
    """
    if any(experiment.simulation.latency_noise for experiment in prepared.experiments):
        raise ConfigError("hindsight needs a simulation without latency_noise: its schedules could not be repeated")
    names = starts_of(prepared) if policies is None else policies
    variants = () if prepared.lengths else VARIANTS
    return _Search(prepared, seed).run(time_limit_s, [*names, *variants])


def starts_of(prepared: Prepared) -> tuple[str, ...]:
    """The policies whose schedules the search starts from by itself."""
    kinds = {isinstance(pipeline, LlmPipeline) for pipeline in prepared.pipelines}
    if len(kinds) > 1:
        return MIXED_STARTS
    return TEXT_STARTS if kinds == {True} else STARTS


def served_by(prepared: Prepared, policy: str | Policy) -> frozenset[str]:
    """Ids of the requests that are on time under `policy`."""
    on_time: list[str] = []

    def watch(record: Record) -> None:
        if isinstance(record, Ended) and record.on_time:
            on_time.append(record.id)

    simulate(prepared, policy, [watch])
    return frozenset(on_time)


@dataclass(frozen=True, slots=True)
class _Start:
    """A rule, and whether it is told the lengths of texts."""

    rule: str | Policy
    told: bool


class _Search:
    def __init__(self, prepared: Prepared, seed: int) -> None:
        self.prepared = prepared
        self.requests = list(prepared.requests)
        self.told = [_told(request, prepared.lengths) for request in self.requests]
        self.draw = random.Random(seed)
        self.tried = 0
        lives = [life for r in self.requests if (life := _life(r, prepared.lengths)) < 1e9]
        self.stretch = 2 * sum(lives) / len(lives) if lives else 1.0
        self.near: dict[int, list[Request]] = {}
        for request in self.requests:
            self.near.setdefault(self._place(request), []).append(request)

    def _place(self, request: Request) -> int:
        return int(request.arrival / self.stretch)

    def run(self, limit: float, rules: Sequence[str | Policy]) -> Hindsight:
        began = stopwatch()
        ends_at = began + limit
        everyone = frozenset(request.id for request in self.requests)
        start, best = self._best_start(rules, everyone, ends_at)
        start = self._searched(start)
        allowed, kept = everyone, self._served(start, everyone)
        while stopwatch() < ends_at and len(best) < len(everyone):
            tried = self._changed(allowed, kept)
            if tried == allowed:  # the stretches that were drawn have nothing to change
                if not self._changeable(allowed, kept):
                    break
                continue
            changed = self._served(start, tried)
            tried = self._without_losses(allowed, tried, kept, changed)
            served = self._served(start, tried)
            if self._weight(served) >= self._weight(kept):
                allowed, kept = tried, served
            if self._weight(kept) > self._weight(best):
                best = kept
        return Hindsight(self._weight(best), best, self.tried, stopwatch() - began)

    def _best_start(
        self, rules: Sequence[str | Policy], everyone: frozenset[str], ends_at: float
    ) -> tuple[_Start, frozenset[str]]:
        """The best rule, of those that the time suffices for, and whom it serves on time."""
        starts = [_Start(rule, False) for rule in rules]
        if self.prepared.lengths:
            starts += [_Start(rule, True) for rule in rules]
        found: list[tuple[float, int, _Start, frozenset[str]]] = []
        for start in starts:
            served = self._served(start, everyone)
            found.append((self._weight(served), len(found), start, served))
            if stopwatch() > ends_at:
                break
        _, _, best, served = max(found, key=lambda entry: entry[:2])
        return best, served

    def _searched(self, best: _Start) -> _Start:
        """The rule that schedules what is let in: the best, for pipelines one of `priced`."""
        if self.prepared.lengths:
            return best
        named = isinstance(best.rule, str) and POLICIES[best.rule] is not Priced
        return _Start(VARIANTS[0], False) if named else best

    def _served(self, start: _Start, allowed: frozenset[str]) -> frozenset[str]:
        """Who is on time if only the requests in `allowed` come."""
        self.tried += 1
        every = self.told if start.told else self.requests
        some = [request for request in every if request.id in allowed]
        return served_by(replace(self.prepared, requests=some), start.rule)

    def _weight(self, served: Collection[str]) -> float:
        return sum(request.slo.weight for request in self.requests if request.id in served)

    def _changed(self, allowed: frozenset[str], served: frozenset[str]) -> frozenset[str]:
        """One request left out or let in again, in every other stretch near which some were lost."""
        changed = set(allowed)
        parity = self.draw.randrange(2)
        for place, some in self.near.items():
            if place % 2 != parity or not self._lost_near(place, served):
                continue
            out = [request.id for request in some if request.id not in allowed]
            if out and self.draw.random() < 0.3:
                changed.add(self.draw.choice(out))
                continue
            seated = [request.id for request in some if request.id in served]
            if seated:
                changed.discard(self.draw.choice(seated))
        return frozenset(changed)

    def _lost_near(self, place: int, served: frozenset[str]) -> bool:
        """Whether a request of a stretch, or of the one behind it, was lost."""
        near = [*self.near[place], *self.near.get(place + 1, [])]
        return any(request.id not in served for request in near)

    def _changeable(self, allowed: frozenset[str], served: frozenset[str]) -> bool:
        """Whether some stretch near which some were lost has a request to leave out or to let in again."""
        return any(
            request.id in served or request.id not in allowed
            for place, some in self.near.items()
            if self._lost_near(place, served)
            for request in some
        )

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


def _told(request: Request, lengths: Mapping[str, int]) -> Request:
    """A text's request that allows no more than the outputs that it gets; promises stay."""
    if request.id not in lengths:
        return request
    return replace(request, params={**request.params, "max_tokens": lengths[request.id]})


def _life(request: Request, lengths: Mapping[str, int]) -> float:
    """Seconds from its arrival to its last deadline; inf if it has none."""
    slo = request.slo
    paced = slo.step * (lengths.get(request.id, 1) - 1) if slo.step < math.inf else 0.0
    return min(slo.total, slo.first + paced)
