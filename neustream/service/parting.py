"""The stages that a service serves, as callers name them: checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neustream.core.stage_names import named
from neustream.errors import BackendError, nearest, shown
from neustream.service.agents import AgentMount
from neustream.service.mount import Instance, Mount


def check_stages(stages: Sequence[str] | None, mounts: Mapping[str, Mount]) -> tuple[str, ...] | None:
    """Names of stages; None: all of them.

    Raises:
        BackendError: no list of names, or one of the models is an agent, whose branches cannot leave.
    """
    if stages is None:
        return None
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise BackendError(f"stages must be a list of names, as ['encode', 'decode'], got {shown(stages)}")
    for name in stages:
        if not isinstance(name, str) or not name:
            raise BackendError(f"stages: a stage is a name, as 'encode', got {shown(name)}")
    for name, mount in mounts.items():
        if isinstance(mount, AgentMount):
            raise BackendError(f"stages: model {name!r} is an agent, which is served as a whole: leave stages out")
    return tuple(stages)


def check_known(stages: Sequence[str] | None, here: Sequence[Mapping[str, Instance]]) -> None:
    """BackendError for the name of a stage that no model has, on any device."""
    if stages is None:
        return
    known = set[str]()
    for instances in here:
        for instance in instances.values():
            known |= (instance.profiles.keys() - instance.own) | instance.roles
    for name in stages:
        if not any(named(stage, [name]) for stage in known):
            raise BackendError(f"stages: no stage {name!r}; {nearest(name, sorted(known))}")
