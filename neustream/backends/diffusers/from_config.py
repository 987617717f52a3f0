"""Pipelines from a config's `backend` section: from a checkpoint, or real architectures with random weights.

backend:
  kind: dit | stable_diffusion
  checkpoint: path               # a folder saved by diffusers; or, for random weights:
  transformer / unet, vae, text_encoder: {...}   # the model classes' own arguments
  scheduler: {name: DDIMScheduler, ...}          # the class's own arguments
  dtype: float32
  weights_seed: 0
  request: {guidance_scale: 4.0}                 # parameters of every request
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from neustream.backends import torch as shared
from neustream.backends.diffusers.dit import DiT
from neustream.backends.diffusers.stable_diffusion import StableDiffusion
from neustream.errors import BackendError

PROMPTS = (
    "a lighthouse in a storm, oil painting",
    "an astronaut tending a greenhouse",
    "a street market at night in the rain",
    "a fox asleep under a red maple",
    "a paper boat on a quiet canal",
    "an old library with floating lamps",
)
"""What workload requests ask for; speed does not depend on the words."""


class Options(BaseModel):
    """The options of the `backend` section."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = None
    transformer: dict[str, Any] | None = None
    unet: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    dtype: str = "float32"
    weights_seed: int = 0
    threads: int | None = Field(default=None, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)


class Served:
    """A cut pipeline as the command line uses it (see `neustream.backends.ModelBackend`)."""

    out_of_memory = shared.OUT_OF_MEMORY

    def __init__(self, adapter: DiT | StableDiffusion, options: Options, device: str) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._device = shared.device_of(device)
        self.adapter = adapter
        self._request = options.request
        self.modules = adapter.modules
        self.model_name = f"{type(adapter.pipe).__name__}, {_parameters(adapter.pipe) / 1e6:.1f} M parameters"
        self.device_name = shared.device_name(self._device)
        self.dtype = options.dtype

    def params(self, at: int) -> dict[str, Any]:
        draw = np.random.RandomState(at)
        own: dict[str, Any] = {"seed": int(draw.randint(2**31 - 1))}
        if isinstance(self.adapter, DiT):
            own["class_label"] = int(draw.randint(self.adapter.pipe.transformer.config.num_embeds_ada_norm))
        else:
            own["prompt"] = PROMPTS[int(draw.randint(len(PROMPTS)))]
        return {**own, **self._request}

    def check(self, params: Mapping[str, Any]) -> None:
        self.adapter.check(params)
        calls = self.adapter.calls(params["steps"])
        if calls != params["steps"]:
            name = type(self.adapter.pipe.scheduler).__name__
            raise BackendError(
                f"{name} calls the denoiser {calls} times for {params['steps']} steps, so a config's loop over "
                "`steps` does not fit it; choose another scheduler, or serve the adapter's own graph from Python"
            )

    def sync(self) -> None:
        shared.sync(self._device)

    def image(self, output: Mapping[str, Any]) -> Any:
        return output["image"]


def _parameters(pipe: Any) -> int:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(weight.numel() for module in modules for weight in module.parameters())


def _options(raw: Mapping[str, Any], needed: Sequence[str]) -> Options:
    try:
        options = Options.model_validate(dict(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise BackendError(f"backend.{key}: {problem['msg']}; options: {', '.join(Options.model_fields)}") from None
    missing = [name for name in needed if getattr(options, name) is None]
    if options.checkpoint is None and missing:
        raise BackendError(f"backend: give a checkpoint, or all of {', '.join(needed)} (missing: {', '.join(missing)})")
    return options


def _scheduler(options: Options) -> Any:
    assert options.scheduler is not None
    arguments = dict(options.scheduler)
    name = arguments.pop("name", None)
    make = getattr(diffusers, str(name), None)
    if make is None:
        raise BackendError(f"backend.scheduler.name: diffusers has no scheduler {name!r}")
    return _build("scheduler", make, arguments)


def _build(what: str, make: Any, arguments: Any) -> Any:
    try:
        return make(**arguments)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        raise BackendError(f"backend.{what}: {type(error).__name__}: {error}") from error


def _load(cls: Any, options: Options) -> Any:
    try:
        pipe = cls.from_pretrained(
            options.checkpoint, torch_dtype=shared.dtype_of(options.dtype), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BackendError(f"backend.checkpoint {options.checkpoint!r}: {error}") from error
    if options.scheduler is not None:
        pipe.scheduler = _scheduler(options)
    return pipe


def _ready(pipe: Any, options: Options) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    dtype = shared.dtype_of(options.dtype)
    return pipe if pipe.dtype == dtype else pipe.to(dtype)


def dit(raw: Mapping[str, Any], device: str) -> Served:
    """A DiTPipeline; `transformer` are DiTTransformer2DModel's arguments, `vae` AutoencoderKL's."""
    options = _options(raw, ("transformer", "vae", "scheduler"))
    shared.device_of(device)
    if options.checkpoint is not None:
        pipe = _load(DiTPipeline, options)
    else:
        torch.manual_seed(options.weights_seed)
        pipe = DiTPipeline(
            transformer=_build("transformer", DiTTransformer2DModel, options.transformer),
            vae=_build("vae", AutoencoderKL, options.vae),
            scheduler=_scheduler(options),
        )
    return Served(DiT(_ready(pipe, options)), options, device)


def stable_diffusion(raw: Mapping[str, Any], device: str) -> Served:
    """A StableDiffusionPipeline without safety checker; `unet` are UNet2DConditionModel's arguments."""
    options = _options(raw, ("unet", "vae", "text_encoder", "scheduler"))
    shared.device_of(device)
    if options.checkpoint is not None:
        pipe = _load(StableDiffusionPipeline, options)
    else:
        torch.manual_seed(options.weights_seed)
        tokenizer = byte_tokenizer()
        ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
        ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        text = _build("text_encoder", CLIPTextConfig, {**ids, **(options.text_encoder or {})})
        pipe = StableDiffusionPipeline(
            vae=_build("vae", AutoencoderKL, options.vae),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=_build("unet", UNet2DConditionModel, options.unet),
            scheduler=_scheduler(options),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return Served(StableDiffusion(_ready(pipe, options)), options, device)


def byte_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that needs no files: every byte is a token, nothing is merged.

    For models with random weights; a checkpoint brings its own.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = (256 + at for at in range(256))
    symbols = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], model_max_length=length)
