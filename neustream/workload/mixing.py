"""What is put on requests: when they come, what they are promised, which of them are worth more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neustream.errors import ConfigError, nearest
from neustream.workload.asks import NO_LIMITS, Ask, Limits


@dataclass(frozen=True)
class AskClass:
    """A class of requests: its share of all, what they are promised, what they ask beside (`priority`)."""

    name: str
    share: float = 1.0
    limits: Limits = NO_LIMITS
    params: Mapping[str, Any] = field(default_factory=dict)


def with_arrivals(asks: Sequence[Ask], arrivals: Sequence[float]) -> list[Ask]:
    """Each request at its instant, in order; seconds."""
    return [dataclasses.replace(ask, arrival_s=float(at)) for ask, at in zip(asks, arrivals, strict=True)]


def without_arrivals(asks: Sequence[Ask]) -> list[Ask]:
    """The same without the instants that a trace has."""
    return [dataclasses.replace(ask, arrival_s=None) for ask in asks]


def with_models(
    asks: Sequence[Ask], models: Sequence[str], in_turns: bool, seed: int, shares: Sequence[float] = ()
) -> list[Ask]:
    """Each asks for one of these models, in turns or drawn; all turns of a session for the same.

    shares: of the models in what is drawn; none: all alike.
    """
    if not models:
        return list(asks)
    rng = np.random.default_rng([seed, 6])
    if shares:
        drawn = rng.choice(len(models), len(asks), p=np.array(shares) / sum(shares))
    else:
        drawn = rng.integers(0, len(models), len(asks))
    of_session: dict[str, str] = {}
    found = []
    for at, ask in enumerate(asks):
        model = models[at % len(models)] if in_turns else models[int(drawn[at])]
        if ask.session:
            model = of_session.setdefault(ask.session, model)
        found.append(dataclasses.replace(ask, model=model))
    return found


def with_limits(asks: Sequence[Ask], limits: Limits) -> list[Ask]:
    """All promised the same, but for those who have a promise already."""
    return [ask if ask.limits.promises else dataclasses.replace(ask, limits=limits) for ask in asks]


def with_classes(asks: Sequence[Ask], classes: Sequence[AskClass], seed: int) -> list[Ask]:
    """Each of a class: the one that it names, else one drawn by share (all turns of a session alike).

    Raises:
        ConfigError: a request names a class that is none of these.
    """
    if not classes:
        return list(asks)
    named = {each.name: each for each in classes}
    shares = np.array([each.share for each in classes], np.float64)
    drawn = np.random.default_rng([seed, 3]).choice(len(classes), len(asks), p=shares / shares.sum())
    of_session: dict[str, AskClass] = {}
    found = []
    for ask, at in zip(asks, drawn, strict=True):
        if ask.slo_class and ask.slo_class not in named:
            hint = nearest(ask.slo_class, named)
            raise ConfigError(f"request {ask.id}: slo_class {ask.slo_class!r} is none of the classes; {hint}")
        chosen = named[ask.slo_class] if ask.slo_class else of_session.get(ask.session, classes[int(at)])
        if ask.session:
            of_session.setdefault(ask.session, chosen)
        limits = ask.limits if ask.limits.promises else chosen.limits
        params = {**chosen.params, **ask.params}
        found.append(dataclasses.replace(ask, slo_class=chosen.name, limits=limits, params=params))
    return found
