"""Language models from a config's `backend` section: from a checkpoint, or real architectures with random weights.

backend:
  kind: transformers
  checkpoint: path               # a folder saved by transformers; or random weights:
  model_type: opt                # a model type of transformers
  config: {hidden_size: 64, ...} # its config's arguments
  attention: sdpa                # or eager
  dtype: float32
  weights_seed: 0
  slots: 64                      # requests that can hold keys and values at once
  max_len: 512                   # tokens of one request; default: the model's positions
  prepack: true                  # linear layers in oneDNN's own layout, on a CPU
  graphs: true                   # decodes as CUDA graphs
  threads: 1                     # of torch
  request: {temperature: 0.8}    # sampling of every request

Prompts are random tokens, as many as the workload says; where it says `images`, those of a random image are
among them. Each generation ends where the workload says, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerFast

from neustream.backends import Arguments, Texts, Wanted
from neustream.backends import torch as shared
from neustream.backends.options import options_of
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.mount import NODE, TextMount
from neustream.backends.transformers.processors import class_of, processor_for, processor_in, with_image
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.sighted import measured_see
from neustream.backends.values import whole
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile, StepLatency
from neustream.errors import BackendError, RequestError, nearest
from neustream.profiling.files import Measurement
from neustream.profiling.steps import StepsFile

ASKED = inspect.signature(TextMount.request).parameters
SAMPLING = [
    field.name
    for field in fields(Sampling)
    if field.name in ASKED and field.name not in ("seed", "ignore_eos", "min_tokens")
]


OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")
"""Arguments that any config takes beside its own, by names of before."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Sizes that any model has, as its config's `attribute_map` names them."""
NO_SIZE = ("_id", "_idx", "_index")
"""How names of whole numbers end that are none."""


class Options(BaseModel):
    """The options of the `backend` section."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | Path | None = None
    model_type: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    attention: Literal["sdpa", "eager"] = "sdpa"
    dtype: str = "float32"
    weights_seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    slots: int = Field(default=64, ge=1)
    max_len: int | None = Field(default=None, ge=2)
    prepack: bool | None = None
    graphs: bool | None = None
    threads: int | None = Field(default=None, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)


class ConfigText(shared.TorchModel):
    """The language model of a config.

    Its workload's requests have `prompt_tokens`, `max_tokens` and `seed` as parameters.
    """

    def __init__(self, model: Any, options: Options, place: torch.device) -> None:
        super().__init__(model, [model], options.dtype, place)
        self.model = model
        self._options = options
        self._sampling = _sampling(options.request)
        self._eyes: Any = None
        self._made: tuple[Wanted, TextMount] | None = None

    def _processor(self) -> Any:
        """For prompts with images: the checkpoint's; around a tokenizer of bytes for a model made from a config."""
        if self._eyes is None:
            if self._options.checkpoint is not None:
                self._eyes = processor_in(Path(self._options.checkpoint), self.model)
            else:
                self._eyes = processor_for(self.model, byte_tokenizer())
        return self._eyes

    def see(self, max_batch: int) -> list[Measurement]:
        model = LanguageModel(self.model, slots=1, max_len=self._options.max_len, graphs=False)
        return measured_see(model, self._processor(), max_batch)

    def mount(self, wanted: Wanted) -> TextMount:
        """The same one each time for the same wishes: what it learns begins anew when it is opened, its proof stays."""
        if self._made is None or self._made[0] is not wanted:
            self._made = wanted, self._new_mount(wanted)
        return self._made[1]

    def _new_mount(self, wanted: Wanted) -> TextMount:
        decode = wanted.graph.stages[f"{wanted.prefix}llm.decode"]
        see = f"{wanted.prefix}llm.see"
        return TextMount(
            self.model,
            self._processor() if see in wanted.graph.stages else None,
            see_profile=None if wanted.profiles is None else wanted.profiles.get(see),
            profile=None if wanted.profiles is None else _steps(wanted.profiles[decode.name]),
            slots=self._options.slots,
            max_batch=decode.max_batch,
            max_len=self._options.max_len,
            prepack=self._options.prepack,
            graphs=self._options.graphs,
            kv_cache=next(iter(wanted.kv_caches.values()), None),
            step_tokens=wanted.step_tokens,
            progress=False,
        )

    def stage_of(self, wanted: Wanted, name: str, stage: str) -> str | None:
        node = name or NODE
        own = stage == node or stage.startswith(f"{node}.")
        return f"{wanted.prefix}llm{stage.removeprefix(node)}" if own else None

    def served_as(self, wanted: Wanted, name: str, stage: str) -> str:
        return f"{name or NODE}{stage.removeprefix(f'{wanted.prefix}llm')}"

    def params(self, at: int) -> dict[str, Any]:
        return {"seed": at}

    def arguments(self, params: Mapping[str, Any], ends_after: int | None = None) -> Arguments:
        """A prompt of random tokens, behind a random image where it has one, drawn with the request's seed."""
        draw = np.random.default_rng(params["seed"])
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        tokens = draw.integers(vocabulary, size=params["prompt_tokens"]).tolist()
        return (), {
            "prompt": with_image(self._processor(), tokens, draw) if params.get("images") else tokens,
            "max_tokens": params["max_tokens"],
            "seed": params["seed"],
            "ends_after": ends_after,
            **self._sampling,
        }

    def texts(self) -> Texts:
        options = self._options
        way = LanguageModel(self.model, slots=options.slots, max_len=options.max_len, graphs=False).way
        return Texts(way.batched, not way.why, way.why)

    def steps(self, seconds: float, tick: Callable[[str, int, float], None]) -> StepsFile:
        options = self._options
        mount = TextMount(
            self.model,
            slots=options.slots,
            max_len=options.max_len,
            prepack=options.prepack,
            graphs=options.graphs,
        )
        return mount.steps(seconds, tick)


