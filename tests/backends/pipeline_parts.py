"""Parts of tiny stock pipelines, with random weights: encoders of texts, VAEs, UNets."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from places import DEVICE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d
    import transformers as t

    from neustream.backends.diffusers.from_config import byte_tokenizer

d.utils.logging.set_verbosity_error()
d.utils.logging.disable_progress_bar()
t.utils.logging.set_verbosity_error()

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.18215,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FLOW = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}


def clip(kind: Any = t.CLIPTextModel, **change: Any) -> tuple[Any, Any]:
    """A text encoder and its tokenizer."""
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(t.CLIPTextConfig(**{**TEXT, "projection_dim": 32, **ids, **change})), tokenizer


def t5(kind: Any = t.T5EncoderModel, config: Any = t.T5Config) -> tuple[Any, Any]:
    """A T5 encoder and a tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    tokens = special + [(chr(at), -3.0) for at in range(ord("a"), ord("z") + 1)]
    tokenizer = t.T5Tokenizer(vocab=tokens, extra_ids=0, model_max_length=16)
    return kind(config(vocab_size=len(tokens), **T5)), tokenizer


def vae(**change: Any) -> Any:
    return d.AutoencoderKL(**{**VAE, **change})


def unet_of(**change: Any) -> Any:
    return d.UNet2DConditionModel(**{**UNET, **change})


def ready(pipe: Any, dtype: torch.dtype) -> Any:
    """The pipeline, silent and ready to infer."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe.to(DEVICE, dtype)
