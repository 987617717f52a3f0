"""Pipelines from a config's `backend` section: from a checkpoint, or real architectures with random weights.

backend:
  kind: diffusers
  checkpoint: path               # a folder saved by diffusers, or a single .safetensors file; or:
  pipeline: DiTPipeline          # a class of diffusers, or module:Class
  components:                    # its parts by name: the class and its own arguments
    transformer: {class: DiTTransformer2DModel, num_layers: 12, ...}
    text_encoder: {class: CLIPTextModel, hidden_size: 768, ...}   # of transformers: its config's arguments
    tokenizer: bytes             # a CLIP tokenizer without files (letters: a T5 one)
    scheduler: {class: DDIMScheduler, ...}
    safety_checker: null
  arguments: {...}               # further arguments of the pipeline's class
  dtype: float32
  variant: fp16                  # of a checkpoint
  weights_seed: 0
  threads: 1                     # of torch
  request: {guidance_scale: 4.0} # call arguments of every request

The stages of such a config are called encode, denoise and decode, or by the names in `STAGES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from transformers import CLIPTokenizer, T5Tokenizer

from neustream.backends import torch as shared
from neustream.backends.diffusers.parts import models_of
from neustream.backends.diffusers.replica import Replica
from neustream.backends.diffusers.request import StepCounts, check, named_arguments
from neustream.backends.options import options_of
from neustream.by_name import load_object
from neustream.errors import BackendError, nearest

PROMPTS = (
    "a lighthouse in a storm, oil painting",
    "an astronaut tending a greenhouse",
    "a street market at night in the rain",
    "a fox asleep under a red maple",
    "a paper boat on a quiet canal",
    "an old library with floating lamps",
)
"""What workload requests ask for; speed does not depend on the words."""
STAGES = {
    "encode": "encode",
    "clip": "encode",
    "text_encoder": "encode",
    "denoise": "denoise",
    "unet": "denoise",
    "dit": "denoise",
    "transformer": "denoise",
    "decode": "decode",
    "vae": "decode",
}
"""Names that a config's stages may have, and what they do."""


class Options(BaseModel):
    """The options of the `backend` section."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | Path | None = None
    pipeline: str | None = None
    components: dict[str, Any] = Field(default_factory=dict)
    arguments: dict[str, Any] = Field(default_factory=dict)
    dtype: str = "float32"
    variant: str | None = None
    weights_seed: int = 0
    threads: int | None = Field(default=None, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)


class Served:
    """A pipeline as the command line uses it (see `neustream.backends.ModelBackend`).

    Its jobs have `steps`, `seed` and the arguments of the pipeline's call as parameters.
    """

    out_of_memory = shared.OUT_OF_MEMORY

    def __init__(self, pipe: DiffusionPipeline, options: Options) -> None:
        self.pipe = pipe
        self._request = options.request
        self._steps = StepCounts(pipe)
        # whether to check what is finite is for the experiment to say
        self._replica = Replica(pipe, arguments=self.arguments, check_finite=False)
        self._replica.roles.update(STAGES)
        self.modules = dict.fromkeys(STAGES, self._replica.module)
        weights = sum(weight.numel() for _, model in models_of(pipe) for weight in model.parameters())
        self.model_name = f"{type(pipe).__name__}, {weights / 1e6:.1f} M parameters"
        self.device_name = self._replica.place
        self.dtype = options.dtype

    def arguments(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call that a request's parameters mean."""
        named = {name: value for name, value in params.items() if name not in ("steps", "seed")}
        generator = torch.Generator("cpu").manual_seed(params["seed"])
        return {**named, "num_inference_steps": params["steps"], "generator": generator}

    def params(self, at: int) -> dict[str, Any]:
        draw = np.random.RandomState(at)
        own: dict[str, Any] = {"seed": int(draw.randint(2**31 - 1))}
        accepted = inspect.signature(self.pipe.__call__).parameters
        if "class_labels" in accepted:
            own["class_labels"] = [int(draw.randint(self.pipe.transformer.config.num_embeds_ada_norm))]
        elif "prompt" in accepted:
            own["prompt"] = PROMPTS[int(draw.randint(len(PROMPTS)))]
        if "image" in accepted and "image" not in self._request:
            side = next(model.config.sample_size for _, model in models_of(self.pipe))
            own["image"] = Image.fromarray(draw.randint(256, size=(side, side, 3)).astype(np.uint8))
        return {**own, **self._request}

    def check(self, params: Mapping[str, Any]) -> None:
        seed = params.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise BackendError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        arguments = self.arguments(params)
        known = inspect.signature(self.pipe.__call__).parameters
        if unknown := [name for name in arguments if name not in known]:
            raise BackendError(f"unknown request parameter {unknown[0]!r}; {nearest(unknown[0], known)}")
        try:
            named = named_arguments(self.pipe, (), arguments)
            steps = self._steps.of(check(self.pipe, named, self._replica.parts.device))
        except Exception as error:  # whatever the pipeline has against its arguments
            raise BackendError(str(error)) from error
        if steps != params["steps"]:
            raise BackendError(
                f"{type(self.pipe.scheduler).__name__} calls the denoiser {steps} times for {params['steps']} steps, "
                "so a config's loop over `steps` does not fit it; choose another scheduler, or serve the pipeline "
                "from Python"
            )

    def sync(self) -> None:
        shared.sync(self._replica.parts.device)

    def image(self, output: Mapping[str, Any]) -> Any:
        images = getattr(output.get("output"), "images", None)
        return images[0] if images else None


