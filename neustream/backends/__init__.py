"""Real models behind stream modules: the only place of heavy imports, each of them lazy.

A backend is a function `make(options, device) -> ModelBackend`, named in a config by `backend.kind`:
one of `KINDS`, or `module:function` for one of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from neustream.engine.executor import StreamModule
from neustream.profiling.steps import StepsFile

KINDS = {
    "diffusers": "neustream.backends.diffusers.from_config:make",
    "transformers": "neustream.backends.transformers.from_config:make",
}


class ModelBackend(Protocol):
    """A model on one device, cut into stream modules.

    `modules` has one for each stage of the config, by name. `out_of_memory` are the exceptions
    that mean it, `device_name` is what profiles measured here are labelled with.
    """

    modules: Mapping[str, StreamModule]
    model_name: str
    device_name: str
    dtype: str
    out_of_memory: tuple[type[BaseException], ...]

    def params(self, at: int) -> dict[str, Any]:
        """Parameters of a workload's `at`-th request, apart from its step count."""
        ...

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise BackendError if a request with these parameters cannot be served."""
        ...

    def sync(self) -> None:
        """Wait until the device is idle."""
        ...

    def image(self, output: Mapping[str, Any]) -> Any:
        """The PIL image in a request's output, or None for models that make none."""
        ...


class LlmBackend(ModelBackend, Protocol):
    """A language model: beside its two stages, `modules` has "llm" for steps of both.

    `lengths`, set before serving, are the outputs after which generations of a workload end, by request.
    """

    lengths: Mapping[str, int]

    def replica(self) -> LlmBackend:
        """The same model on the same device once more, to run beside it; weights may be shared."""
        ...

    def warm_up(self) -> None:
        """Run steps of all kinds, so that the first real request finds all loaded."""
        ...

    def steps(self, seconds: float, tick: Callable[[str, int, float], None]) -> StepsFile:
        """Measure how long steps take, in about `seconds`; `tick` is told kind, requests and seconds of each."""
        ...


Make = Callable[[Mapping[str, Any], str], ModelBackend]
