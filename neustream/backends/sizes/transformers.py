"""The size of a language model of transformers, and of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from neustream.backends import torch as shared
from neustream.backends.options import options_of
from neustream.backends.sizes import Part, Sizes
from neustream.backends.transformers.from_config import Options
from neustream.backends.transformers.processors import class_of
from neustream.errors import BackendError


def sizes_of(raw: Mapping[str, Any]) -> Sizes:
    """The network of the model that a `backend` section describes."""
    options = options_of(Options, raw)
    dtype = shared.dtype_of(options.dtype)
    if (options.checkpoint is None) == (options.model_type is None):
        raise BackendError("backend: give either a checkpoint, or model_type and config")
    if options.checkpoint is not None:
        config = AutoConfig.from_pretrained(options.checkpoint, local_files_only=True)
    else:
        config = AutoConfig.for_model(options.model_type, **options.config)
    with torch.device("meta"):
        network = class_of(config).from_config(config, dtype=dtype)
    kind = type(network).__name__
    count = sum(weight.numel() for weight in network.parameters())
    part = Part("model", kind, count, count * dtype.itemsize)
    numbers = _kv_values(config)
    return Sizes(kind, options.dtype, [part], None if numbers is None else numbers * dtype.itemsize)


def _kv_values(config: Any) -> int | None:
    """Numbers in the keys and values of one token, all layers together; None: no layer attends."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    layers = _attending(text)
    if heads is None or layers == 0:
        return None
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * layers * groups * width)


def _attending(text: Any) -> int:
    """How many layers keep keys and values; others keep a state, whose size does not grow."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:
        return int(text.num_hidden_layers)
    return sum("attention" in kind and kind != "linear_attention" for kind in kinds)
