"""Tiny stock pipelines that the library does not know by name."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pipeline_parts import BETAS, DDIM, TEXT, UNET, clip, t5, unet_of, vae

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d
    import transformers as t


def ddpm() -> Any:
    """No text, no VAE, no guidance: pixels of a UNet2DModel."""
    denoiser = d.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return d.DDPMPipeline(unet=denoiser, scheduler=d.DDPMScheduler())


def kandinsky() -> Any:
    """Image embeddings in place of text, a VQ decoder, learned variance."""
    denoiser = unet_of(
        in_channels=4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    decoder = d.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    scheduler = d.DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=False)
    return d.KandinskyV22Pipeline(unet=denoiser, movq=decoder, scheduler=scheduler)


def _prior_parts() -> dict[str, Any]:
    """What makes image embeddings of text."""
    text_encoder, tokenizer = clip(t.CLIPTextModelWithProjection)
    vision = t.CLIPVisionConfig(**{**TEXT, "projection_dim": 32, "image_size": 32, "patch_size": 16})
    prior = d.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    torch.nn.init.ones_(prior.clip_std)
    scheduler = d.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
    )
    return {
        "prior": prior,
        "image_encoder": t.CLIPVisionModelWithProjection(vision),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
        "image_processor": None,
    }


def kandinsky_prior() -> Any:
    """No decoder, and an encoder that is called once more behind the last step."""
    return d.KandinskyV22PriorPipeline(**_prior_parts())


def kandinsky_combined() -> Any:
    """Two pipelines inside one: a prior that makes image embeddings of text, and the decoder."""
    one = kandinsky()
    prior = {f"prior_{name}": part for name, part in _prior_parts().items()}
    return d.KandinskyV22CombinedPipeline(unet=one.unet, scheduler=one.scheduler, movq=one.movq, **prior)


def marigold() -> Any:
    """Depth of an image: a progress bar of its own, two schedules in one call."""
    text_encoder, tokenizer = clip()
    return d.MarigoldDepthPipeline(
        unet=unet_of(in_channels=8),
        vae=vae(),
        scheduler=d.DDIMScheduler(**DDIM, prediction_type="v_prediction"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prediction_type="depth",
        default_denoising_steps=4,
        default_processing_resolution=0,
    )


def animatediff() -> Any:
    """A UNet with frames inside its rows."""
    text_encoder, tokenizer = clip()
    adapter = d.MotionAdapter(
        block_out_channels=UNET["block_out_channels"],
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return d.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet_of(),
        motion_adapter=adapter,
        scheduler=d.DDIMScheduler(**{**DDIM, "beta_schedule": "linear"}),
    )


def sana() -> Any:
    """Linear attention, a deep-compression autoencoder; embeddings given."""
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )
    decoder = d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return d.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=decoder,
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def ltx() -> Any:
    """Video of a transformer with its rotary positions inside."""
    text_encoder, tokenizer = t5()
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    decoder = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    return d.LTXPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=decoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def qwenimage() -> Any:
    """Two calls a step where it is guided, shapes of images as lists of numbers; embeddings given."""
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def stable_audio() -> Any:
    """Sound; a model that projects text and seconds, a solver with a memory and noise of its own kind."""
    text_encoder, tokenizer = t5()
    transformer = d.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
        num_attention_heads=2,
    )
    decoder = d.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return d.StableAudioPipeline(
        transformer=transformer,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        projection_model=d.pipelines.stable_audio.StableAudioProjectionModel(32, 16, min_value=0, max_value=32),
        vae=decoder,
        scheduler=d.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
