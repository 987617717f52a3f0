"""Rules for clusters: routers, movers and scalers, small frozen dataclasses, one a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neustream.cluster.rules.charge import Charge
from neustream.cluster.rules.consolidate import Consolidate
from neustream.cluster.rules.fixed import Fixed
from neustream.cluster.rules.freeness import Freeness, FreenessMover, FreenessScaler
from neustream.cluster.rules.headroom import Headroom
from neustream.cluster.rules.least_requests import LeastRequests
from neustream.cluster.rules.least_work import LeastWork
from neustream.cluster.rules.none import Stay
from neustream.cluster.rules.prefix import Prefix
from neustream.cluster.rules.random import Random
from neustream.cluster.rules.replan import Replan
from neustream.cluster.rules.rescue import Rescue
from neustream.cluster.rules.round_robin import RoundRobin
from neustream.cluster.rules.slack import Slack
from neustream.cluster.rules.tiered import Tiered
from neustream.cluster.rules.two_choices import TwoChoices

Rules = Mapping[str, Callable[..., Any]]

ROUTERS: Rules = {
    "slack": Slack,
    "round_robin": RoundRobin,
    "random": Random,
    "two_choices": TwoChoices,
    "least_requests": LeastRequests,
    "least_work": LeastWork,
    "freeness": Freeness,
    "headroom": Headroom,
    "tiered": Tiered,
    "prefix": Prefix,
}
MOVERS: Rules = {
    "none": Stay,
    "freeness": FreenessMover,
    "rescue": Rescue,
    "consolidate": Consolidate,
}
SCALERS: Rules = {
    "fixed": Fixed,
    "freeness": FreenessScaler,
    "charge": Charge,
    "plan": Replan,
}
