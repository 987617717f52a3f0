"""Tiny stock pipelines with random weights, and mixed requests for each: what the tests of this folder serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d
    import transformers as t

    from neustream.backends.diffusers.from_config import byte_tokenizer
    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Progress, Run, decode, denoise, encode

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

# -- parts of pipelines -----------------------------------------------------------------------------------


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


def _unet(**change: Any) -> Any:
    return d.UNet2DConditionModel(**{**UNET, **change})


def ready(pipe: Any, dtype: torch.dtype) -> Any:
    """The pipeline, silent and ready to infer."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe.to(dtype)


def _stable_diffusion(make: Any, scheduler: Any = None, **parts: Any) -> Any:
    text_encoder, tokenizer = clip()
    parts = {"vae": vae(), "unet": _unet(), **parts}
    return make(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=d.DDIMScheduler(**DDIM) if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


# -- the pipelines ----------------------------------------------------------------------------------------


def stable_diffusion(scheduler: Any = None, unet: Mapping[str, Any] = {}) -> Any:
    return _stable_diffusion(d.StableDiffusionPipeline, scheduler, unet=_unet(**unet))


def stable_diffusion_img2img() -> Any:
    return _stable_diffusion(d.StableDiffusionImg2ImgPipeline, d.PNDMScheduler(**BETAS, skip_prk_steps=True))


def stable_diffusion_inpaint() -> Any:
    return _stable_diffusion(d.StableDiffusionInpaintPipeline, unet=_unet(in_channels=9))


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
    denoiser = _unet(
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


# -- pipelines that the library does not know by name -----------------------------------------------------


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
    denoiser = _unet(
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
        unet=_unet(in_channels=8),
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
        unet=_unet(),
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


# -- requests ---------------------------------------------------------------------------------------------

PROMPTS = ("a cat", "two dogs", "", "the sea at night", "x" * 400, "tree")
STEPS = (3, 6, 4, 8, 5)
GUIDANCE = (5.0, 1.0, 2.5, 7.5, 0.0)
TWICE = 2
"""Which request asks for two images."""


def noise(at: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + at))


def picture(at: int, size: int = 16) -> Image.Image:
    pixels = np.random.RandomState(at).randint(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(at: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.where(np.arange(size)[:, None] < 3 + at, 255, 0).repeat(size, 1).astype(np.uint8))


def _prompt(at: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[at], **({"negative_prompt": "blurry"} if at % 3 == 0 else {})}


def _img2img(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "strength": (0.8, 0.5, 1.0, 0.7, 0.9)[at]}


def _inpaint(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "mask_image": mask(at), "height": 16, "width": 16}


def _controlnet(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "controlnet_conditioning_scale": (1.0, 0.5)[at == 3]}


def _sized(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 16, "width": 16, "max_sequence_length": 16}


def _flux(at: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[at], "height": 16, "width": 16, "max_sequence_length": 16}


def _pixart(at: int) -> dict[str, Any]:
    own = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
    return {**_prompt(at), "height": 16, "width": 16, **own}


def _dit(at: int) -> dict[str, Any]:
    return {"class_labels": [31 * at, 999] if at == TWICE else [31 * at]}


def _wan(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


def _ddpm(at: int) -> dict[str, Any]:
    return {"batch_size": 2 if at == TWICE else 1}


def _kandinsky(at: int) -> dict[str, Any]:
    return {"image_embeds": noise(at, 1, 32), "negative_image_embeds": noise(-at - 1, 1, 32), "height": 32, "width": 32}


def _combined(at: int) -> dict[str, Any]:
    return {**_prompt(at), "prior_num_inference_steps": STEPS[-at], "height": 32, "width": 32}


def _qwenimage(at: int) -> dict[str, Any]:
    words = (8, 8, 5, 8, 6)[at]  # as many tokens, no more: prompts of one length share calls
    own = {"prompt_embeds": noise(at, 1, words, 32), "prompt_embeds_mask": torch.ones(1, words, dtype=torch.long)}
    other = {"negative_prompt_embeds": noise(-at - 1, 1, 8, 32)}
    other["negative_prompt_embeds_mask"] = torch.ones(1, 8, dtype=torch.long)
    return {**own, **other, "height": 32, "width": 32, "true_cfg_scale": GUIDANCE[at]}


def _stable_audio(at: int) -> dict[str, Any]:
    return {**_prompt(at), "audio_end_in_s": (2.0, 2.0, 1.0, 2.0, 1.5)[at]}


def _marigold(at: int) -> dict[str, Any]:
    return {"image": [picture(at), picture(-at % 7)] if at == TWICE else picture(at)}  # two: one after the other


def _animatediff(at: int) -> dict[str, Any]:
    return {**_prompt(at), "num_frames": 3}


def _sana(at: int) -> dict[str, Any]:
    seen = torch.tensor([[1] * (3 + at) + [0] * (5 - at)])
    given = {"prompt_embeds": noise(at, 1, 8, 32), "prompt_attention_mask": seen}
    nothing = {
        "negative_prompt": None,
        "negative_prompt_embeds": noise(-at - 1, 1, 8, 32),
        "negative_prompt_attention_mask": seen,
    }
    return {**given, **nothing, "height": 32, "width": 32, "use_resolution_binning": False}


def _ltx(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    `content` are the arguments of request number `at` beside steps, guidance and seed; `guided` whether
    it takes a guidance scale, `several` its argument for more than one result. `rounded`: its output is
    float32 whatever its models compute in. `shared`: its requests share calls of the denoiser.
    `tolerance` is that of float32.
    """

    make: Callable[..., Any]
    content: Callable[[int], Mapping[str, Any]]
    guided: bool = True
    several: str | None = "num_images_per_prompt"
    output: str = "pt"
    rounded: bool = False
    shared: bool = True
    tolerance: float = 1e-5


FAMILIES: dict[str, Family] = {
    "stable_diffusion": Family(stable_diffusion, _prompt),
    "stable_diffusion_img2img": Family(stable_diffusion_img2img, _img2img),
    "stable_diffusion_inpaint": Family(stable_diffusion_inpaint, _inpaint),
    "controlnet": Family(controlnet, _controlnet),
    "stable_diffusion_xl": Family(stable_diffusion_xl, _prompt),
    "stable_diffusion_3": Family(stable_diffusion_3, _sized),
    "flux": Family(flux, _flux),
    "pixart": Family(pixart, _pixart),
    "dit": Family(dit, _dit, several=None),
    "wan": Family(wan, _wan, several="num_videos_per_prompt"),
    # the random weights of these two decoders make differences thirty times larger
    "cogvideox": Family(cogvideox, _wan, several="num_videos_per_prompt", tolerance=1e-4),
    "ddpm": Family(ddpm, _ddpm, guided=False, several=None),
    "kandinsky": Family(kandinsky, _kandinsky, tolerance=1e-4),
    "kandinsky_prior": Family(kandinsky_prior, _prompt),
    "kandinsky_combined": Family(kandinsky_combined, _combined, tolerance=1e-3),
    "marigold": Family(marigold, _marigold, guided=False, several=None),
    "animatediff": Family(animatediff, _animatediff, several="num_videos_per_prompt", rounded=True, shared=False),
    "sana": Family(sana, _sana),
    "ltx": Family(ltx, _ltx, several="num_videos_per_prompt"),
    "qwenimage": Family(qwenimage, _qwenimage, guided=False),
    "stable_audio": Family(stable_audio, _stable_audio, several="num_waveforms_per_prompt"),
}


@dataclass(frozen=True)
class Request:
    """One call of a pipeline; `arguments()` are those of the stock call, with a fresh generator."""

    content: Mapping[str, Any]
    seed: int
    dtype: torch.dtype = torch.float32
    steps: int = field(kw_only=True)

    def arguments(self, **change: Any) -> dict[str, Any]:
        whole = {**self.content, "num_inference_steps": self.steps, **change}
        for name, value in whole.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                whole[name] = value.to(self.dtype)
        return {"generator": torch.Generator().manual_seed(self.seed), **whole}


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The pipeline of a family; the same weights each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock pipelines have opinions on scheduler configs
        return ready(FAMILIES[name].make(**options), dtype)


def requests(name: str, dtype: torch.dtype = torch.float32) -> list[Request]:
    """Five mixed requests: other steps, guidance (two without), seeds, prompts; one wants two results."""
    family = FAMILIES[name]
    made = []
    for at, (steps, guidance) in enumerate(zip(STEPS, GUIDANCE, strict=True)):
        content = {**family.content(at), "output_type": family.output}
        if family.guided:
            content["guidance_scale"] = guidance
        if family.several is not None and at == TWICE:
            content[family.several] = 2
        made.append(Request(content, 10 + at, dtype, steps=steps))
    return made


# -- running them -----------------------------------------------------------------------------------------


def tensor_of(output: Any) -> torch.Tensor:
    """The first thing that a pipeline's output holds."""
    first = output[0] if not isinstance(output, torch.Tensor) else output
    if isinstance(first, list):
        first = torch.stack([x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x)) for x in first])
    return torch.from_numpy(first) if isinstance(first, np.ndarray) else first


def stock(pipe: Any, request: Request) -> torch.Tensor:
    """What the pipeline itself makes of a request, alone."""
    return tensor_of(pipe(**request.arguments()))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest difference, as a share of the greatest value of `other`."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max() / other.abs().max())


def counted(parts: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Rows of each call that parts make from now on, by the part's name."""
    seen: dict[str, list[int]] = {}

    def watch(part: Any) -> Callable[..., Any]:
        function = part.function

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim]
            seen.setdefault(part.name, []).append(len(tensors[0]))
            return function(*args, **kwargs)

        return call

    for methods in parts.values():
        for part in methods.values():
            part.function = watch(part)
    return seen


def finish(
    runs: Sequence[Run], *, apart: int = 2, close: Sequence[int] = (), pause: int = 4, order: Sequence[int] = ()
) -> None:
    """Bring runs to their ends, in batches that change from step to step.

    Args:
        apart: run number `at` starts at step `at // 2 * apart`.
        close: numbers of runs that are given up in their third step.
        pause: every run misses each so many steps, each another one.
        order: numbers of the runs in the order that they arrive in.
    """
    order = list(order or range(len(runs)))
    for tick in range(1000):
        here = [
            runs[at]
            for place, at in enumerate(order)
            if tick >= place // 2 * apart and not runs[at].over and (tick + place) % pause != pause - 1
        ]
        encode([run for run in here if not run.started])
        ahead = [run for run in here if run.denoising]
        denoise(ahead)
        if tick % 3 == 2:  # those that are done wait for each other
            decode([run for run in here if not run.over and not run.denoising])
        for at in close:
            if runs[at].steps >= 2 and not runs[at].over:
                runs[at].close()
        if all(run.over for run in runs):
            return
    raise AssertionError("some runs do not come to their end")


def alone(pipe: Any, request: Request, parts: Any = None, on_step: Callable[[Progress], None] | None = None) -> Any:
    """A request's output, served with nobody else."""
    run = Run(pipe, parts_of(pipe) if parts is None else parts, request.arguments(), on_step=on_step)
    finish([run], pause=1000)
    if run.error is not None:
        raise run.error
    return tensor_of(run.output)


def together(pipe: Any, some: Sequence[Request], parts: Any = None, **how: Any) -> list[Any]:
    """The outputs of requests that share steps (see `finish`); None for those that were closed."""
    parts = parts_of(pipe) if parts is None else parts
    runs = [Run(pipe, parts, request.arguments()) for request in some]
    finish(runs, **how)
    for run in runs:
        if run.error is not None:
            raise run.error
    return [None if run.output is None else tensor_of(run.output) for run in runs]