def _steps(profile: LatencyProfile) -> StepLatency:
    """The step profile that a stage's is a part of."""
    assert isinstance(profile, PhaseProfile)
    return profile.steps


def make(raw: Mapping[str, Any], device: str) -> ConfigText:
    """The backend `transformers`: a language model on `device`, as `raw` describes it."""
    options = options_of(Options, raw)
    place = shared.device_of(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return ConfigText(build(options, place), options, place)


def build(options: Options, place: torch.device) -> Any:
    """The model that `options` describe, in eval mode on `place`."""
    dtype = shared.dtype_of(options.dtype)
    if (options.checkpoint is None) == (options.model_type is None):
        raise BackendError("backend: give either a checkpoint, or model_type and config")
    how: dict[str, Any] = {"attn_implementation": options.attention, "dtype": dtype}
    if options.checkpoint is not None:
        if options.config:
            raise BackendError("backend.config: a checkpoint brings its own")
        if not Path(options.checkpoint).is_dir():
            raise BackendError(f"backend.checkpoint {str(options.checkpoint)!r} is no folder")
        try:
            made = class_of(AutoConfig.from_pretrained(options.checkpoint, local_files_only=True))
            model = made.from_pretrained(options.checkpoint, local_files_only=True, **how)
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(f"backend.checkpoint {str(options.checkpoint)!r}: {error}") from error
    else:
        _check_config(str(options.model_type), options.config)
        try:
            config = AutoConfig.for_model(options.model_type, **options.config)
            torch.manual_seed(options.weights_seed)
            with place:  # a large model's random weights are made where it runs
                model = class_of(config).from_config(config, **how)
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise BackendError(f"backend.model_type {options.model_type!r}: {type(error).__name__}: {error}") from error
    model.eval().requires_grad_(False)
    return model.to(place)


def _check_config(kind: str, given: Mapping[str, Any]) -> None:
    """BackendError for a model type that is none, and for what is no argument of its config: that would keep it."""
    if kind not in CONFIG_MAPPING:
        raise BackendError(f"backend.model_type {kind!r} is no model type; {nearest(kind, CONFIG_MAPPING)}")
    made = CONFIG_MAPPING[kind]
    allowed = {*OLDER, *made.attribute_map, *inspect.signature(made).parameters} - {"kwargs"}
    if unknown := sorted(set(given) - allowed):
        raise BackendError(f"backend.config: {made.__name__} has no {unknown[0]!r}; {nearest(unknown[0], allowed)}")
    for key, value in given.items():
        _check_size(made, key, value)


def _check_size(made: Any, key: str, value: Any) -> None:
    """BackendError for a size that is none: those of any model are 1 or more, no other is below 0."""
    own = made.attribute_map.get(key, key)
    known = inspect.signature(made).parameters.get(own)
    if known is None or type(known.default) is not int or known.default < 1 or key.endswith(NO_SIZE):
        return
    if own in {made.attribute_map.get(size, size) for size in SIZES}:
        whole(f"backend.config.{key}", value, 1, error=BackendError)
    elif isinstance(value, int):  # others may be lists, fractions or none too
        whole(f"backend.config.{key}", int(value), 0, error=BackendError)


def _sampling(request: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are chosen, checked; each generation ends where the workload says."""
    if unknown := sorted(set(request) - set(SAMPLING)):
        raise BackendError(f"backend.request: unknown {unknown[0]!r}; {nearest(unknown[0], SAMPLING)}")
    try:
        Sampling(**request)
    except RequestError as error:
        raise BackendError(f"backend.request: {error}") from None
    return {**request, "ignore_eos": True}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files: every byte of UTF-8 is a token (0 to 255), and 256 is `</s>`.

    For models with random weights; a checkpoint brings its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = (256 + at for at in range(256))
    symbols = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)
