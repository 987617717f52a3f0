"""A tiny DiT and a tiny Stable Diffusion as configs, and how tests serve and call them."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

    from places import DEVICE

    from neustream.backends.diffusers import from_config

import neustream as ns  # noqa: E402

VAE = {
    "class": "AutoencoderKL",
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 16,
}
DIT = {
    "transformer": {
        "class": "DiTTransformer2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    },
    "vae": VAE,
    "scheduler": {"class": "DDIMScheduler", "clip_sample": False},
}
SD = {
    "unet": {
        "class": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": VAE,
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
}
DIT_SHAPE, SD_SHAPE = "4x8x8", "4x8x8"


def small_dit():
    return from_config.build(from_config.Options(pipeline="DiTPipeline", components=DIT)).to(DEVICE)


def profiles(*shapes, model="", step_s=0.002):
    return {
        f"{model}{role}@{shape}": ns.TableProfile(role, [1, 64], [step_s, 2 * step_s])
        for shape in shapes
        for role in ("encode", "denoise", "decode")
    }


def serve(pipe, *shapes, **options):
    """An engine with profiles that say nothing true, so that nothing has to be measured."""
    options = {"profiles": profiles(*shapes), "policy": ns.FCFS(drop_hopeless=False), "progress": False, **options}
    return ns.serve(pipe, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(at, steps=4, **more):
    """Arguments of a DiT call."""
    return {
        "class_labels": [at],
        "num_inference_steps": steps,
        "generator": seeded(at),
        "output_type": "pt",
        **more,
    }


def words(at, steps=4, **more):
    """Arguments of a Stable Diffusion call."""
    return {
        "prompt": f"a cat {at}",
        "num_inference_steps": steps,
        "generator": seeded(at),
        "output_type": "pt",
        **more,
    }


def close_to(ours, stock):
    return float((ours - stock).abs().max() / stock.abs().max()) < 1e-5
