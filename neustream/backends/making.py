"""The model that a config's `backend` section describes, made for a device.

Imports no framework itself: the backend that the config names does.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any, cast

from neustream.backends import KINDS, Arguments, ConfigModel, Make, ModelBackend, Wanted
from neustream.by_name import load_object
from neustream.config.schema import Experiment
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile, unmeasured
from neustream.engine.executor import StreamModule
from neustream.errors import BackendError, ConfigError, NeustreamError, nearest, shown, told
from neustream.experiment.pipelines import LlmPipeline, Pipeline
from neustream.experiment.prepared import learning
from neustream.service.graphs import GraphMount
from neustream.service.mount import Mount

NEEDED = {
    "diffusers": ("diffusion", ("torch", "diffusers", "transformers")),
    "transformers": ("llm", ("torch", "transformers", "platformdirs")),
}
"""What the library's own backends import, and the extra that installs it."""


def make_model(experiment: Experiment, device: str, stages: Collection[str] | None = None) -> ConfigModel:
    """The model of an experiment, made for `device`.

    `stages`: those of the config that are served there; a backend that takes `stages` beside its options
    and the device may leave out what others need. None: all.

    Raises:
        ConfigError: the config names no backend, or none that there is.
        BackendError: it cannot be made.
    """
    made = _made(experiment, device, stages)
    return made if isinstance(made, ConfigModel) else OwnModules(made, device, experiment, stages)


def _made(experiment: Experiment, device: str, stages: Collection[str] | None = None) -> ConfigModel | ModelBackend:
    config = experiment.backend
    if config is None:
        raise ConfigError(f"config {experiment.name!r} has no backend section, so it can only be simulated")
    path = KINDS.get(config.kind, config.kind)
    if ":" not in path:
        raise ConfigError(f"backend.kind {shown(config.kind)}: {nearest(config.kind, KINDS)}; or module:function")
    extra, needed = NEEDED.get(config.kind, ("", ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise BackendError(f"backend {config.kind!r} needs {', '.join(missing)}: pip install 'neustream[{extra}]'")
    make: Make = load_object(path, "backend")
    try:
        if stages is not None and "stages" in inspect.signature(make).parameters:
            return make(config.options, device, stages=stages)  # type: ignore[call-arg]
        return make(config.options, device)
    except NeustreamError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendError(f"backend {config.kind!r}: making it for {device!r} raised {told(error)}") from error


class OwnModules(ConfigModel):
    """Stream modules of a backend of the user's own, under the config's graph.

    Args:
        backend: what the function made for `device`; for others it is asked again.
        stages: those of the config that are served; others need no modules. None: all.
    """

    def __init__(
        self, backend: ModelBackend, device: str, experiment: Experiment, stages: Collection[str] | None = None
    ) -> None:
        self._experiment = experiment
        self._stages = stages
        self._on = {device: backend}
        self.backend = backend
        self.model_name, self.dtype = backend.model_name, backend.dtype
        self.out_of_memory = backend.out_of_memory
        self.check, self.image = backend.check, backend.image  # type: ignore[method-assign]
        if hasattr(backend, "steps"):
            self.steps = backend.steps  # type: ignore[method-assign]

    @property
    def lengths(self) -> Mapping[str, int]:
        found: Mapping[str, int] = vars(self.backend).get("lengths", {})
        return found

    @lengths.setter
    def lengths(self, lengths: Mapping[str, int]) -> None:
        vars(self.backend)["lengths"] = lengths

    def params(self, at: int) -> dict[str, Any]:
        return self.backend.params(at)

    def sync(self) -> None:
        self.backend.sync()

    def at(self, place: str) -> ModelBackend:
        """What was made for a device."""
        if place not in self._on:
            self._on[place] = cast(ModelBackend, _made(self._experiment, place, self._stages))
        return self._on[place]

    def label(self, place: str) -> str:
        return self.at(place).device_name

    def mount(self, wanted: Wanted) -> Mount:
        taken: set[str] = set()

        def modules(place: str) -> dict[str, StreamModule]:
            if place in taken:
                name = type(self.backend).__name__
                raise BackendError(f"{name} has stream modules for {place!r} once, so it can have one instance there")
            taken.add(place)
            return self._modules(wanted, place)

        return GraphMount(
            wanted.graph,
            modules,
            learning(wanted.profiles) if wanted.profiles else _guesses(wanted.graph),
            kv_caches=wanted.kv_caches,
            step_tokens=wanted.step_tokens,
            check_finite=wanted.check_finite,
        )

    def _modules(self, wanted: Wanted, place: str) -> dict[str, StreamModule]:
        """The modules of a device, by the names that the config's stages have."""
        found = {wanted.prefix + name: module for name, module in self.at(place).modules.items()}
        here = {
            name: stage
            for name, stage in wanted.graph.stages.items()
            if self._stages is None or name.removeprefix(wanted.prefix) in self._stages
        }
        labels = {stage.model for stage in here.values()} - {""}
        if unserved := {*here, *labels} - set(found):
            kind = self._experiment.backend and self._experiment.backend.kind
            raise ConfigError(
                f"backend {kind!r} has no module for stage(s) {sorted(unserved)}; it has: {sorted(found)}"
            )
        return found

    def stage_of(self, wanted: Wanted, name: str, stage: str) -> str | None:
        labels = {known.model for known in wanted.graph.stages.values()}
        return stage if stage in wanted.graph.stages or stage in labels else None

    def served_as(self, wanted: Wanted, name: str, stage: str) -> str:
        return stage

    def arguments(self, params: Mapping[str, Any], ends_after: int | None = None) -> Arguments:
        return (params,), {}


def _guesses(graph: Graph) -> dict[str, LatencyProfile]:
    return {name: unmeasured(name, stage.max_batch) for name, stage in graph.stages.items()}


def wanted_of(pipeline: Pipeline[Experiment], profiles: Mapping[str, LatencyProfile] | None = None) -> Wanted:
    """What an experiment says of its model, for the mount to offer; `profiles`, if there are some."""
    config, pools = pipeline.experiment.backend, pipeline.pools
    return Wanted(
        pipeline.graph,
        pipeline.prefix,
        profiles,
        {model: cache for pool in pools for model, cache in pool.kv_caches.items()},
        pools[0].step_tokens if isinstance(pipeline, LlmPipeline) else None,
        config is not None and config.check_finite,
    )
