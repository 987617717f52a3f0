"""What the adapters of all pipelines share: the cut pipeline, and a part of it on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from neustream.backends.diffusers.sampler import Calls
from neustream.backends.torch import measured_on
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.types import Job
from neustream.engine.executor import StreamModule


class Part:
    """A part of a pipeline on one device; subclasses add `step`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._device = torch.device("cpu")

    def load(self, device: str) -> None:
        self._device = torch.device(device)
        self._pipe.to(self._device)


class Adapter:
    """A stock pipeline, unchanged, cut into stream modules by stage name."""

    def __init__(self, pipe: Any, modules: Mapping[str, StreamModule]) -> None:
        self.pipe = pipe
        self.modules = modules
        self._counts = Calls(pipe)

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise BackendError if a request with these parameters cannot be served."""
        raise NotImplementedError

    def sample(self, at: int) -> dict[str, Any]:
        """Parameters of the `at`-th request that stages are measured with."""
        raise NotImplementedError

    def calls(self, steps: int) -> int:
        """How often `steps` inference steps call the denoiser with the pipeline's scheduler."""
        return self._counts.of(steps)

    def profile(self, graph: Graph, device: str = "cpu", *, repeats: int = 15) -> dict[str, LatencyProfile]:
        """Measure the stages of `graph` on `device`, waiting for it around each step."""
        return measured_on(device, graph, self.modules, self.sample, repeats)

    def rounds(self, job: Job) -> int:
        """The denoising loop's length for a request, which is checked on the way."""
        self.check(job.params)
        return self.calls(job.params["steps"])
