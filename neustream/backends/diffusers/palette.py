"""A Palette-style pipeline: an image made from another one by diffusion in pixel space.

After "Palette: Image-to-Image Diffusion Models" (Saharia et al., 2022): the denoiser sees the noisy image
beside the image to start from, channel by channel. diffusers has no such pipeline; this one is written
like its own (load, save, call), and knows nothing of serving.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class PalettePipeline(DiffusionPipeline):
    """Colorization, inpainting, restoration, by a UNet that takes 3 noisy and 3 given channels.

    Args:
        unet: a `UNet2DModel` with `in_channels` = `out_channels` + the given image's channels.
        scheduler: any diffusers scheduler (DDPM in the paper).
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def check_inputs(self, image: Any, output_type: str) -> None:
        if not isinstance(image, Image.Image | torch.Tensor | list):
            raise ValueError(f"`image` has to be a PIL image, a tensor or a list of them, got {type(image).__name__}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` has to be one of pil, np and pt, got {output_type!r}")

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make an image from `image` (PIL, or a tensor (B, C, H, W) in [0, 1]).

        Returns an `ImagePipelineOutput`, or a tuple with its images.
        """
        self.check_inputs(image, output_type)
        device, config = self._execution_device, self.unet.config
        given = self.image_processor.preprocess(image).to(device, self.unet.dtype)
        shape = (len(given), config.out_channels, *given.shape[2:])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        sample = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        sample = sample * self.scheduler.init_noise_sigma
        self._num_timesteps = len(timesteps)
        for t in self.progress_bar(timesteps):
            scaled = self.scheduler.scale_model_input(sample, t)
            noise = self.unet(torch.cat([scaled, given], dim=1), t, return_dict=False)[0]
            sample = self.scheduler.step(noise, t, sample, generator=generator, return_dict=False)[0]
        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
