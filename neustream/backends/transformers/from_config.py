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
  threads: 1                     # of torch
  request: {temperature: 0.8}    # sampling of every request

Prompts are random tokens, as many as the workload says; each generation ends where the workload says, and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from neustream.backends import torch as shared
from neustream.backends.copies import twin
from neustream.backends.options import options_of
from neustream.backends.transformers.measured import cells_of, file_of, measure_steps
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Texts, modules_of
from neustream.backends.transformers.request import check_length
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.text import Ask
from neustream.core.batch import StepInput
from neustream.errors import BackendError, RequestError, nearest
from neustream.profiling.steps import StepsFile

SAMPLING = [field.name for field in fields(Sampling) if field.name not in ("seed", "ignore_eos")]


class Options(BaseModel):
    """The options of the `backend` section."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | Path | None = None
    model_type: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    attention: Literal["sdpa", "eager"] = "sdpa"
    dtype: str = "float32"
    weights_seed: int = 0
    slots: int = Field(default=64, ge=1)
    max_len: int | None = Field(default=None, ge=2)
    threads: int | None = Field(default=None, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)


class Served:
    """A language model as the command line uses it (see `neustream.backends.ModelBackend`).

    Its jobs have `prompt_tokens`, `max_tokens` and `seed` as parameters. `lengths`, by request, are the
    outputs after which generations end: a workload has them, random weights know no end.
    """

    out_of_memory = shared.OUT_OF_MEMORY

    def __init__(self, model: LanguageModel, options: Options) -> None:
        self.model = model
        self.lengths: Mapping[str, int] = {}
        self._options = options
        self._sampling = _sampling(options.request)
        self.texts = Texts(model, self.ask, name="llm")
        self.modules = modules_of(self.texts)
        weights = sum(weight.numel() for weight in model.model.parameters())
        self.model_name = f"{model.name}, {weights / 1e6:.1f} M parameters"
        self.device_name = model.place
        self.dtype = options.dtype

    def replica(self) -> Served:
        """The same weights, with KV slots of its own."""
        model = LanguageModel(twin(self.model.model), slots=self.model.slots, max_len=self.model.max_len)
        return Served(model, self._options)

    def ask(self, given: StepInput) -> Ask:
        seed = given.params["seed"]
        draw = np.random.default_rng(seed)
        prompt = draw.integers(self.model.vocabulary, size=given.params["prompt_tokens"]).tolist()
        return Ask(prompt, replace(self._sampling, seed=seed), self.lengths.get(given.id))

    def params(self, at: int) -> dict[str, Any]:
        return {"seed": at}

    def check(self, params: Mapping[str, Any]) -> None:
        try:
            check_length(self.model, params["prompt_tokens"], params["max_tokens"])
        except RequestError as error:
            raise BackendError(str(error)) from None

    def sync(self) -> None:
        shared.sync(self.model.device)

    def image(self, output: Mapping[str, Any]) -> Any:
        return None

    def warm_up(self) -> None:
        """Run steps of all kinds, untimed."""
        cells = cells_of(self.model.slots, self.model.max_len)
        measure_steps(self.model, seconds=0.0, cells=[cells[0], cells[-1], *cells[1 : -1 : max(1, len(cells) // 8)]])

    def steps(
        self,
        seconds: float = 60.0,
        tick: Callable[[str, int, float], None] = lambda stage, batch, seconds: None,
    ) -> StepsFile:
        """Measure how long its steps take, in about `seconds`; not while it serves."""
        return file_of(self.model, measure_steps(self.model, seconds=seconds, tick=tick), "neustream profile")


def make(raw: Mapping[str, Any], device: str) -> Served:
    """The backend `transformers`: a language model on `device`, as `raw` describes it."""
    options = options_of(Options, raw)
    place = shared.device_of(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = build(options, place)
    return Served(LanguageModel(model, slots=options.slots, max_len=options.max_len), options)


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
            model = AutoModelForCausalLM.from_pretrained(options.checkpoint, local_files_only=True, **how)
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(f"backend.checkpoint {str(options.checkpoint)!r}: {error}") from error
    else:
        try:
            config = AutoConfig.for_model(options.model_type, **options.config)
            torch.manual_seed(options.weights_seed)
            with place:  # a large model's random weights are made where it runs
                model = AutoModelForCausalLM.from_config(config, **how)
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise BackendError(f"backend.model_type {options.model_type!r}: {type(error).__name__}: {error}") from error
    model.eval().requires_grad_(False)
    return model.to(place)


def _sampling(request: Mapping[str, Any]) -> Sampling:
    if unknown := sorted(set(request) - set(SAMPLING)):
        raise BackendError(f"backend.request: unknown {unknown[0]!r}; {nearest(unknown[0], SAMPLING)}")
    try:
        return Sampling(**request, ignore_eos=True)
    except RequestError as error:
        raise BackendError(f"backend.request: {error}") from None


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
