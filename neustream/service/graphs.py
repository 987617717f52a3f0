"""A graph of the user's own, ready to be scheduled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph, Stage
from neustream.core.kv_cache import KVCache
from neustream.core.profile import LatencyProfile
from neustream.core.stage_names import named
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.engine.executor import StreamModule
from neustream.errors import (
    BackendError,
    NeustreamError,
    ProfileError,
    RequestError,
    StageFailed,
    nearest,
    shown,
    told,
)
from neustream.service.mount import Call, Device, Host, Instance

Modules = Mapping[str, StreamModule]


class GraphMount:
    """A graph with a stream module and a latency profile for each of its stages but tools.

    Of stages that are served elsewhere (`stages` of a service) no module has to be there, and none is loaded.

    Args:
        modules: by stage; or a function that makes them for a device, by its name, where the graph
            is to be on several.
        kv_caches: of the graph's language models, by `Stage.model`; without one there is no limit.
        step_tokens: see `Mount`; check_finite: see `Instance`.
        device: where the modules are loaded, unless the service says otherwise.
    """

    observers: Sequence[Observer] = ()

    def __init__(
        self,
        graph: Graph,
        modules: Modules | Callable[[str], Modules],
        profiles: Mapping[str, LatencyProfile],
        *,
        kv_caches: Mapping[str, KVCache] = {},
        step_tokens: int | None = None,
        check_finite: bool = False,
        device: str = "cpu",
    ) -> None:
        self.graph = graph
        self.kv_caches: Mapping[str, KVCache] = dict(kv_caches)
        self.step_tokens = step_tokens
        self.device = device
        self._check_finite = check_finite
        self._modules = modules
        self._profiles = dict(profiles)

    def check(self, name: str) -> None:
        if not isinstance(self.graph, Graph):
            raise BackendError(f"{name!r}: a graph is a neustream.Graph, got {shown(self.graph)}")
        for stage in self._own:
            if stage not in self._profiles:
                known = nearest(stage, self._profiles)
                raise ProfileError(f"stage {stage!r} of {self.graph.name!r} has no profile; {known}")

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        if len(devices) > 1 and not callable(self._modules):
            places = [device.place for device in devices]
            raise BackendError(
                f"graph {self.graph.name!r}: on several devices {places}, modules are a function "
                "that makes them: modules=lambda device: {...}"
            )
        return [self._on(device) for device in devices]

    def _on(self, device: Device) -> Instance:
        modules = self._modules(device.place) if callable(self._modules) else self._modules
        here = [stage for stage in self._own if named(stage, device.stages)]
        for stage in here:
            if stage not in modules:
                known = nearest(stage, modules)
                raise BackendError(f"stage {stage!r} of {self.graph.name!r} has no module; {known}")
        own = modules if len(here) == len(self._own) else self._needed(modules, here)
        first = {id(module): stage for stage, module in reversed(list(own.items()))}
        for stage in first.values():
            self._load(stage, own[stage], device)
        profiles = {stage: self._profiles[stage] for stage in self._own}
        return Instance(own, profiles, self._check_finite, self._tools)

    def _needed(self, modules: Modules, here: Sequence[str]) -> Modules:
        """The modules of some stages; others have stand-ins."""
        stages = self.graph.stages
        used = {id(modules.get(name)) for stage in here for name in (stage, stages[stage].model)}
        models = [stages[stage].model for stage in self._own if stages[stage].model]
        found: dict[str, StreamModule] = {}
        for name in dict.fromkeys([*modules, *self._own, *models]):
            module = modules.get(name)
            found[name] = module if module is not None and id(module) in used else Elsewhere(name)
        return found

    @property
    def _tools(self) -> Mapping[str, Stage]:
        return {name: stage for name, stage in self.graph.stages.items() if stage.tool is not None}

    @property
    def _own(self) -> list[str]:
        """The stages that need a module."""
        return [name for name, stage in self.graph.stages.items() if stage.tool is None]

    def _load(self, stage: str, module: StreamModule, device: Device) -> None:
        try:
            device.executor.call(partial(module.load, device.place)).result()
        except NeustreamError:
            raise
        except Exception as error:
            where = f"stage {stage!r}: loading its module on {device.place!r}"
            raise BackendError(f"{where} raised {told(error)}") from error

    def request(self, params: Mapping[str, Any] | None = None, /, **more: Any) -> Call:
        """A run of the graph with `params`, given as a mapping or by name."""
        return run_of(self.graph, params, more, _update)

    def rehearsal(self) -> Sequence[Call]:
        return ()

    def close(self) -> None:
        pass


class Elsewhere:
    """In place of the module of a stage that is served elsewhere: what that keeps of a request goes along."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._pieces: dict[str, Any] = {}

    def load(self, device: str) -> None:
        """There is nothing."""

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        raise StageFailed(f"{self._stage!r} is served elsewhere")

    def release(self, id: str) -> None:
        self._pieces.pop(id, None)

    def put_aside(self, id: str) -> None:
        """It is in no KV blocks."""

    def export(self, given: StepInput) -> Any:
        return self._pieces.get(given.id)

    def adopt(self, given: StepInput, piece: Any) -> None:
        self._pieces[given.id] = piece


def run_of(
    graph: Graph,
    params: Mapping[str, Any] | None,
    more: Mapping[str, Any],
    read: Callable[[Emitted], Mapping[str, Any]],
) -> Call:
    """A run of `graph` whose answer is the last state and whose outputs are what `read` makes of them.

    Args:
        params: the parameters as one mapping, or None.
        more: those that were given by name; they win over `params`.

    Raises:
        RequestError: `params` is no mapping.
    """
    if params is not None and not isinstance(params, Mapping):
        raise RequestError(f"parameters are a mapping, got {shown(params)}")
    return Call(graph, {**(params or {}), **more}, _value, lambda: read)


def _value(result: Result, outputs: Sequence[Emitted]) -> Update:
    return result.unwrap()


def _update(output: Emitted) -> Update:
    return output.update
