"""Tiny models with random weights, for a server that needs no file. Real classes, real steps."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "model_type": "opt",
    "config": {
        "vocab_size": 257,
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    },
    "threads": 1,
}
"""A language model of 0.5 M parameters, for the tokenizer "bytes"."""

IMAGE: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline",
    "threads": 1,
    "arguments": {"requires_safety_checker": False},
    "components": {
        "unet": {
            "class": "UNet2DConditionModel",
            "sample_size": 32,
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "vae": {
            "class": "AutoencoderKL",
            "block_out_channels": [16, 32],
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
            "norm_num_groups": 8,
            "latent_channels": 4,
            "sample_size": 64,
        },
        "tokenizer": "bytes",
        "text_encoder": {
            "class": "CLIPTextModel",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "scheduler": {
            "class": "DDIMScheduler",
            "clip_sample": False,
            "steps_offset": 1,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
        },
        "safety_checker": None,
        "feature_extractor": None,
    },
}
"""A Stable Diffusion that makes images of 64 pixels."""
