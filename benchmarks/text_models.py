"""The models of `text.py`, with random weights that are made where they run."""

from __future__ import annotations

from typing import Any

import torch
import transformers

LENGTH = 512
"""Tokens of a context."""


def sizes_of(layers: int, width: int, vocabulary: int) -> dict[str, int]:
    """What the config of a Llama says of its sizes."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": LENGTH,
    }


def opt_of(layers: int, width: int, heads: int) -> dict[str, int]:
    """What the config of an OPT says of its sizes."""
    return {
        "vocab_size": 50272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


SMOLLM: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
"""Those of SmolLM-135M."""
LLAMA8: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
}
"""Those of Llama 3 8B."""
SMALL: dict[str, dict[str, Any]] = {
    "tiny": sizes_of(2, 128, 1024),
    "small": sizes_of(8, 512, 8192),
    "base": sizes_of(10, 768, 32000),
    "smollm-135m": SMOLLM,
}
"""Llamas of 0.7, 38, 119 and 135 million weights: those that are measured if none are named."""
OPT: dict[str, dict[str, Any]] = {
    "opt-125m": opt_of(12, 768, 12),
    "opt-1.3b": opt_of(24, 2048, 32),
    "opt-6.7b": opt_of(32, 4096, 32),
    "opt-13b": opt_of(40, 5120, 40),
}
MODELS = {**SMALL, "llama-8b": LLAMA8, **OPT}
PREPACKED = ("small", "base", "smollm-135m")
"""Models with layers that are large enough for that."""


def made(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """A model with random weights, anew each time."""
    torch.manual_seed(0)
    sizes = MODELS[name]
    if name in OPT:
        config: Any = transformers.OPTConfig(**sizes, dtype=dtype)
    else:
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=name != "llama-8b", dtype=dtype)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    if name in SMALL:
        for weight in model.parameters():
            weight.mul_(2 if weight.dim() > 1 else 1)  # for tokens to vary
    return model
