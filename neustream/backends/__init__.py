"""Real models behind mounts: the only place of heavy imports, each of them lazy.

A backend is a function `make(options, device)`, named in a config by `backend.kind`: one of `KINDS`,
or `module:function` for one of your own. It returns a `ConfigModel` or, with less to write, the
stream modules of a graph that the config describes: a `ModelBackend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.profile import LatencyProfile
from neustream.engine.executor import StreamModule
from neustream.errors import BackendError
from neustream.profiling.files import Measurement
from neustream.profiling.steps import StepsFile
from neustream.service.mount import Mount

KINDS = {
    "diffusers": "neustream.backends.diffusers.from_config:make",
    "transformers": "neustream.backends.transformers.from_config:make",
}


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Of a call: those without a name, and those by name."""


@dataclass(frozen=True)
class Wanted:
    """What a config says of its model, for the mount to offer.

    Args:
        graph: by which the model is simulated; `prefix` stands in front of its stages' names.
        profiles: of its stages; None: they are still to be measured.
        kv_caches: of a language model, by its node; none where the config names no memory.
        step_tokens: see `Mount`; check_finite: fail requests that come to NaN or infinity.
    """

    graph: Graph
    prefix: str
    profiles: Mapping[str, LatencyProfile] | None
    kv_caches: Mapping[str, KVCache]
    step_tokens: int | None
    check_finite: bool


@dataclass(frozen=True)
class Texts:
    """How texts of several requests are computed.

    Attributes:
        batched: their decodes share a call; else each has one of its own, and a step of many takes
            as long as theirs one after the other.
        slots: keys and values of all are in one place; else each request has a cache of its own.
        why: what the model has against slots, or against batches; "" in slots.
    """

    batched: bool
    slots: bool
    why: str = ""


class ConfigModel(ABC):
    """A config's real model: a stock object, and what its workload's requests ask of it.

    `out_of_memory` are the exceptions that mean it; `model_name` and `dtype` stand in profiles.
    `lengths`, set before serving: outputs after which generations end, by request.
    """

    model_name: str
    dtype: str
    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,)
    lengths: Mapping[str, int] = {}

    @abstractmethod
    def mount(self, wanted: Wanted) -> Mount:
        """The model, ready to be scheduled; BackendError if it does not go through that graph."""

    @abstractmethod
    def label(self, place: str) -> str:
        """What profiles measured on a device are labelled with."""

    @abstractmethod
    def stage_of(self, wanted: Wanted, name: str, stage: str) -> str | None:
        """The config's stage that a stage of its mount is, if that is served under `name`."""

    @abstractmethod
    def served_as(self, wanted: Wanted, name: str, stage: str) -> str:
        """The name of a config's stage, or of its role, where the mount is served under `name`."""

    @abstractmethod
    def params(self, at: int) -> dict[str, Any]:
        """Parameters of a workload's `at`-th request, apart from its step count."""

    @abstractmethod
    def arguments(self, params: Mapping[str, Any], ends_after: int | None = None) -> Arguments:
        """Arguments of the mount's `request`; `ends_after`: outputs of a generation."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until the device is idle."""

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise BackendError for parameters that the mount would not see to be wrong."""
        return

    def image(self, value: Any) -> Any:
        """The PIL image in what came of a request, or None for models that make none."""
        return None

    def steps(self, seconds: float, tick: Callable[[str, int, float], None]) -> StepsFile:
        """Measure how long a language model's steps take, in about `seconds`.

        `tick` is told kind, requests and seconds of each.
        """
        raise BackendError(f"{type(self).__name__} is no language model: it has no steps of prompts and outputs")

    def texts(self) -> Texts | None:
        """How texts of several requests are computed, tried on the model; None: it does not say.

        BackendError: it cannot be served.
        """
        return None

    def see(self, max_batch: int) -> list[Measurement]:
        """Measure how long a language model's vision tower takes, over batches of requests with an image each."""
        raise BackendError(f"{type(self).__name__} has no eyes: workload.images must be 0")


class ModelBackend(Protocol):
    """A model on one device, cut into stream modules that are served under the config's graph.

    `modules` has one for each stage of the config, by name; a language model has "llm" too, for
    steps of both its stages, a method `steps`, and perhaps `lengths`. `device_name` is what
    profiles measured here are labelled with; all else is as of a `ConfigModel`.
    """

    modules: Mapping[str, StreamModule]
    device_name: str
    model_name: str
    dtype: str
    out_of_memory: tuple[type[BaseException], ...]

    def params(self, at: int) -> dict[str, Any]: ...

    def check(self, params: Mapping[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def image(self, value: Any) -> Any: ...


Make = Callable[[Mapping[str, Any], str], ConfigModel | ModelBackend]