def make(raw: Mapping[str, Any], device: str) -> Served:
    """The backend `diffusers`: a pipeline on `device`, as `raw` describes it."""
    options = options_of(Options, raw)
    place = shared.device_of(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Served(build(options).to(place), options)


def build(options: Options) -> Any:
    """The pipeline that `options` describe, on the CPU."""
    dtype = shared.dtype_of(options.dtype)
    if options.checkpoint is not None:
        pipe = _load(options, dtype)
        if scheduler := options.components.get("scheduler"):
            pipe.scheduler = _component("scheduler", scheduler)
    elif options.pipeline is None:
        raise BackendError("backend: give a checkpoint, or pipeline and components")
    else:
        torch.manual_seed(options.weights_seed)
        pipe = _build("pipeline", _pipeline_class(options.pipeline), {**_components(options), **options.arguments})
    pipe.set_progress_bar_config(disable=True)
    for _, model in models_of(pipe):
        model.eval().requires_grad_(False)
    return pipe if pipe.dtype == dtype else pipe.to(dtype)


def call_names(pipe: DiffusionPipeline) -> Mapping[str, Any]:
    """The arguments of a pipeline's call, by name."""
    return dict(inspect.signature(pipe.__call__).parameters)


def own_size(pipe: Any) -> str:
    """The size that a pipeline makes images of by itself: 512x512."""
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        sides = [getattr(model.config, "sample_size", None) for _, model in models_of(pipe)]
        side = next((each for each in sides if isinstance(each, int)), 64)
    pixels = side * getattr(pipe, "vae_scale_factor", 8)
    return f"{pixels}x{pixels}"


def _load(options: Options, dtype: torch.dtype) -> Any:
    cls = _pipeline_class(options.pipeline) if options.pipeline else DiffusionPipeline
    path = str(options.checkpoint)
    single = Path(path).suffix in (".safetensors", ".ckpt")
    if single and options.pipeline is None:
        raise BackendError(f"backend.checkpoint {path!r} is a single file: name the class in backend.pipeline")
    load = cls.from_single_file if single else cls.from_pretrained
    variant = {"variant": options.variant} if options.variant else {}
    try:
        return load(path, torch_dtype=dtype, local_files_only=True, **variant)
    except (OSError, ValueError) as error:
        raise BackendError(f"backend.checkpoint {path!r}: {error}") from error


def _pipeline_class(name: str) -> Any:
    found = load_object(name, "pipeline") if ":" in name else getattr(diffusers, name, None)
    if found is None:
        raise BackendError(f"backend.pipeline: diffusers has no pipeline {name!r}")
    return found


def _components(options: Options) -> dict[str, Any]:
    """The parts of a pipeline; text encoders get the size of their tokenizer's vocabulary."""
    wanted, made = dict(options.components), dict[str, Any]()
    for name in sorted(wanted, key=lambda name: not name.startswith("tokenizer")):
        part = wanted[name]
        tokenizer = made.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and isinstance(part, dict) and tokenizer is not None:
            part = {**_vocabulary(tokenizer), **part}
        made[name] = _component(name, part)
    return made


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


def _component(name: str, part: Any) -> Any:
    if part is None:
        return None
    if part in ("bytes", "letters"):
        return byte_tokenizer() if part == "bytes" else letter_tokenizer()
    if not isinstance(part, dict) or "class" not in part:
        raise BackendError(f"backend.components.{name}: give its class and arguments, bytes, letters or null")
    arguments = {key: value for key, value in part.items() if key != "class"}
    kind = part["class"]
    if (cls := getattr(diffusers, kind, None)) is not None:
        return _build(f"components.{name}", cls, arguments)
    if (cls := getattr(transformers, kind, None)) is None:
        raise BackendError(f"backend.components.{name}: neither diffusers nor transformers has a class {kind!r}")
    return cls(_build(f"components.{name}", cls.config_class, arguments))


def _build(what: str, make: Any, arguments: Any) -> Any:
    try:
        return make(**arguments)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        raise BackendError(f"backend.{what}: {type(error).__name__}: {error}") from error


def byte_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that needs no files: every byte is a token, nothing is merged.

    For models with random weights; a checkpoint brings its own.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = (256 + at for at in range(256))
    symbols = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], model_max_length=length)


def letter_tokenizer(length: int = 64) -> T5Tokenizer:
    """A T5 tokenizer that needs no files: printable ASCII, letter by letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=length)
