"""The section `cluster` of a config, as what serves on Ray: what of it there is, and its rules."""

from __future__ import annotations

from typing import Any

from neustream.by_name import make_rule, only_rule
from neustream.cluster.book import Settings
from neustream.cluster.rules import MOVERS, ROUTERS, SCALERS
from neustream.cluster.rules.checks import check_role
from neustream.cluster.rules.replan import Replan
from neustream.config.cluster import WHOLE, ClusterConfig, HeadConfig
from neustream.errors import ConfigError, shown

DEVICES = {"cpu": {"num_cpus": 1.0}, "cuda": {"num_gpus": 1.0}}
"""What an instance takes of Ray's machines, by its kind of device."""


def needs_of(device: str, where: str) -> dict[str, float]:
    """What an instance takes of Ray's machines; ConfigError for a device by its number.

    Args:
        where: what errors call the place that names it.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"{where} {shown(device)}: Ray says which one an instance gets; allowed: {', '.join(DEVICES)}"
        )
    return DEVICES[device]


def check(config: HeadConfig) -> None:
    """ConfigError for what cannot be served: what only simulations have, and what is no rule."""
    if config.engine is None:
        raise ConfigError("cluster.engine: none is given, so the cluster can only be simulated; allowed: ray")
    if isinstance(config, ClusterConfig):
        _check_simulated(config)
    for router in config.router:
        rules_of(config, router)
    roles = list(config.kinds) if isinstance(config, ClusterConfig) else [WHOLE]
    scaler = rules_of(config, next(iter(config.router)))["scaler"]
    if isinstance(scaler, Replan):
        raise ConfigError("cluster.scaler.plan: it is for simulated clusters; served ones have charge, fixed, freeness")
    check_role(scaler, roles)


def _check_simulated(config: ClusterConfig) -> None:
    if config.faults:
        fault = config.faults[0]
        raise ConfigError(
            f"cluster.faults: {fault.kind} at {fault.at_s:g} s: faults are simulated; "
            "to serve, leave them out (--set cluster.faults=[])"
        )
    if config.network.loss:
        raise ConfigError(f"cluster.network.loss {config.network.loss:g}: losses are simulated; to serve, it is 0")


def rules_of(config: HeadConfig, router: str) -> dict[str, Any]:
    """The rules and times of a head, as arguments of a `Cluster`; ConfigError for what is no rule."""
    return {
        "router": make_rule("router", ROUTERS, router, config.router[router], "route"),
        "mover": only_rule("mover", MOVERS, config.mover, "moves"),
        "scaler": only_rule("scaler", SCALERS, config.scaler, "target"),
        "settings": Settings(**config.failure.model_dump(exclude_none=True)),
    }


def instances_of(count: int, scaler: Any, role: str = WHOLE) -> tuple[int, int]:
    """How many instances of a role there are at first, and at most."""
    if scaler is None or getattr(scaler, "role", role) != role:
        return count, count
    return count, max(count, getattr(scaler, "max", getattr(scaler, "count", count)))
