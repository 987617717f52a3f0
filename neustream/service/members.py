"""The devices of a service, and what serves on each: a member with an instance of each model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from neustream.core.graph import Stage
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.stage_names import named
from neustream.engine.executor import Executor, ThreadExecutor
from neustream.engine.member import Member
from neustream.engine.tooling import executors_of, pools_of, profiles_of
from neustream.errors import BackendError, NeustreamError
from neustream.service.agents import AgentMount
from neustream.service.hosting import POOL, parted
from neustream.service.mount import Device, Host, Instance, Mount


def device_at(place: str, undo: contextlib.ExitStack, name: str = "", stages: Sequence[str] | None = None) -> Device:
    """A device with a thread of its own; `undo` ends that."""
    executor = ThreadExecutor({}, (place,))
    undo.callback(executor.close)
    return Device(name, place, executor, stages)


def open_all(
    mounts: Mapping[str, Mount],
    devices: Sequence[Device],
    placed: Mapping[str, Sequence[int]],
    host: Host,
    undo: contextlib.ExitStack,
) -> list[dict[str, Instance]]:
    """The instances on each device, by model; `undo` closes the mounts.

    Raises:
        BackendError: a model cannot be served, by its name.
    """
    found: list[dict[str, Instance]] = [{} for _ in devices]
    agents_last = sorted(mounts.items(), key=lambda named: isinstance(named[1], AgentMount))
    for name, mount in agents_last:
        undo.callback(mount.close)
        try:
            instances = mount.open(name, [devices[number] for number in placed[name]], host)
        except NeustreamError as error:
            raise type(error)(f"model {name!r}: {error}" if name else str(error)) from error
        for number, instance in zip(placed[name], instances, strict=True):
            found[number][name] = instance
        if isinstance(mount, AgentMount):
            _add(mount, placed, found)
    return found


def _add(agent: AgentMount, placed: Mapping[str, Sequence[int]], found: Sequence[dict[str, Instance]]) -> None:
    """Take in what devices serve for the calls of an agent."""
    for name, opened in agent.opened.items():
        for instances in opened:
            for number, instance in zip(placed[name], instances, strict=True):
                found[number][name] = found[number][name].with_(instance)


def member_of(
    mounts: Mapping[str, Mount],
    device: Device,
    instances: Mapping[str, Instance],
    rule: Policy,
    stages: Sequence[str] | None = None,
) -> Member:
    """What serves the instances on a device. `stages`: names of those that are served; None: all.

    Raises:
        BackendError: two models have a stage or a tool of one name, or steps of different `step_tokens`.
    """
    profiles: dict[str, LatencyProfile] = {}
    away: dict[str, LatencyProfile] = {}
    tools: dict[str, Stage] = {}
    for name, instance in instances.items():
        for tool, of_it in instance.tools.items():
            if tools.setdefault(tool, of_it) is not of_it:
                raise BackendError(f"model {name!r}: tool {tool!r} is another model's too; give it another name")
        here, elsewhere = parted(instance, stages)
        for stage in instance.profiles:
            if stage in profiles or stage in away:
                raise BackendError(f"stage {stage!r} of model {name!r} is another model's too")
        profiles |= here
        away |= elsewhere
        device.executor.add(instance.modules, check_finite=instance.check_finite)
    pool = pool_of({name: mounts[name] for name in instances}, tuple(profiles))
    for name in tools:
        if name in profiles or name in away:
            raise BackendError(f"tool {name!r}: a model has a stage of that name")
    executors: dict[str, Executor] = {POOL: device.executor, **executors_of(tools.values())}
    scheduler = Scheduler(
        [pool, *pools_of(tools.values())],
        rule,
        {**profiles, **profiles_of(tools.values())},
        correct=True,
        away=away,
    )
    return Member(scheduler, executors, device.name)


def pool_of(mounts: Mapping[str, Mount], stages: tuple[str, ...]) -> Pool:
    """The pool of a device, for the stages of models that are open."""
    caches: dict[str, KVCache] = {}
    tokens: dict[str, int] = {}
    for name, mount in mounts.items():
        caches |= {
            model: cache for model, cache in mount.kv_caches.items() if any(named(stage, [model]) for stage in stages)
        }
        if mount.step_tokens is not None:
            tokens[name] = mount.step_tokens
    if len(set(tokens.values())) > 1:
        raise BackendError(f"language models of one device need one step_tokens; got {tokens}")
    if not tokens:
        return Pool(POOL, stages, kv_caches=caches)
    return Pool(POOL, stages, kv_caches=caches, step_tokens=next(iter(tokens.values())))
