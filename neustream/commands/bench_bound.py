"""The most of a plan's requests that any scheduler could serve on time, by an experiment's profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from neustream.bench.plan import Plan
from neustream.commands.printing import notes
from neustream.commands.reach import naming
from neustream.core.types import SLO, Request
from neustream.errors import ConfigError
from neustream.experiment.prepared import Prepared
from neustream.workload.asks import Ask


def checked(plan: Plan, config: Path | None) -> Path:
    """The config; ConfigError if such a plan has no bound."""
    if config is None:
        raise ConfigError("--bound: needs --config, an experiment whose profiles say what steps take")
    if not plan.scheduled:
        raise ConfigError("--bound: needs arrivals (--request-rate, or a trace); without, there is no bound")
    if any(ask.follows for ask in plan.asks):
        raise ConfigError("--bound: turns of conversations come when others have ended, so that there is no bound")
    if not any(ask.limits.promises for ask in plan.asks):
        raise ConfigError("--bound: needs --goodput or --slo-class: what is on time must be said")
    return config


def bound_in(prepared: Prepared, requests: Sequence[Request], plan: Plan, config: Path) -> Mapping[str, Any]:
    """Of the plan's requests that are promised something, each of which counts as one.

    requests: those of `prepared`, in the order of the plan's asks.

    Raises:
        ConfigError: there is no bound for such an experiment.
    """
    from neustream.analysis.headroom import bound_of

    pairs = zip(requests, plan.asks, strict=True)
    asked = [replace(request, slo=_least(ask)) for request, ask in pairs if ask.limits.promises]
    ordered = sorted(asked, key=attrgetter("arrival"))
    with notes.status("computing the bound"), naming(config):
        found = bound_of(replace(prepared, requests=ordered))
    return {name: getattr(found, name) for name in ("value", "proven", "method", "seconds")}


def _least(ask: Ask) -> SLO:
    """What keeps every promise of a request needs at least: its first token, and its end, in time.

    A text whose mean time of a further token is promised has until the last of these.
    """
    limits = ask.limits
    tokens = ask.ends_after or ask.output_tokens or 1
    paced = limits.ttft_s + (tokens - 1) * limits.tpot_s if tokens > 1 else math.inf
    if ask.image is not None:
        return SLO(total=limits.e2e_s)
    return SLO(total=min(limits.e2e_s, paced), first=limits.ttft_s)
