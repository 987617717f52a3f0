"""Tiny configurations of what diffusers' pipelines are made of, by class: autoencoders, and what others share.

Numbers agree across classes: text is 32 wide, latents have 4 channels, autoencoders halve an image once
unless their class cannot. A pipeline that needs others says so in `tiny_recipes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM: Config = {**BETAS, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
FLOW: Config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
HALVED: Config = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
WAN: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
WAN_VAE: Config = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
FLUX: Config = {
    **FLOW,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 1,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
HUNYUAN: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
}
COSMOS: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
}
SANA: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 32,
    "sample_size": 8,
}
LTX: Config = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": 32,
}
TRANSFORMER_2D: Config = {**FLOW, "in_channels": 4, "sample_size": 8, "patch_size": 2}
ZIMAGE: Config = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 32,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}

AUTOENCODERS: dict[str, Config] = {
    "AutoencoderKL": {**HALVED, "latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": 0.0},
    "AutoencoderKLFlux2": {**HALVED, "latent_channels": 4},
    "AutoencoderKLTemporalDecoder": {
        **{name: HALVED[name] for name in ("block_out_channels", "down_block_types", "layers_per_block")},
        "block_out_channels": (32, 64),
        "latent_channels": 4,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderKLWan": {**WAN_VAE, "temperal_downsample": [False, True, True]},
    "AutoencoderKLQwenImage": {**WAN_VAE, "base_dim": 8, "dim_mult": [1, 2, 4], "temperal_downsample": [False, True]},
    "AutoencoderKLQwenImage21": {
        **WAN_VAE,
        "decoder_base_dim": 4,
        "dim_mult": [1, 1, 1, 1, 1],
        "temperal_downsample": [False, True, True, True],
    },
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8, 8),
        "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 16,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8, 8),
        "layers_per_block": 1,
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 16,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4,
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "latents_mean": (0.0,) * 4,
        "latents_std": (1.0,) * 4,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,),
        "resolution": 64,
        "num_layers": 2,
        "patch_size": 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4,
        "block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "down_block_types": ("LTX2VideoDownBlock3D",),
        "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
        "upsample_type": ("spatiotemporal",),
        "patch_size": 1,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 8,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "resolution": 32,
        "latent_channels": 2,
        "mel_bins": 16,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": 6,
        "downsampling_ratios": [1, 2],
        "decoder_channels": 3,
        "decoder_input_channels": 3,
        "channel_multiples": [2, 4],
        "sampling_rate": 4,
    },
    "VQModel": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
    },
    "LTX2Vocoder": {
        "in_channels": 32,
        "hidden_channels": 16,
        "upsample_kernel_sizes": [4, 4],
        "upsample_factors": [2, 2],
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3, 5]],
    },
    "PaellaVQModel": {
        "levels": 2,
        "bottleneck_blocks": 1,
        "embed_dim": 8,
        "num_vq_embeddings": 12,
        "latent_channels": 4,
    },
}
