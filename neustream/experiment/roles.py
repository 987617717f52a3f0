"""Roles: which stages the instances of each kind of a cluster serve, on what device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neustream.config.cluster import ClusterConfig, InstanceConfig
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.stage_names import named
from neustream.errors import ConfigError, nearest
from neustream.experiment.pipelines import pipeline_of
from neustream.experiment.prepared import Prepared, learning


@dataclass(frozen=True)
class Role:
    """What an instance of a kind is: its pools, and the latencies of all stages on its device.

    `load_s`: from being ordered to being there.
    """

    pools: tuple[Pool, ...]
    profiles: Mapping[str, LatencyProfile]
    load_s: float = 0.0

    @property
    def stages(self) -> frozenset[str]:
        """Those that it serves."""
        return frozenset(stage for pool in self.pools for stage in pool.stages)

    def scheduler(self, rule: Policy) -> Scheduler:
        """That of an instance, which learns from its own steps as a service does; what others serve is away."""
        here = {name: one for name, one in self.profiles.items() if name in self.stages}
        there = {name: one for name, one in self.profiles.items() if name not in self.stages}
        return Scheduler(self.pools, rule, learning(here), away=there, correct=True)


def roles_of(prepared: Prepared, config: ClusterConfig) -> dict[str, Role]:
    """The role of each kind of instances, by its name.

    Raises:
        ConfigError: a stage is unknown, or nobody serves it; texts cannot get from their prefill
            to their decode.
        ProfileError: as of loading the profiles of other devices.
    """
    profiles = profiles_of(prepared, config)
    roles = {}
    for name, kind in config.kinds.items():
        served = stages_of(prepared, name, kind)
        roles[name] = Role(pools_with(prepared.pools, served), profiles[name], load_s_of(prepared, name, kind))
    _check_all_served(prepared, config, roles)
    _check_texts(prepared, config, roles)
    return roles


def stages_of(prepared: Prepared, name: str, kind: InstanceConfig) -> frozenset[str]:
    """The stages that a kind serves; ConfigError for one that is none."""
    known = [stage for graph in prepared.graphs for stage in graph.stages]
    if kind.stages is None:
        return frozenset(known)
    found: set[str] = set()
    for given in kind.stages:
        several = [stage for stage in known if named(stage, [given])]
        if not several:
            hint = nearest(given, known)
            raise ConfigError(f"cluster.instances.{name}.stages: no stage {given!r}; {hint}")
        found.update(several)
    return frozenset(found)


def pools_with(pools: Sequence[Pool], served: frozenset[str]) -> tuple[Pool, ...]:
    """Pools with those of their stages that are served; without those that have none."""
    found = []
    for pool in pools:
        stages = tuple(stage for stage in pool.stages if stage in served)
        caches = {
            model: cache
            for model, cache in pool.kv_caches.items()
            if any(stage.startswith(f"{model}.") for stage in stages)
        }
        if stages:
            found.append(replace(pool, stages=stages, kv_caches=caches))
    return tuple(found)


def profiles_of(prepared: Prepared, config: ClusterConfig) -> dict[str, dict[str, LatencyProfile]]:
    """The profiles of each kind of instance, by stage; ProfileError as of loading them."""
    found: dict[str, dict[str, LatencyProfile]] = {}
    for role, kind in config.kinds.items():
        found[role] = dict(prepared.profiles)
        for pipeline in prepared.pipelines:
            folder = folder_of(role, kind, pipeline.prefix.removesuffix("."))
            if folder is not None:
                elsewhere = pipeline.experiment.model_copy(update={"profiles": folder})
                found[role] |= pipeline_of(elsewhere, pipeline.prefix).load_profiles()
    return found


def load_s_of(prepared: Prepared, role: str, kind: InstanceConfig) -> float:
    """Seconds until an instance is there: as the config says, else all its models, as measured with their profiles."""
    if kind.load_s is not None:
        return kind.load_s
    seconds = 0.0
    for pipeline in prepared.pipelines:
        folder = folder_of(role, kind, pipeline.prefix.removesuffix("."))
        update = {} if folder is None else {"profiles": folder}
        seconds += pipeline_of(pipeline.experiment.model_copy(update=update), pipeline.prefix).costs().load_s
    return seconds


def folder_of(role: str, kind: InstanceConfig, model: str) -> Path | None:
    """The profiles of a model on a kind's device; None: those of the config.

    Raises:
        ConfigError: one folder is given for several models, or several for one.
    """
    where = f"cluster.instances.{role}.profiles"
    if kind.profiles is None:
        return None
    if isinstance(kind.profiles, Path):
        if model:
            raise ConfigError(f"{where}: there are several models; give a folder of each by name")
        return kind.profiles
    if model not in kind.profiles:
        raise ConfigError(f"{where}: no folder of model {model!r}; {nearest(model, kind.profiles)}")
    return kind.profiles[model]


def _check_all_served(prepared: Prepared, config: ClusterConfig, roles: Mapping[str, Role]) -> None:
    """ConfigError for a stage that no instance serves, now or ever."""
    grows = bool(config.scaler)
    served: set[str] = set()
    for name, role in roles.items():
        if config.kinds[name].count or grows:
            served |= role.stages
    for graph in prepared.graphs:
        for stage in graph.stages:
            if stage not in served:
                raise ConfigError(f"cluster.instances: nobody serves stage {stage!r}")


def _check_texts(prepared: Prepared, config: ClusterConfig, roles: Mapping[str, Role]) -> None:
    """ConfigError for a prefill whose decode is elsewhere, if KV caches cannot be copied."""
    caching = {name: stage.model for graph in prepared.graphs for name, stage in graph.stages.items() if stage.caches}
    for name, role in roles.items():
        here = [stage for stage in caching if stage in role.stages]
        models = {caching[stage] for stage in here}
        whole = [stage for stage, model in caching.items() if model in models]
        if len(here) < len(whole) and not config.network.token_bytes:
            raise ConfigError(
                f"cluster.instances.{name}.stages: {', '.join(here)} without its other phase: "
                "give cluster.network.token_bytes, so that KV caches go from one to the other"
            )
