"""The pipelines of benchmarks/diffusion.py: real configurations, random weights, no downloads.

`model("sd15_512", "cuda", "float16")` builds one. Speed does not depend on the weights' values. Sizes
are those of the published checkpoints (SD 3 with its T5-XXL); the `_tiny` ones have the same parts, small enough
for a CPU. Tokenizers are tables of bytes and letters, which need no files. Beside the pipeline a `Model` has
what a hand-written loop around its denoiser has to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from neustream.backends.diffusers.from_config import PROMPTS, Options, build
from neustream.backends.torch import device_of, dtype_of

Config = Mapping[str, Any]
Rows = Mapping[str, torch.Tensor]
"""What a denoiser is told of a request beside latents and timesteps: rows [unguided, guided], or one row."""

# -- configurations ---------------------------------------------------------------------------------

DIT: Config = {
    "class": "DiTTransformer2DModel",
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
DIT_S2 = {**DIT, "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}
DIT_XL2 = {**DIT, "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
DIT_TINY = {**DIT, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 12, "sample_size": 8}

VAE: Config = {
    "class": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}
VAE_SD3 = {**VAE, "sample_size": 1024, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_SD3 |= {"use_quant_conv": False, "use_post_quant_conv": False}
VAE_TINY: Config = {
    **VAE,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
VAE_SD3_TINY = {**VAE_TINY, "shift_factor": 0.0609}

# diffusers' defaults are those of SD 1.5
UNET: Config = {"class": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
UNET_XL: Config = {
    "class": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_TINY: Config = {
    "class": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,  # of heads, in spite of the name
    "norm_num_groups": 8,
}
UNET_XL_TINY = {
    **UNET_XL,
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "norm_num_groups": 8,
}
SD3: Config = {
    "class": "SD3Transformer2DModel",
    "sample_size": 128,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD3_TINY: Config = {
    "class": "SD3Transformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}

CLIP_L: Config = {
    "class": "CLIPTextModel",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: Config = {
    "class": "CLIPTextModelWithProjection",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_TINY: Config = {
    "class": "CLIPTextModel",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
PROJECTED = {"class": "CLIPTextModelWithProjection"}
T5_XXL: Config = {
    "class": "T5EncoderModel",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
T5_TINY = {**T5_XXL, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

SCALED: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LINEAR_DDIM: Config = {"class": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}
SD_DDIM: Config = {"class": "DDIMScheduler", **SCALED, "clip_sample": False, "set_alpha_to_one": False}
EULER: Config = {"class": "EulerDiscreteScheduler", **SCALED, "timestep_spacing": "leading"}
FLOW: Config = {"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def dit(transformer: Config, vae: Config) -> Config:
    return {"transformer": transformer, "vae": vae, "scheduler": LINEAR_DDIM}


def sd(unet: Config, vae: Config, clip: Config) -> Config:
    parts = {"unet": unet, "vae": vae, "scheduler": SD_DDIM, "safety_checker": None, "feature_extractor": None}
    return {**parts, "text_encoder": clip, "tokenizer": "bytes"}


def sdxl(unet: Config, vae: Config, clip: Config, second: Config) -> Config:
    texts = {"text_encoder": clip, "tokenizer": "bytes", "text_encoder_2": second, "tokenizer_2": "bytes"}
    return {"unet": unet, "vae": vae, "scheduler": EULER, **texts}


def sd3(transformer: Config, vae: Config, clip: Config, second: Config, t5: Config) -> Config:
    texts = {"text_encoder": {**clip, **PROJECTED}, "tokenizer": "bytes", "text_encoder_2": second}
    texts |= {"tokenizer_2": "bytes", "text_encoder_3": t5, "tokenizer_3": "letters"}
    return {"transformer": transformer, "vae": vae, "scheduler": FLOW, **texts}


# -- what a loop around a denoiser has to know --------------------------------------------------------


class Model:
    """A pipeline under its benchmark's name. Its subclasses know one kind of pipeline each.

    `subjects(seeds)` are the arguments that say what is on the pictures; all else is for the bare loop.
    """

    pipeline = ""
    denoiser_name = "unet"
    options: ClassVar[Config] = {}
    """Further arguments of the pipeline's class."""

    def __init__(self, name: str, pipe: Any) -> None:
        self.name = name
        self.pipe = pipe
        self.denoiser = getattr(pipe, self.denoiser_name)

    def stock(self, *, compile: bool = False) -> Model:
        """The same pipeline for stock calls; its models are shared, its scheduler and a compiled denoiser are not."""
        pipe = type(self.pipe)(**self.pipe.components, **self.options)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if compile:
            setattr(pipe, self.denoiser_name, torch.compile(self.denoiser))
        return type(self)(self.name, pipe)

    def subjects(self, seeds: Sequence[int]) -> dict[str, Any]:
        return {"prompt": [PROMPTS[seed % len(PROMPTS)] for seed in seeds]}

    def rows(self, seeds: Sequence[int], guided: bool) -> list[Rows]:
        """What the denoiser is told, by request; all are encoded together."""
        raise NotImplementedError

    def noise(self, generator: torch.Generator) -> torch.Tensor:
        config = self.denoiser.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=generator, dtype=self.denoiser.dtype).to(self.pipe.device)

    def forward(self, latents: torch.Tensor, times: torch.Tensor, rows: Rows) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(latents, timestep=times, **rows, return_dict=False)[0]
        return out

    def decode(self, latents: torch.Tensor) -> np.ndarray[Any, Any]:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = (vae.decode(latents.to(vae.dtype), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        done: np.ndarray[Any, Any] = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return done


def paired(guided: bool, **given: tuple[torch.Tensor | None, torch.Tensor]) -> list[Rows]:
    """By request its rows of each tensor, given as (those of the empty prompt, those of the prompt)."""
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(len(next(iter(given.values()))[1]))]
    for name, (none, some) in given.items():
        for at, rows in enumerate(out):
            both = [none, some] if guided and none is not None else [some]
            rows[name] = torch.cat([one[at : at + 1] for one in both])
    return list(out)


class DiT(Model):
    pipeline = "DiTPipeline"
    denoiser_name = "transformer"

    def subjects(self, seeds: Sequence[int]) -> dict[str, Any]:
        return {"class_labels": [seed % 1000 for seed in seeds]}

    def rows(self, seeds: Sequence[int], guided: bool) -> list[Rows]:
        labels = torch.tensor([seed % 1000 for seed in seeds], device=self.pipe.device)
        return paired(guided, class_labels=(torch.full_like(labels, 1000), labels))

    def forward(self, latents: torch.Tensor, times: torch.Tensor, rows: Rows) -> torch.Tensor:
        return super().forward(latents, times, rows)[:, : latents.shape[1]]  # the rest is the variance


class StableDiffusion(Model):
    pipeline = "StableDiffusionPipeline"
    options: ClassVar[Config] = {"requires_safety_checker": False}

    def rows(self, seeds: Sequence[int], guided: bool) -> list[Rows]:
        some, none = self.pipe.encode_prompt(self.subjects(seeds)["prompt"], self.pipe.device, 1, guided)
        return paired(guided, encoder_hidden_states=(none, some))


class StableDiffusionXL(Model):
    pipeline = "StableDiffusionXLPipeline"
    options: ClassVar[Config] = {"add_watermarker": False}

    def rows(self, seeds: Sequence[int], guided: bool) -> list[Rows]:
        prompts = self.subjects(seeds)["prompt"]
        given = self.pipe.encode_prompt(prompts, device=self.pipe.device, do_classifier_free_guidance=guided)
        some, none, pooled, pooled_none = given
        side = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=some.dtype, device=some.device)
        sizes = sizes.expand(len(seeds), -1)
        return paired(guided, states=(none, some), text_embeds=(pooled_none, pooled), time_ids=(sizes, sizes))

    def forward(self, latents: torch.Tensor, times: torch.Tensor, rows: Rows) -> torch.Tensor:
        added = {name: rows[name] for name in ("text_embeds", "time_ids")}
        return super().forward(latents, times, {"encoder_hidden_states": rows["states"], "added_cond_kwargs": added})


