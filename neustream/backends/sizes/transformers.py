"""The size of a causal language model of transformers, and of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from neustream.backends import torch as shared
from neustream.backends.options import options_of
from neustream.backends.sizes import Part, Sizes
from neustream.backends.transformers.from_config import Options
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
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kind = type(network).__name__
    count = sum(weight.numel() for weight in network.parameters())
    part = Part("model", kind, count, count * dtype.itemsize)
    return Sizes(kind, options.dtype, [part], _kv_values(config) * dtype.itemsize)


def _kv_values(config: Any) -> int:
    """Numbers in the keys and values of one token, all layers together."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    numbers: int = 2 * text.num_hidden_layers * groups * width
    return numbers
