"""Tiny configurations of UNets, ControlNets, adapters and priors, by class, and of those that few pipelines have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.shap_e.renderer import ShapERenderer
from tiny_parts import Config

UNET: Config = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
UNET_XL: Config = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 64,
}
CONTROL = {name: UNET[name] for name in UNET if name not in ("sample_size", "up_block_types")}
CONTROL |= {"conditioning_embedding_out_channels": (8, 16)}
XL_CONTROL = {name: UNET_XL[name] for name in UNET_XL if name not in ("sample_size", "up_block_types")}
XL_CONTROL |= {"conditioning_embedding_out_channels": (8, 16)}
SIMPLE: Config = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
}
KANDINSKY = {
    **UNET,
    **SIMPLE,
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "image",
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "image_proj",
}
DEEPFLOYD = {
    **UNET,
    **SIMPLE,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "encoder_hid_dim": 32,
}
VIDEO_UNET = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
CASCADE: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "conditioning_dim": 16,
    "block_out_channels": (16, 32),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "timestep_ratio_embedding_dim": 8,
    "clip_text_pooled_in_channels": 32,
    "switch_level": (False,),
}
UPSCALER: Mapping[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "time_cond_proj_dim": 160,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 32,
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "in_channels": 8,
    "mid_block_type": None,
    "only_cross_attention": False,
    "out_channels": 5,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "norm_num_groups": 32,
}
CODES: Mapping[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latent_channels": 8,
    "norm_num_groups": 8,
    "num_vq_embeddings": 32,
    "vq_embed_dim": None,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}
RESNETS: Mapping[str, Any] = {
    "sample_size": 32,
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "in_channels": 6,
    "out_channels": 3,
}
UNCLIP: Mapping[str, Any] = {
    "text_proj": {"clip_embeddings_dim": 32, "time_embed_dim": 64, "cross_attention_dim": 32},
    "decoder": {**DEEPFLOYD, "addition_embed_type": None, "encoder_hid_dim": None, "class_embed_type": "identity"},
    "super_res_first": RESNETS,
    "super_res_last": RESNETS,
    "prior_scheduler": {"variance_type": "fixed_small_log", "prediction_type": "sample", "num_train_timesteps": 1000},
    "decoder_scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"},
    "super_res_scheduler": {"variance_type": "fixed_small_log", "prediction_type": "epsilon"},
}


class FewRays(ShapERenderer):  # type: ignore[misc]
    """Shap-E's renderer with 12 samples a ray in place of 192, which take a minute of a CPU for one picture."""

    def decode_to_image(self, latents: Any, device: Any, size: int = 64, **_: Any) -> Any:
        return super().decode_to_image(latents, device, size, 1024, n_coarse_samples=4, n_fine_samples=8)


SHAP_E: Mapping[str, Any] = {
    "prior": {
        "attention_head_dim": 16,
        "embedding_dim": 16,
        "num_embeddings": 32,
        "embedding_proj_dim": 32,
        "time_embed_dim": 64,
        "clip_embed_dim": 32,
        "additional_embeddings": 0,
        "time_embed_act_fn": "gelu",
        "norm_in_type": "layer",
        "encoder_hid_proj_type": None,
        "added_emb_type": None,
    },
    "shap_e_renderer": lambda: FewRays(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    ),
    "scheduler": {"prediction_type": "sample", "use_karras_sigmas": True, "clip_sample": True},
}
XS: Mapping[str, Any] = {
    "class": "ControlNetXSAdapter",
    "conditioning_embedding_out_channels": (8, 8),
    "num_attention_heads": 2,
    "block_out_channels": (8, 16),
    "base_block_out_channels": (16, 32),
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "sample_size": 8,
    "max_norm_num_groups": 4,
}
UNION = {**XL_CONTROL, "class": "ControlNetUnionModel", "num_trans_channel": 16, "num_trans_head": 2}
UNION |= {"num_trans_layer": 1, "num_proj_channel": 16}

UNETS: dict[str, Config] = {
    "UNet2DConditionModel": UNET,
    "ControlNetModel": CONTROL,
    "ControlNetUnionModel": XL_CONTROL,
    "UNet2DModel": {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet1DModel": {
        "sample_size": 32,
        "sample_rate": 32,
        "extra_in_channels": 64,
        "block_out_channels": (32, 32, 64),
        "use_timestep_embedding": False,
    },
    "UNet3DConditionModel": VIDEO_UNET,
    "I2VGenXLUNet": {**VIDEO_UNET, "num_attention_heads": None},
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": 32,
        "num_attention_heads": 2,
        "projection_class_embeddings_input_dim": 24,
        "addition_time_embed_dim": 8,
        "num_frames": 2,
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 4,
        "groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 3,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 4,
        "encoder_hid_dim": 32,
    },
    "MotionAdapter": {
        "block_out_channels": (16, 32),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 2,
    },
    "SparseControlNetModel": {
        **CONTROL,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "conditioning_embedding_out_channels": (16, 32),
        "motion_num_attention_heads": 2,
    },
    "T2IAdapter": {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 2},
    "StableCascadeUNet": CASCADE,
    "WuerstchenPrior": {"c_in": 2, "c": 8, "depth": 2, "c_cond": 32, "c_r": 8, "nhead": 2},
    "WuerstchenDiffNeXt": {
        "c_cond": 32,
        "c_hidden": [320],
        "nhead": [-1],
        "blocks": [4],
        "level_config": ["CT"],
        "clip_embd": 32,
        "inject_effnet": [False],
    },
    "UVit2DModel": {
        "hidden_size": 8,
        "cond_embed_dim": 32,
        "micro_cond_encode_dim": 2,
        "micro_cond_embed_dim": 10,
        "encoder_hidden_size": 32,
        "vocab_size": 32,
        "codebook_size": 32,
        "in_channels": 8,
        "block_out_channels": 8,
        "num_res_blocks": 1,
        "downsample": True,
        "upsample": True,
        "block_num_heads": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    },
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": 32, "num_layers": 1},
}
