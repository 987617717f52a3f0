"""Which language models a device is for, where it is not enough for all that come.

A decode takes nearly as long for one generation as for fifty. So each model that generates at a
pace keeps the device from all others for about one decode in each step of that pace, however few it
serves: two that need more than all of it between them serve hardly anybody, where each alone would
serve all of its own. No price of single requests shows that: it is the first one that costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

import numpy as np

from neustream.core.demand import Calls, Demand
from neustream.core.lengths import Lengths
from neustream.core.policies.price import recent_costs
from neustream.core.policy import View
from neustream.core.steps import PhaseProfile, Step

ENOUGH = 10
"""Recent requests from which on it is known what comes."""
LOST = 0.15
"""Share of the weight of recent requests that is lost where the device is for some alone."""
NEARLY = 0.05
"""Share of that weight by which a choice may promise less than what is reached: a choice that holds
reaches what it promises, no more."""
MOST = 5
"""Language models in one pool up to which there is a choice: all sets of them are compared."""
LONGER = 0.05
"""Share of the span of the recent requests after which it is found anew what they need."""
NO_CALLS = Calls(0, False, 1)


@dataclass(frozen=True, slots=True)
class _Choices:
    """What recent requests would bring, by whom the device is for.

    Attributes:
        since: when those are counted from.
        models: the language models that were asked for.
        weight: of all recent requests; values: of those in time, by the models served beside images
            and other stages.
    """

    since: float
    models: frozenset[str]
    weight: float
    values: Mapping[frozenset[str], float]


def not_for(view: View, kinds: Mapping[str, View]) -> frozenset[str]:
    """The language models that the device is not for; none as long as little is lost.

    Of all sets of models that fit on the device, by what they need of each second at the pace that
    they promise, and of the images that fit in what is left, the one that brings the most weight by
    the second. What was begun and is given up counts against a set. It is chosen if that is more
    than is reached: by the weight of those that were lost lately. Those that wait for models which
    it leaves out are not served either.

    Args:
        kinds: the view of each kind's jobs, by model.
    """
    recent = view.recent
    if len(recent) < ENOUGH or not view.missed or not _several(view):
        return frozenset()
    if view.missed[-1].at <= recent[0].at:
        return frozenset()
    choices = _choices(view)
    if choices is None:
        return frozenset()
    weight = choices.weight
    lost = sum([missed.weight for missed in view.missed if missed.at > choices.since])
    if lost < LOST * weight:
        return frozenset()
    started = {label: _weight(part, True) for label, part in kinds.items() if label}
    waiting = {label: _weight(part, False) for label, part in kinds.items() if label}

    def value(models: frozenset[str]) -> tuple[float, list[str]]:
        given_up = sum([started[label] for label in started if label not in models])
        return choices.values[models] - given_up, sorted(models)

    best = max(choices.values, key=value)
    out = choices.models - best
    refused = sum([waiting.get(label, 0.0) for label in out])
    reached = weight - lost - refused
    return out if value(best)[0] > reached - NEARLY * weight else frozenset()


def _weight(view: View, started: bool) -> float:
    """That of jobs that have begun and are not late, or of those that have not begun."""
    return sum([job.weight for job in view.jobs if job.begun is started and not job.late])


def _several(view: View) -> bool:
    """Whether a pool serves the whole of a language model, and something else."""
    known: tuple[tuple[str, ...], bool] | None = view.memo.get(_several)
    if known is None or known[0] != view.pool.stages:
        kinds = {_model_at(view, stage) for stage in view.pool.stages}
        models = [label for label in kinds if label]
        phases = [f"{label}.{phase}" for label in models for phase in ("prefill", "decode")]
        whole = set(phases) <= set(view.pool.stages)
        known = view.memo[_several] = view.pool.stages, whole and 1 < len(kinds) <= MOST + 1
    return known[1]


def _model_at(view: View, stage: str) -> str:
    """The language model that a stage is of; "" of other stages."""
    return stage.rpartition(".")[0] if isinstance(view.profiles[stage], PhaseProfile) else ""


def _choices(view: View) -> _Choices | None:
    """`view.memo` keeps them until the next request comes; None where nothing can be told."""
    known: tuple[object, float, _Choices | None] | None = view.memo.get(_Choices)
    if known is None or known[0] is not view.recent or view.now > known[1]:
        found = _compared(view)
        span = view.now - (view.recent[0].at if found is None else found.since)
        known = view.memo[_Choices] = view.recent, view.now + LONGER * span, found
    return known[2]


def _compared(view: View) -> _Choices | None:
    """What requests would bring that came lately: for as long as a generation keeps the device.

    None where these are few, or one asks for several models.
    """
    asked = _by_model(view, view.recent[1:])
    if asked is None:
        return None
    models = [_Model(view, label, some) for label, some in asked.items() if label]
    since = max(view.recent[0].at, view.now - max([model.lasts for model in models], default=0.0))
    recent = [demand for demand in view.recent[1:] if demand.at > since]
    if len(recent) + 1 < ENOUGH:
        return None
    span = (view.now - since) * view.pool.workers
    asked = _by_model(view, recent) or {}
    images = _Images(view, asked.pop("", []), span)
    shares = {model.label: model.share(len(asked.get(model.label, ())) / span) for model in models}
    values: dict[frozenset[str], float] = {}
    for some in _sets(sorted(asked)):
        share = sum([shares[label] for label in some])
        weight = sum([demand.weight for label in some for demand in asked[label]])
        if share <= 1:
            values[some] = weight + images.beside(share)
        elif len(some) == 1:
            values[some] = weight / share
    return _Choices(since, frozenset(asked), sum([demand.weight for demand in recent]), values)


def _by_model(view: View, some: Sequence[Demand]) -> dict[str, list[Demand]] | None:
    """Requests by the language model that they ask this pool for; None if one asks for several."""
    asked: dict[str, list[Demand]] = {}
    for demand in some:
        labels = {_model_at(view, stage) for stage in demand.calls if stage in view.pool.stages}
        if len(labels) > 1:
            return None
        for label in labels:
            asked.setdefault(label, []).append(demand)
    return asked


def _sets(labels: Sequence[str]) -> Iterator[frozenset[str]]:
    for count in range(len(labels) + 1):
        yield from map(frozenset, combinations(labels, count))


class _Images:
    """Requests to stages of no language model, that came within `span` seconds of one worker."""

    def __init__(self, view: View, some: Iterable[Demand], span: float) -> None:
        costs = recent_costs(view)
        known = [(demand, costs[demand]) for demand in some if demand in costs]
        self._needs = [
            (0.0 if demand.budget == math.inf else cost.alone / demand.budget, demand.weight)
            for demand, cost in known
        ]
        self._share = sum([cost.charge for _, cost in known]) / span

    def beside(self, share: float) -> float:
        """The weight of those in time where others take a `share` of each second.

        That leaves the rest of it for the steps of one, and for the charges of all.
        """
        in_time = sum([weight for need, weight in self._needs if need <= 1 - share])
        return in_time * min(1.0, (1 - share) / self._share) if self._share else in_time


def _calls(demand: Demand, stage: str) -> Calls:
    """Of a stage: a text of one output has no decode."""
    return demand.calls.get(stage, NO_CALLS)


class _Model:
    """What a language model needs, by the latest requests to it.

    Attributes:
        lasts: seconds for which a generation keeps the device from others, if all slack is used.
    """

    def __init__(self, view: View, label: str, some: Sequence[Demand]) -> None:
        prefill, decode = f"{label}.prefill", f"{label}.decode"
        profile = view.profiles[decode]
        assert isinstance(profile, PhaseProfile)
        self.label = label
        self._steps = profile.steps
        self._speeds = view.speed.get(prefill, 1.0), view.speed.get(decode, 1.0)
        most = fmean([_calls(demand, decode).count for demand in some])
        lengths = view.lengths.get(label) or Lengths()
        self._outputs = float(lengths.joined(np.array([most]), most)[0][0]) if most else 0.0
        self._prompt = fmean([_calls(demand, prefill).size for demand in some])
        # those that are promised their end alone have the pace that comes to it
        paces = [min(one.step, one.budget / max(self._outputs, 1.0)) for one in some]
        self._pace = median(paces)
        self.lasts = self._pace * self._outputs if self._pace < math.inf else 0.0

    def share(self, rate: float) -> float:
        """The share of a worker that it needs for so many requests a second: a decode of all in
        each step of their pace, and the prompts."""
        prefill, decode = self._speeds
        prompt, outputs = self._prompt, self._outputs
        share = rate * prefill * self._steps.seconds(Step(1, prompt, prompt * prompt))
        if self._pace == math.inf:
            return share
        there = rate * outputs * self._pace  # by Little's law
        batch = max(round(there), 1)
        step = Step(decodes=batch, context=batch * (prompt + outputs / 2))
        together = decode * self._steps.seconds(step)
        return share + min(there, 1.0) * together / self._pace
