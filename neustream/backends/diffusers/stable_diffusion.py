"""`StableDiffusionPipeline` (1.x and 2.x) as stream modules, equal to the stock pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neustream.backends.diffusers.adapter import Adapter, Part
from neustream.backends.diffusers.sampler import ALLOWED, Sampler, check_common, seeded
from neustream.core.graph import Graph, Stage, loop, seq
from neustream.core.types import Job
from neustream.errors import BackendError


class StableDiffusion(Adapter):
    """A stock StableDiffusionPipeline, cut into `clip`, `unet` (looped) and `vae`.

    Request parameters: `prompt` (one string), `negative_prompt`, `steps`, `guidance_scale` (default
    7.5), `height`, `width`, `eta`, and `seed` or `generator`. The output is `{"image": PIL.Image,
    "pixels": tensor (3, H, W) in [0, 1], "nsfw": bool or None}`; the safety checker runs if the
    pipeline has one.
    """

    def __init__(self, pipe: Any) -> None:
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise BackendError("a UNet with time_cond_proj_dim (guidance-distilled) is not served by this adapter")
        super().__init__(pipe, {"clip": Encode(pipe), "unet": Denoise(pipe), "vae": Decode(pipe)})

    def graph(self, *, max_batch: int = 16, encode_batch: int = 16, decode_batch: int = 8) -> Graph:
        """The graph of one image; a stage's batches count requests (two rows each with guidance)."""
        clip, unet = Stage("clip", max_batch=encode_batch), Stage("unet", max_batch=max_batch)
        vae = Stage("vae", max_batch=decode_batch, emits=True)
        return Graph("stable_diffusion", seq(clip, loop(unet, times=self.rounds), vae))

    def sample(self, at: int) -> dict[str, Any]:
        return {"prompt": "a fox", "steps": 4, "seed": at}

    def check(self, params: Mapping[str, Any]) -> None:
        check_common(params, ALLOWED | {"prompt", "negative_prompt", "height", "width"})
        for key in ("prompt", "negative_prompt"):
            text = params.get(key, "" if key == "negative_prompt" else None)
            if not isinstance(text, str):
                raise BackendError(f"{key} must be one string, got {text!r}")
        height, width = size_of(self.pipe, params)
        if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
            raise BackendError(f"height and width must be whole numbers greater than 0, got {height!r} and {width!r}")
        if height % 8 or width % 8:
            raise BackendError(f"height and width must be multiples of 8, got {height} and {width}")


def size_of(pipe: Any, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """Height and width in pixels, by default what the UNet was trained at."""
    size = pipe.unet.config.sample_size
    high, wide = (size, size) if isinstance(size, int) else size
    factor = pipe.vae_scale_factor
    return params.get("height") or high * factor, params.get("width") or wide * factor


def _guided(job: Job) -> bool:
    return _guidance(job) > 1


def _guidance(job: Job) -> float:
    return float(job.params.get("guidance_scale", 7.5))


class Encode(Part):
    """Prompts to embeddings, those of the negative prompts first where guidance needs them."""

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        guided = any(_guided(job) for job in jobs)
        prompts = [job.params["prompt"] for job in jobs]
        negative = [job.params.get("negative_prompt", "") for job in jobs]
        positive, unwanted = self._pipe.encode_prompt(prompts, self._device, 1, guided, negative)
        return [
            {"embeds": torch.cat([unwanted[at : at + 1], positive[at : at + 1]])}
            if _guided(job)
            else {"embeds": positive[at : at + 1]}
            for at, job in enumerate(jobs)
        ]


class Denoise(Part):
    """One step of the UNet for requests at any timesteps; one call for each resolution among them."""

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        states = [job.state if "latents" in job.state else self._begin(job) for job in jobs]
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for at, state in enumerate(states):
            alike[state["latents"].shape].append(at)
        after: dict[int, torch.Tensor] = {}
        for some in alike.values():
            after.update(zip(some, self._denoise([jobs[at] for at in some], [states[at] for at in some]), strict=True))
        return [{"latents": after[at], "sampler": state["sampler"]} for at, state in enumerate(states)]

    def _denoise(self, jobs: Sequence[Job], states: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        rows, times = [], []
        for job, state in zip(jobs, states, strict=True):
            count = len(job.state["embeds"])
            rows += [state["sampler"].scale(state["latents"])] * count
            times += [state["sampler"].timestep] * count
        predicted = self._pipe.unet(
            torch.cat(rows),
            torch.stack(times).to(self._device),
            encoder_hidden_states=torch.cat([job.state["embeds"] for job in jobs]),
            return_dict=False,
        )[0]
        after, at = [], 0
        for job, state in zip(jobs, states, strict=True):
            if _guided(job):
                uncond, cond = predicted[at : at + 1], predicted[at + 1 : at + 2]
                noise, at = uncond + _guidance(job) * (cond - uncond), at + 2
            else:
                noise, at = predicted[at : at + 1], at + 1
            after.append(state["sampler"].step(noise, state["latents"]))
        return after

    def _begin(self, job: Job) -> dict[str, Any]:
        """The state that a request's first step starts from; latents and steps share its generator."""
        params, generator = job.params, seeded(job.params)
        sampler = Sampler(self._pipe.scheduler, params["steps"], self._device, generator, params.get("eta", 0.0))
        height, width = size_of(self._pipe, params)
        channels, dtype = self._pipe.unet.config.in_channels, job.state["embeds"].dtype
        pipe = _WithScheduler(self._pipe, sampler.scheduler)
        latents = type(self._pipe).prepare_latents(pipe, 1, channels, height, width, dtype, self._device, generator)
        return {"latents": latents, "sampler": sampler}


class _WithScheduler:
    """The pipeline as one request sees it: everything shared, but the scheduler its own."""

    def __init__(self, pipe: Any, scheduler: Any) -> None:
        self._pipe = pipe
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class Decode(Part):
    """Latents to images; one call for each resolution."""

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for at, job in enumerate(jobs):
            alike[job.state["latents"].shape].append(at)
        updates: dict[int, dict[str, Any]] = {}
        for some in alike.values():
            updates.update(zip(some, self._decode([jobs[at] for at in some]), strict=True))
        return [updates[at] for at in range(len(jobs))]

    def _decode(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        pipe = self._pipe
        latents = torch.cat([job.state["latents"] for job in jobs]) / pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(latents, return_dict=False)[0]
        decoded, flagged = pipe.run_safety_checker(decoded, self._device, jobs[0].state["embeds"].dtype)
        denormalize = [True] * len(jobs) if flagged is None else [not nsfw for nsfw in flagged]
        pixels = pipe.image_processor.postprocess(decoded, output_type="pt", do_denormalize=denormalize).cpu().float()
        images = pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=denormalize)
        nsfw = [None] * len(jobs) if flagged is None else [bool(x) for x in flagged]
        return [{"image": images[at], "pixels": pixels[at], "nsfw": nsfw[at]} for at in range(len(jobs))]