class StableDiffusion3(Model):
    pipeline = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"

    def rows(self, seeds: Sequence[int], guided: bool) -> list[Rows]:
        prompts = self.subjects(seeds)["prompt"]
        given = self.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=guided)
        some, none, pooled, pooled_none = given
        return paired(guided, encoder_hidden_states=(none, some), pooled_projections=(pooled_none, pooled))


MODELS: Mapping[str, tuple[type[Model], Config]] = {
    "dit_tiny": (DiT, dit(DIT_TINY, VAE_TINY)),
    "dit_s2": (DiT, dit(DIT_S2, {**VAE, "sample_size": 256})),
    "dit_xl2": (DiT, dit(DIT_XL2, {**VAE, "sample_size": 256})),
    "sd_tiny": (StableDiffusion, sd(UNET_TINY, VAE_TINY, CLIP_TINY)),
    "sd15_256": (StableDiffusion, sd({**UNET, "sample_size": 32}, VAE, CLIP_L)),
    "sd15_512": (StableDiffusion, sd(UNET, VAE, CLIP_L)),
    "sdxl_tiny": (StableDiffusionXL, sdxl(UNET_XL_TINY, VAE_TINY, CLIP_TINY, {**CLIP_TINY, **PROJECTED})),
    "sdxl": (StableDiffusionXL, sdxl(UNET_XL, VAE_XL, CLIP_L, CLIP_G)),
    "sd3_tiny": (StableDiffusion3, sd3(SD3_TINY, VAE_SD3_TINY, CLIP_TINY, {**CLIP_TINY, **PROJECTED}, T5_TINY)),
    "sd3": (StableDiffusion3, sd3(SD3, VAE_SD3, CLIP_L, CLIP_G, T5_XXL)),
}


@contextlib.contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Weights are drawn where and as they are needed: SD 3 in float32 on a CPU takes minutes and 30 GiB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def model(name: str, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> Model:
    """The pipeline `name` (one of `MODELS`) with random weights, ready to run."""
    kind, components = MODELS[name]
    place = device_of(device)
    options = {"pipeline": kind.pipeline, "components": components, "arguments": kind.options}
    with _made_on(place, dtype_of(dtype)):
        pipe = build(Options.model_validate({**options, "dtype": dtype, "weights_seed": seed}))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # whose tables are to be as stock has them
    return kind(name, pipe.to(place))
