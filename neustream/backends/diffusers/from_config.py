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
  graphs: false                  # no CUDA graphs; they are the default on CUDA
  weights_seed: 0
  threads: 1                     # of torch
  request: {guidance_scale: 4.0} # call arguments of every request

The stages of such a config are those that the pipeline has models for, in this order: encode,
denoise (looped, `times: steps`) and decode, called so or by the names in `STAGES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from functools import partial
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

from neustream.backends import Arguments, Wanted
from neustream.backends import torch as shared
from neustream.backends.diffusers.mount import PipelineMount
from neustream.backends.diffusers.partly import keep_only, load_part, moved
from neustream.backends.diffusers.parts import models_of, parts_of, roles_of
from neustream.backends.diffusers.signatures import signature_of
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
BATCHES = {"encode": "encode_batch", "denoise": "max_batch", "decode": "decode_batch"}
"""What a mount calls the most requests in one step, by what that does."""
CPU = torch.device("cpu")
SAMPLE_STEPS = 4
"""Denoising steps of the request that shows a mount the shape of a workload's."""


class Options(BaseModel):
    """The options of the `backend` section."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | Path | None = None
    pipeline: str | None = None
    components: dict[str, Any] = Field(default_factory=dict)
    arguments: dict[str, Any] = Field(default_factory=dict)
    dtype: str = "float32"
    variant: str | None = None
    graphs: bool | None = None
    weights_seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    threads: int | None = Field(default=None, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)


class ConfigPipeline(shared.TorchModel):
    """The pipeline of a config.

    Its workload's requests have `steps`, `seed` and arguments of the pipeline's call as parameters.
    """

    def __init__(self, pipe: DiffusionPipeline, options: Options, place: torch.device) -> None:
        super().__init__(pipe, [model for _, model in models_of(pipe)], options.dtype, place)
        self.pipe = pipe
        self._request, self._graphs = options.request, options.graphs

    def mount(self, wanted: Wanted) -> PipelineMount:
        """The pipeline with the config's batch sizes, and its profiles for calls of all sizes."""
        stages = self._stages(wanted)
        batches: dict[str, Any] = {
            BATCHES[role]: wanted.graph.stages[stage].max_batch for role, stage in stages.items()
        }
        profiles, samples = None, list[Mapping[str, Any]]()
        if wanted.profiles is not None:
            profiles = {role: wanted.profiles[stage] for role, stage in stages.items()}
            samples = [self.arguments({**self.params(0), "steps": SAMPLE_STEPS})[1]]
        return PipelineMount(
            self.pipe,
            profiles=profiles,
            samples=samples,
            graphs=self._graphs,
            check_finite=wanted.check_finite,
            measure_s=0.0,
            progress=False,
            **batches,
        )

    def _stages(self, wanted: Wanted) -> dict[str, str]:
        """The config's stages by what they do; BackendError unless the pipeline has just these."""
        kind, offered = type(self.pipe).__name__, roles_of(parts_of(self.pipe))
        ways = ", ".join(offered)
        found: dict[str, str] = {}
        for stage in wanted.graph.stages:
            name = stage.removeprefix(wanted.prefix)
            role = _role_of(name, stage in wanted.graph.looped)
            if role not in offered:
                raise BackendError(f"stage {name!r}: {kind} has nothing to {role}; it goes through {ways}")
            if role in found:
                other = found[role].removeprefix(wanted.prefix)
                raise BackendError(f"stages {other!r} and {name!r}: {kind} has one stage to {role}")
            found[role] = stage
        for role in offered:
            if role not in found:
                names = ", ".join(name for name, means in STAGES.items() if means == role)
                raise BackendError(f"{kind} goes through {ways}, and no stage is there to {role}: {names}")
        return found

    def stage_of(self, wanted: Wanted, name: str, stage: str) -> str | None:
        called = {STAGES[known.removeprefix(wanted.prefix)]: known for known in wanted.graph.stages}
        return called.get(stage.removeprefix(f"{name}/").partition("@")[0])

    def served_as(self, wanted: Wanted, name: str, stage: str) -> str:
        role = STAGES[stage.removeprefix(wanted.prefix)]
        return f"{name}/{role}" if name else role

    def params(self, at: int) -> dict[str, Any]:
        draw = np.random.RandomState(at)
        own: dict[str, Any] = {"seed": int(draw.randint(2**31 - 1))}
        accepted = call_names(self.pipe)
        if "class_labels" in accepted:
            own["class_labels"] = [int(draw.randint(self.pipe.transformer.config.num_embeds_ada_norm))]
        elif "prompt" in accepted:
            own["prompt"] = PROMPTS[int(draw.randint(len(PROMPTS)))]
        if "image" in accepted and "image" not in self._request:
            side = next(model.config.sample_size for _, model in models_of(self.pipe))
            own["image"] = Image.fromarray(draw.randint(256, size=(side, side, 3)).astype(np.uint8))
        return {**own, **self._request}

    def arguments(self, params: Mapping[str, Any], ends_after: int | None = None) -> Arguments:
        """The arguments of the pipeline's call that a request's parameters mean."""
        named = {name: value for name, value in params.items() if name not in ("steps", "seed")}
        generator = torch.Generator("cpu").manual_seed(params["seed"])
        return (), {**named, "num_inference_steps": params["steps"], "generator": generator}

    def check(self, params: Mapping[str, Any]) -> None:
        """Of a request, what is not the mount's business: its seed, and names that the call has."""
        seed = params.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise BackendError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        known = call_names(self.pipe)
        for name in self.arguments(params)[1]:
            if name not in known:
                raise BackendError(f"unknown request parameter {name!r}; {nearest(name, known)}")

    def image(self, value: Any) -> Any:
        images = getattr(value, "images", None)
        return images[0] if images else None


def _role_of(name: str, looped: bool) -> str:
    """What a stage of a config does, by its name; BackendError if pipelines have no such stage."""
    role = STAGES.get(name)
    if role is None:
        raise BackendError(f"stage {name!r}: a pipeline has no such stage; {nearest(name, STAGES)}")
    if role == "denoise" and not looped:
        raise BackendError(f"stage {name!r} denoises step by step: give it times: steps")
    if role != "denoise" and looped:
        raise BackendError(f"stage {name!r} runs once: give it no times")
    return role


def make(raw: Mapping[str, Any], device: str, stages: Collection[str] | None = None) -> ConfigPipeline:
    """The backend `diffusers`: a pipeline on `device`, as `raw` describes it; `stages`: those of the config that it is
    for, whose weights it has; None: all.
    """
    options = options_of(Options, raw)
    place = shared.device_of(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    roles = None if stages is None else {STAGES[stage] for stage in stages if stage in STAGES}
    return ConfigPipeline(moved(build(options, place, roles), place), options, place)


def build(options: Options, place: torch.device = CPU, roles: Collection[str] | None = None) -> Any:
    """The pipeline that `options` describe; random weights are made on `place`, those of a checkpoint on the CPU.

    `roles`: what of it is to be there: "encode", "denoise", "decode"; None: all. Random weights are made
    of all parts, so that they are the same whatever is kept of them.
    """
    dtype = shared.dtype_of(options.dtype)
    if options.checkpoint is not None:
        pipe = _load(options, dtype, roles)
        if scheduler := options.components.get("scheduler"):
            pipe.scheduler = _component("scheduler", scheduler, CPU)
    elif options.pipeline is None:
        raise BackendError("backend: give a checkpoint, or pipeline and components")
    else:
        torch.manual_seed(options.weights_seed)
        pipe = _build(
            "pipeline", _pipeline_class(options.pipeline), {**_components(options, place), **options.arguments}
        )
    pipe.set_progress_bar_config(disable=True)
    for _, model in models_of(pipe):
        model.eval().requires_grad_(False)
    if roles is not None:
        pipe = keep_only(pipe, roles)
    return pipe if pipe.dtype == dtype else pipe.to(dtype)


def call_names(pipe: DiffusionPipeline) -> Mapping[str, Any]:
    """The arguments of a pipeline's call, by name."""
    return dict(signature_of(pipe).signature.parameters)


def own_size(pipe: Any) -> str:
    """The size that a pipeline makes images of by itself: 512x512."""
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        sides = [getattr(model.config, "sample_size", None) for _, model in models_of(pipe)]
        side = next((each for each in sides if isinstance(each, int)), 64)
    pixels = side * getattr(pipe, "vae_scale_factor", 8)
    return f"{pixels}x{pixels}"


def _load(options: Options, dtype: torch.dtype, roles: Collection[str] | None) -> Any:
    cls = _pipeline_class(options.pipeline) if options.pipeline else DiffusionPipeline
    path = str(options.checkpoint)
    single = Path(path).suffix in (".safetensors", ".ckpt")
    if single and options.pipeline is None:
        raise BackendError(f"backend.checkpoint {path!r} is a single file: name the class in backend.pipeline")
    load = cls.from_single_file if single else cls.from_pretrained
    variant = {"variant": options.variant} if options.variant else {}
    if roles is not None and not single:
        load = partial(load_part, stages=roles, pipeline=cls)
    try:
        return load(path, torch_dtype=dtype, local_files_only=True, **variant)
    except (OSError, ValueError) as error:
        raise BackendError(f"backend.checkpoint {path!r}: {error}") from error


def _pipeline_class(name: str) -> Any:
    found = load_object(name, "pipeline") if ":" in name else getattr(diffusers, name, None)
    if found is None:
        raise BackendError(f"backend.pipeline: diffusers has no pipeline {name!r}")
    return found


def _components(options: Options, place: torch.device) -> dict[str, Any]:
    """The parts of a pipeline; text encoders get the size of their tokenizer's vocabulary."""
    wanted, made = dict(options.components), dict[str, Any]()
    for name in sorted(wanted, key=lambda name: not name.startswith("tokenizer")):
        part = wanted[name]
        tokenizer = made.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and isinstance(part, dict) and tokenizer is not None:
            part = {**_vocabulary(tokenizer), **part}
        made[name] = _component(name, part, place)
    return made


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


def _component(name: str, part: Any, place: torch.device) -> Any:
    if part is None:
        return None
    if part in ("bytes", "letters"):
        return byte_tokenizer() if part == "bytes" else letter_tokenizer()
    if not isinstance(part, dict) or "class" not in part:
        raise BackendError(f"backend.components.{name}: give its class and arguments, bytes, letters or null")
    arguments = {key: value for key, value in part.items() if key != "class"}
    kind = part["class"]
    if (cls := getattr(diffusers, kind, None)) is not None:
        with place if issubclass(cls, torch.nn.Module) else contextlib.nullcontext():  # schedulers count on the CPU
            return _build(f"components.{name}", cls, arguments)
    if (cls := getattr(transformers, kind, None)) is None:
        raise BackendError(f"backend.components.{name}: neither diffusers nor transformers has a class {kind!r}")
    config = _build(f"components.{name}", cls.config_class, arguments)
    with place:
        return cls(config)


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
