"""Tiny stock pipelines of families that the library knows by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pipeline_parts import BETAS, DDIM, FLOW, T5, UNET, clip, t5, unet_of, vae

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d
    import transformers as t


def _stable_diffusion(make: Any, scheduler: Any = None, **parts: Any) -> Any:
    text_encoder, tokenizer = clip()
    parts = {"vae": vae(), "unet": unet_of(), **parts}
    return make(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=d.DDIMScheduler(**DDIM) if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def stable_diffusion(scheduler: Any = None, unet: Mapping[str, Any] = {}) -> Any:
    return _stable_diffusion(d.StableDiffusionPipeline, scheduler, unet=unet_of(**unet))


def stable_diffusion_img2img() -> Any:
    return _stable_diffusion(d.StableDiffusionImg2ImgPipeline, d.PNDMScheduler(**BETAS, skip_prk_steps=True))


def stable_diffusion_inpaint() -> Any:
    return _stable_diffusion(d.StableDiffusionInpaintPipeline, unet=unet_of(in_channels=9))


def controlnet() -> Any:
    names = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
    names += ("attention_head_dim", "norm_num_groups")
    config = {name: UNET[name] for name in names}
    made = d.ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16))
    for name, weight in made.named_parameters():  # its outputs are zero at first
        if "controlnet_" in name or "conv_out" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return _stable_diffusion(d.StableDiffusionControlNetPipeline, controlnet=made)


def stable_diffusion_xl() -> Any:
    one, tokenizer = clip()
    two, tokenizer_2 = clip(t.CLIPTextModelWithProjection)
    denoiser = unet_of(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    return d.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=denoiser,
        scheduler=d.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    one, tokenizer = clip(t.CLIPTextModelWithProjection)
    two, tokenizer_2 = clip(t.CLIPTextModelWithProjection)
    three, tokenizer_3 = t5()
    # CLIP's two encodings side by side (32 + 32) are padded to the width of T5's (32): let both be 64
    three = t.T5EncoderModel(t.T5Config(vocab_size=len(tokenizer_3), **{**T5, "d_model": 64}))
    transformer = d.SD3Transformer2DModel(
        **FLOW,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        text_encoder_3=three,
        tokenizer_3=tokenizer_3,
    )


def flux() -> Any:
    one, tokenizer = clip()
    two, tokenizer_2 = t5()
    transformer = d.FluxTransformer2DModel(
        **{**FLOW, "num_layers": 1},
        patch_size=1,
        in_channels=16,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def pixart() -> Any:
    text_encoder, tokenizer = t5()
    transformer = d.PixArtTransformer2DModel(
        **FLOW,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=64,
        caption_channels=32,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
    )
    return d.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(),
        transformer=transformer,
        scheduler=d.DPMSolverMultistepScheduler(**BETAS),
    )


def dit(scheduler: Any = None) -> Any:
    transformer = d.DiTTransformer2DModel(
        **FLOW,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = d.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    return d.DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler)


def wan() -> Any:
    text_encoder, tokenizer = t5(t.UMT5EncoderModel, t.UMT5Config)
    transformer = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    decoder = d.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return d.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=decoder,
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )


def cogvideox() -> Any:
    text_encoder, tokenizer = t5()
    transformer = d.CogVideoXTransformer3DModel(
        **FLOW,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    decoder = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return d.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=decoder,
        transformer=transformer,
        scheduler=d.CogVideoXDDIMScheduler(),
    )
