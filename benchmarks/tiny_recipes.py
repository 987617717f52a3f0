"""What pipelines of diffusers need in their own way, by rules on their names.

A rule is a name, or words of names in their order (`StableDiffusionXL...Inpaint...`); of all rules that fit,
longer ones win. `PARTS`: components (`class` and changes to its tiny configuration, an object, a function).
`CALLS`: arguments of calls (`...`: not given; a function: of the request's number), `size` of images, `frames`.
`TEXTS`: which encoder stands in where a pipeline declares any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from tiny_inputs import ATTENDED, EMBEDS, MASKED, PROMPTS, masked, noise, noisy, picture, pictured
from tiny_texts import example_encoder, odd_text
from tiny_unets import CODES, DEEPFLOYD, KANDINSKY, SHAP_E, UNCLIP, UNET, UNET_XL, UNION, UPSCALER, XL_CONTROL, XS

Table = dict[str, Mapping[str, Any]]


class NoSafety(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """In place of a checker whose package is not here: everything passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


WAN_IMAGE: Mapping[str, Any] = {
    "transformer": {"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 24},
    "image_encoder": {"class": "CLIPVisionModel"},
    "image_processor": {"class": "CLIPImageProcessorPil"},
}
MCLIP = {"text_encoder": lambda: odd_text("MultilingualCLIP", transformerDimSize=32, imageDimSize=32)}
TEXT_IMAGE = {**KANDINSKY, "addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}
TEXT_IMAGE |= {"cross_attention_dim": 32}
EDM: Mapping[str, Any] = {"solver_order": 2, "prediction_type": "v_prediction", "sigma_data": 1.0}
UNCLIP_UNET = {**UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}
CASCADE_PRIOR = {"clip_image_in_channels": 32, "clip_text_in_channels": 32}
CLASSIC_IMAGE = {
    "negative_prompt": "blurry",
    "image_embeds": noisy(1, 32),
    "negative_image_embeds": noisy(1, 32, other=1),
}
KANDINSKY_5: Mapping[str, Any] = {"max_sequence_length": 64}

TEXTS: Table = {
    "Ideogram4Pipeline": {"encoder": "Qwen3VLModel"},
    "ZImage...": {"encoder": "Qwen3Model"},
    "PRXPixel...": {"encoder": "Qwen3Model"},
}
PARTS: Table = {
    "AltDiffusion...": {"text_encoder": lambda: odd_text("RobertaSeriesModelWithTransformation", project_dim=32)},
    "Amused...": {"scheduler": {"mask_token_id": 31}, "vqvae": CODES},
    "AudioLDMPipeline": {
        "unet": {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 32,
            "class_embeddings_concat": True,
            "cross_attention_dim": (16, 32),
        },
        "vae": {"in_channels": 1, "out_channels": 1},
        "text_encoder": {"projection_dim": 32},
    },
    "AnimateDiffSDXLPipeline": {"unet": UNET_XL},
    "BriaFibo2Pipeline": {"text_encoder": None, "processor": None},
    "ChronoEditPipeline": WAN_IMAGE,
    "CogVideoXFunControlPipeline": {"transformer": {"in_channels": 8}},
    "CogVideoXImageToVideoPipeline": {"transformer": {"in_channels": 8}},
    "CogView4ControlPipeline": {"transformer": {"in_channels": 8}},
    "Cosmos...": {"safety_checker": NoSafety},
    "Cosmos2VideoToWorldPipeline": {"transformer": {"in_channels": 5}},
    "CosmosVideoToWorldPipeline": {"transformer": {"in_channels": 5}},
    "Cosmos2_5...": {"transformer": {"in_channels": 5}},
    "DanceDiffusionPipeline": {"scheduler": {"class": "IPNDMScheduler"}},
    "DreamLite...": {"text_encoder": None, "tokenizer": None, "processor": None},
    "Flux2Pipeline": {"text_encoder": None, "tokenizer": None},
    "EasyAnimateInpaintPipeline": {"transformer": {"in_channels": 9}},
    "FluxControl...": {"transformer": {"in_channels": 32, "out_channels": 16}},
    "FluxControlNet...": {"transformer": {}},
    "FluxFillPipeline": {"transformer": {"in_channels": 48, "out_channels": 16}},
    "FluxPriorReduxPipeline": {"image_embedder": {"redux_dim": 32, "txt_in_features": 4096}},
    "Helios...": {"transformer": {}},
    "HunyuanDiT...": {"text_encoder_2": {}, "tokenizer_2": {}},
    "HunyuanDiTControlNetPipeline": {"transformer": {"num_layers": 4}},
    "HunyuanImageRefinerPipeline": {
        "transformer": {"in_channels": 16, "out_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (4, 2, 2)}
    },
    "HunyuanSkyreelsImageToVideoPipeline": {"transformer": {"in_channels": 8}},
    "HunyuanVideoImageToVideoPipeline": {"transformer": {"image_condition_type": "token_replace"}},
    "IF...": {"unet": DEEPFLOYD, "scheduler": {"variance_type": "learned_range"}},
    "IF...SuperResolutionPipeline": {"unet": {**DEEPFLOYD, "in_channels": 6, "class_embed_type": "timestep"}},
    "JoyImageEdit...": {"text_encoder": None, "tokenizer": None, "processor": None},
    "Kandinsky...": {"tokenizer": {}},
    "KandinskyPipeline": {**MCLIP, "unet": TEXT_IMAGE},
    "KandinskyCombinedPipeline": {**MCLIP, "unet": TEXT_IMAGE},
    "KandinskyImg2Img...": {**MCLIP, "unet": TEXT_IMAGE},
    "KandinskyInpaint...": {**MCLIP, "unet": {**TEXT_IMAGE, "in_channels": 9}},
    "KandinskyV22...": {"unet": KANDINSKY},
    "KandinskyV22Inpaint...": {"unet": {**KANDINSKY, "in_channels": 9}},
    "Kandinsky5I2VPipeline": {"transformer": {"visual_cond": True}},
    "Kandinsky5I2IPipeline": {"transformer": {"visual_cond": True}},
    "Krea2Pipeline": {"text_encoder_select_layers": (1, 2)},
    "LatentConsistencyModel...": {"scheduler": {"class": "LCMScheduler"}, "unet": {"time_cond_proj_dim": 32}},
    "LDMPipeline": {"unet": {"in_channels": 4, "out_channels": 4}},
    "LDMSuperResolutionPipeline": {
        "unet": {"in_channels": 6, "out_channels": 3},
        "vqvae": {"latent_channels": 3, "vq_embed_dim": 3},
    },
    "LDMTextToImagePipeline": {
        "vqvae": {"class": "AutoencoderKL"},
        "bert": {"class": "CLIPTextModel"},
        "tokenizer": {"class": "CLIPTokenizer"},
        "unet": {"class": "UNet2DConditionModel"},
    },
    "LucyEditPipeline": {"transformer": {"in_channels": 8}},
    "LongCatImage...": {"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16}},
    "MarigoldDepthPipeline": {
        "unet": {"in_channels": 8},
        "default_denoising_steps": 4,
        "default_processing_resolution": 0,
    },
    "MarigoldNormalsPipeline": {"unet": {"in_channels": 8}, "default_denoising_steps": 4},
    "Marigold...": {"default_processing_resolution": 0, "scheduler": {"class": "DDIMScheduler", "steps_offset": 1}},
    "MarigoldIntrinsicsPipeline": {
        "unet": {"in_channels": 12, "out_channels": 8},
        "default_denoising_steps": 4,
        "target_properties": lambda: {"target_names": ["albedo", "roughness"]},
    },
    "MochiPipeline": {
        "vae": {"latent_channels": 12, "latents_mean": (0.0,) * 12, "latents_std": (1.0,) * 12},
        "transformer": {"in_channels": 12},
    },
    "MotifVideo...": {"text_encoder": None, "tokenizer": None},
    "PIAPipeline": {"unet": {"in_channels": 9}},
    "PNDMPipeline": {"scheduler": {"skip_prk_steps": True}},
    "PRXPipeline": {"text_encoder": None, "tokenizer": None, "vae": {"class": "AutoencoderKL"}},
    "PRXPixelPipeline": {"transformer": {"in_channels": 3}},
    "PaintByExamplePipeline": {"unet": {"in_channels": 9}, "image_encoder": example_encoder},
    "QwenImageControlNetInpaintPipeline": {
        "controlnet": {"class": "QwenImageControlNetModel", "extra_condition_channels": 4}
    },
    "SanaSprint...": {"transformer": {"guidance_embeds": True}, "scheduler": {"class": "SCMScheduler"}},
    "SanaVideoPipeline": {"vae": {"class": "AutoencoderKLWan"}},
    "SanaImageToVideoPipeline": {"vae": {"class": "AutoencoderKLWan"}},
    "ShapE...": SHAP_E,
    "StableCascadePriorPipeline": {"prior": CASCADE_PRIOR},
    "StableCascadeCombinedPipeline": {"prior_prior": CASCADE_PRIOR},
    "StableDiffusionControlNetXSPipeline": {
        "controlnet": {**XS, "use_linear_projection": False},
        "unet": {"layers_per_block": 2},
    },
    "SkyReelsV2ImageToVideoPipeline": {**WAN_IMAGE},
    "StableAudioPipeline": {
        "projection_model": {"text_encoder_dim": 32, "conditioning_dim": 16, "min_value": 0, "max_value": 32},
        "scheduler": {"class": "EDMDPMSolverMultistepScheduler", **EDM, "sigma_schedule": "exponential"},
    },
    "StableDiffusion3...": {"text_encoder_3": {"d_model": 64}},
    "StableDiffusion3InpaintPipeline": {
        "transformer": {"in_channels": 16, "out_channels": 16},
        "vae": {"latent_channels": 16},
    },
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "controlnet": {"class": "SD3ControlNetModel", "extra_conditioning_channels": 1}
    },
    "StableDiffusionDepth2ImgPipeline": {
        "unet": {"in_channels": 5},
        "depth_estimator": None,
        "feature_extractor": None,
    },
    "StableDiffusionGLIGENPipeline": {"unet": {"attention_type": "gated"}},
    "StableDiffusionInpaintPipeline": {"unet": {"in_channels": 9}},
    "StableDiffusionInstructPix2PixPipeline": {"unet": {"in_channels": 8}},
    "StableDiffusionLatentUpscalePipeline": {"unet": UPSCALER, "scheduler": {"class": "EulerDiscreteScheduler"}},
    "StableDiffusionModelEditingPipeline": {"scheduler": {"class": "DDIMScheduler"}},
    "StableDiffusionParadigmsPipeline": {"scheduler": {"class": "DDIMParallelScheduler"}},
    "StableDiffusionPix2PixZeroPipeline": {"caption_generator": None, "caption_processor": None},
    "StableDiffusionUpscalePipeline": {"unet": {"in_channels": 7, "num_class_embeds": 1000}},
    "StableDiffusionXL...": {"unet": UNET_XL, "scheduler": {"class": "EulerDiscreteScheduler", "steps_offset": 1}},
    "StableDiffusionXLAdapterPipeline": {
        "adapter": {"class": "T2IAdapter", "channels": [16, 32], "adapter_type": "full_adapter_xl"}
    },
    "StableDiffusionXL...ControlNet...": {"controlnet": {**XL_CONTROL, "class": "ControlNetModel"}},
    "StableDiffusionXLControlNetUnion...": {"controlnet": UNION},
    "StableDiffusionXLControlNetXSPipeline": {
        "controlnet": {
            **XS,
            "down_block_types": UNET_XL["down_block_types"],
            "transformer_layers_per_block": (1, 2),
            "num_attention_heads": (2, 4),
            "cross_attention_dim": 64,
        },
        "unet": {**UNET_XL, "layers_per_block": 2},
    },
    "StableDiffusionXLInstructPix2PixPipeline": {"unet": {**UNET_XL, "in_channels": 8}},
    "StableUnCLIP...": {
        "image_normalizer": {"embedding_dim": 32},
        "unet": UNCLIP_UNET,
        "prior_scheduler": {"class": "UnCLIPScheduler"},
    },
    "StableUnCLIPPipeline": {"image_noising_scheduler": {"class": "DDPMScheduler"}},
    "StableVideoDiffusionPipeline": {
        "scheduler": {
            "class": "EulerDiscreteScheduler",
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
        },
        "image_encoder": {"image_size": 224, "patch_size": 112},
    },
    "TextToVideoZeroSDXLPipeline": {"unet": UNET_XL},
    "UnCLIP...": UNCLIP,
    "VQDiffusionPipeline": {
        "transformer": {
            "class": "Transformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_vector_embeds": 13,
            "num_embeds_ada_norm": 100,
            "sample_size": 8,
            "attention_bias": True,
            "activation_fn": "geglu-approximate",
        },
        "scheduler": {"num_vec_classes": 13},
        "learned_classifier_free_sampling_embeddings": {"learnable": False},
    },
    "VisualCloze...": {"transformer": {"in_channels": 48, "out_channels": 16}, "resolution": 16},
    "WanPipeline": {"transformer": {}},
    "WanImageToVideoPipeline": WAN_IMAGE,
    "WanVACEPipeline": {"transformer": {}},
    "ZImageOmniPipeline": {"siglip": None, "siglip_processor": None},
}
CALLS: Table = {
    "AllegroPipeline": {"output_type": "latent", "frames": 8},
    "AnyFlow...": {"video": ..., "frames": 5},
    "BriaFibo2Pipeline": {**MASKED, "image": ...},
    "BriaFibo...": {"negative_prompt": "blurry"},  # of an empty one three families make no tokens
    "CogView4...": {"negative_prompt": "blurry"},
    "EasyAnimate...": {"negative_prompt": "blurry"},
    "BriaFiboEditPipeline": {"prompt": lambda at: f'{{"edit_instruction": "{PROMPTS[at]}"}}'},
    "Cosmos...": {"size": 32},
    "Cosmos...VideoToWorldPipeline": {"image": ...},
    "ChronoEditPipeline": EMBEDS,
    "Cosmos2_5_TransferPipeline": {"controls": lambda at: [picture(10 * at + frame, 32) for frame in range(5)]},
    "CycleDiffusionPipeline": {"source_prompt": lambda at: PROMPTS[at - 1]},
    "DreamLite...": {"image": ...},
    "EasyAnimateInpaintPipeline": {
        "video": lambda at: noise(at, 1, 3, 5, 16, 16).sigmoid(),
        "mask_video": lambda at: torch.ones(1, 1, 5, 16, 16) * 255,
    },
    "Flux2Klein...": {"text_encoder_out_layers": (1,), "image": ...},
    "Flux2KleinInpaintPipeline": {"image": pictured(16)},
    "Flux2KleinKVPipeline": {"image": pictured(64)},
    "Flux2Pipeline": {**EMBEDS, "negative_prompt_embeds": ..., "image": ...},
    "FluxKontext...": {"max_area": 256, "_auto_resize": False},
    "Helios...": {**EMBEDS, "image": ..., "video": ...},
    "HunyuanVideo...": {"frames": 5},
    "IF...SuperResolutionPipeline": {"noise_level": 20, "original_image": pictured(16, 1), "image": pictured(16)},
    "IFSuperResolutionPipeline": {"original_image": ..., "image": lambda at: noise(at, 1, 3, 16, 16).clamp(-1, 1)},
    "Ideogram4Pipeline": {"guidance_schedule": None},
    "JoyImageEdit...": MASKED,
    "JoyImageEditPlusPipeline": {"images": lambda at: [[picture(at)]], "image": ...},
    "Kandinsky5...": {**KANDINSKY_5, "negative_prompt": "blurry"},
    "KandinskyPipeline": CLASSIC_IMAGE,
    "KandinskyCombinedPipeline": {"negative_prompt": "blurry"},
    "KandinskyImg2Img...": {"negative_prompt": "blurry"},  # of an empty one their encoder makes NaN
    "KandinskyInpaint...": {"negative_prompt": "blurry"},
    "KandinskyImg2ImgPipeline": CLASSIC_IMAGE,
    "KandinskyInpaintPipeline": CLASSIC_IMAGE,
    "KandinskyV22...": {**CLASSIC_IMAGE, "negative_prompt": ..., "hint": noisy(1, 3, 16, 16)},
    "KandinskyV22...Combined...": {
        "negative_prompt": lambda at: "blurry" if at % 2 else None,
        "image_embeds": ...,
        "negative_image_embeds": ...,
        "hint": ...,
    },
    "KandinskyV22Prior...": {
        "negative_prompt": lambda at: "blurry" if at % 2 else None,
        "image_embeds": ...,
        "negative_image_embeds": ...,
        "hint": ...,
    },
    "KandinskyV22Pipeline": {"hint": ...},
    "KandinskyV22Img2ImgPipeline": {"hint": ...},
    "KandinskyV22InpaintPipeline": {"hint": ...},
    "LDMSuperResolutionPipeline": {"image": pictured(32)},
    "LTX...": {"size": 32},
    "LucyEditPipeline": EMBEDS,
    "Marigold...": {"prompt": ..., "strength": ...},
    "MotifVideo...": {**ATTENDED, "prompt": None},
    "NucleusMoEImagePipeline": MASKED,
    "PRX...": ATTENDED,
    "PaintByExamplePipeline": {"example_image": pictured(16, 1)},
    "QwenImageControlNetInpaintPipeline": {"control_mask": masked(16)},
    "QwenImageEdit...": MASKED,
    "QwenImage21Pipeline": {**MASKED, "image": ...},
    "RePaintPipeline": {"image": pictured(32), "mask_image": masked(32), "jump_length": 2, "jump_n_sample": 2},
    "Sana...": {"size": 32},
    "SanaSprint...": {"intermediate_timesteps": None},
    "ShapE...": {"frame_size": 16},
    "SkyReelsV2...": {**EMBEDS, "prompt": None},
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"overlap_history": 1, "base_num_frames": 5, "num_frames": 9},
    "StableAudioPipeline": {"audio_end_in_s": lambda at: (2.0, 2.0, 1.0, 2.0)[at], "output_type": "pt"},
    "StableCascadeDecoderPipeline": {"image_embeddings": noisy(1, 4, 4, 4)},
    "StableDiffusion3ControlNetInpaintingPipeline": {"control_mask": masked(16)},
    "StableDiffusionAttendAndExcitePipeline": {"token_indices": [1, 2], "max_iter_to_alter": 1, "attn_res": (8, 8)},
    "StableDiffusionDepth2ImgPipeline": {"depth_map": noisy(1, 16, 16)},
    "StableDiffusionDiffEditPipeline": {
        "image_latents": lambda at: noise(at, (3, 6, 4, 5)[at], 4, 8, 8),
        "mask_image": lambda at: torch.ones(1, 8, 8),
        "inpaint_strength": 1.0,
    },
    "StableDiffusionGLIGENPipeline": {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]},
    "StableDiffusionPix2PixZeroPipeline": {
        "source_embeds": noisy(2, 77, 32),
        "target_embeds": noisy(2, 77, 32, other=1),
    },
    "StableDiffusionXLControlNetUnion...": {"control_mode": [0]},
    "TextToVideoZero...": {"t0": 1, "t1": 2},
    "UnCLIP...": {
        "decoder_num_inference_steps": lambda at: (3, 6, 4, 5)[at],
        "super_res_num_inference_steps": 2,
        "decoder_guidance_scale": lambda at: (5.0, 1.0, 2.5, 7.5)[at],
    },
    "UnCLIPImageVariationPipeline": {"prompt": ..., "image": pictured(32)},
    "VersatileDiffusionImageVariationPipeline": {"negative_prompt": ...},
    "VisualCloze...": {
        "task_prompt": "a task",
        "content_prompt": lambda at: PROMPTS[at],
        "image": lambda at: [[picture(at), picture(at + 1)], [picture(at + 2), None]],
    },
    "WanImageToVideoPipeline": EMBEDS,
    "WanVideoToVideoPipeline": EMBEDS,
    "WanVACEPipeline": {**EMBEDS, "video": ..., "mask": ...},
    "WuerstchenDecoderPipeline": {"image_embeddings": noisy(1, 4, 4, 4)},
    "ZImageOmniPipeline": {"image": ...},
}
