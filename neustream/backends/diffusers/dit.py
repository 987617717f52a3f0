"""`DiTPipeline` (class-conditional diffusion transformers) as stream modules.

Equal to the stock pipeline, its quirks included: it hands the SCALED latents to the scheduler's step
and never applies `init_noise_sigma`, so that stock DiT with Euler is not what the mathematics says
(use DDIM, DDPM or DPM++); here it comes out as in stock. Stock also draws the noise of stochastic
schedulers from torch's global generator; here each request has its own, seeded like its latents,
which on a CPU equals stock after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from neustream.backends.diffusers.adapter import Adapter, Part
from neustream.backends.diffusers.sampler import ALLOWED, Sampler, check_common, seeded
from neustream.core.graph import Graph, Stage, loop, seq
from neustream.core.types import Job
from neustream.errors import BackendError

NULL_CLASS = 1000
"""The class that the stock pipeline uses for "no class" in guidance."""


class DiT(Adapter):
    """A stock DiTPipeline, cut into `dit` (looped) and `vae`.

    Request parameters: `class_label` (int), `steps`, `guidance_scale` (default 4.0), and `seed` or
    `generator`. The output is `{"image": PIL.Image, "pixels": tensor (3, H, W) in [0, 1]}`.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, {"dit": Denoise(pipe), "vae": Decode(pipe)})

    def graph(self, *, max_batch: int = 16, decode_batch: int = 8) -> Graph:
        """The graph of one image; a stage's batches count requests (two rows each with guidance)."""
        dit, vae = Stage("dit", max_batch=max_batch), Stage("vae", max_batch=decode_batch, emits=True)
        return Graph("dit", seq(loop(dit, times=self.rounds), vae))

    def sample(self, at: int) -> dict[str, Any]:
        return {"class_label": at % 10, "steps": 4, "seed": at}

    def check(self, params: Mapping[str, Any]) -> None:
        check_common(params, ALLOWED - {"eta"} | {"class_label"})
        label, classes = params.get("class_label"), self.pipe.transformer.config.num_embeds_ada_norm
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise BackendError(f"class_label must be a whole number from 0 to {classes - 1}, got {label!r}")


class Denoise(Part):
    """One step of the transformer for requests at any timesteps."""

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        states = [job.state if "latents" in job.state else self._begin(job) for job in jobs]
        scaled = [state["sampler"].scale(state["latents"]) for state in states]
        rows, times, labels = [], [], []
        for job, state, latents in zip(jobs, states, scaled, strict=True):
            wanted = [job.params["class_label"], NULL_CLASS] if _guided(job) else [job.params["class_label"]]
            labels += wanted
            rows += [latents] * len(wanted)
            times += [state["sampler"].timestep] * len(wanted)
        predicted = self._pipe.transformer(
            torch.cat(rows),
            timestep=torch.stack(times).to(self._device),
            class_labels=torch.tensor(labels, device=self._device),
            return_dict=False,
        )[0]
        updates, at = [], 0
        for job, state, latents in zip(jobs, states, scaled, strict=True):
            count = 2 if _guided(job) else 1
            after = self._advance(job, state["sampler"], latents, predicted[at : at + count])
            updates.append({"latents": after, "sampler": state["sampler"]})
            at += count
        return updates

    def _begin(self, job: Job) -> dict[str, Any]:
        """The state that a request's first step starts from."""
        config, params = self._pipe.transformer.config, job.params
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = randn_tensor(shape, generator=seeded(params), device=self._device, dtype=self._pipe.transformer.dtype)
        sampler = Sampler(self._pipe.scheduler, params["steps"], self._device, seeded(params))
        return {"latents": noise, "sampler": sampler}

    def _advance(self, job: Job, sampler: Sampler, scaled: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        config = self._pipe.transformer.config
        channels: int = config.in_channels
        if not _guided(job):
            learned_sigma = config.out_channels // 2 == channels
            return sampler.step(predicted[:, :channels] if learned_sigma else predicted, scaled)
        cond, uncond = predicted[:1, :channels], predicted[1:, :channels]
        guided = uncond + job.params.get("guidance_scale", 4.0) * (cond - uncond)
        # Stock steps both rows; a stochastic scheduler's noise is drawn for both, so both are stepped.
        return sampler.step(torch.cat([guided, guided]), torch.cat([scaled, scaled]))[:1]


def _guided(job: Job) -> bool:
    return bool(job.params.get("guidance_scale", 4.0) > 1)


class Decode(Part):
    """Latents to images."""

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        vae = self._pipe.vae
        latents = 1 / vae.config.scaling_factor * torch.cat([job.state["latents"] for job in jobs])
        pixels = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu().float()
        return [{"image": to_image(one), "pixels": one} for one in pixels]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """A PIL image from a (3, H, W) tensor in [0, 1], rounded as diffusers does."""
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
