"""One request's own diffusers scheduler, timesteps and noise source.

diffusers' scheduler objects keep private state from step to step (`_step_index`, past model
outputs), so requests at different steps cannot share one; each gets a copy of the pipeline's.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from neustream.errors import BackendError


class Sampler:
    """The denoising schedule of one request.

    Args:
        template: the pipeline's scheduler; copied, never changed.
        steps: `num_inference_steps`.
        device: where timesteps live.
        generator: source of the noise that the scheduler's steps draw, if they draw any.
        eta: DDIM's; ignored by schedulers without it, as in diffusers.
    """

    def __init__(
        self, template: Any, steps: int, device: torch.device, generator: torch.Generator | None, eta: float = 0.0
    ) -> None:
        self.scheduler = copy.deepcopy(template)
        self.scheduler.set_timesteps(steps, device=device)
        self.timesteps = list(self.scheduler.timesteps)
        self.at = 0
        accepted = inspect.signature(self.scheduler.step).parameters
        self._extra: dict[str, Any] = {}
        if "eta" in accepted:
            self._extra["eta"] = eta
        if "generator" in accepted:
            self._extra["generator"] = generator

    @property
    def timestep(self) -> torch.Tensor:
        """The current timestep, 0-dim."""
        return self.timesteps[self.at]

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's input for `latents` at the current timestep."""
        scaled: torch.Tensor = self.scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def step(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents one step further; moves on to the next timestep."""
        after: torch.Tensor = self.scheduler.step(output, self.timestep, latents, **self._extra, return_dict=False)[0]
        self.at += 1
        return after


class Calls:
    """How often n inference steps call the denoiser (Heun: 2n - 1, PNDM: n + 1, most: n)."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._scheduler: Any = None
        self._known: dict[int, int] = {}

    def of(self, steps: int) -> int:
        """Denoiser calls of `steps` inference steps with the scheduler that the pipeline has now."""
        if self._scheduler is not self._pipe.scheduler:
            self._scheduler, self._known = self._pipe.scheduler, {}
        if steps not in self._known:
            scheduler = copy.deepcopy(self._scheduler)
            try:
                scheduler.set_timesteps(steps)
            except (ValueError, IndexError) as error:
                raise BackendError(f"{type(scheduler).__name__} cannot take {steps} steps: {error}") from None
            self._known[steps] = len(scheduler.timesteps)
        return self._known[steps]


def seeded(params: Mapping[str, Any]) -> torch.Generator | None:
    """The request's own generator: the one it brings, or a CPU one from its seed, or none."""
    generator = params.get("generator")
    if generator is None and params.get("seed") is not None:
        return torch.Generator("cpu").manual_seed(params["seed"])
    return generator


ALLOWED = {"steps", "seed", "generator", "guidance_scale", "eta"}


def check_common(params: Mapping[str, Any], allowed: set[str]) -> None:
    """Refuse unknown parameters and impossible values that every pipeline shares."""
    if unknown := set(params) - allowed:
        raise BackendError(f"unknown request parameter(s) {sorted(unknown)}; allowed: {', '.join(sorted(allowed))}")
    steps = params.get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BackendError(f"steps must be a whole number of at least 1, got {steps!r}")
    for name in ("guidance_scale", "eta"):
        value = params.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BackendError(f"{name} must be a finite number, got {value!r}")
    if params.get("seed") is not None and params.get("generator") is not None:
        raise BackendError("give either seed or generator, not both")
    seed = params.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise BackendError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    generator = params.get("generator")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise BackendError(f"generator must be a torch.Generator, got {type(generator).__name__}")
