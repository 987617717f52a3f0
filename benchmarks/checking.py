"""What it costs to look, before each batch and at each submit, whether a pipeline was changed.

The denoiser and the VAE have the sizes of Stable Diffusion 1.5, on torch's meta device: what is looked
at are modules and their attributes, never weights.

    python benchmarks/checking.py
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch

REPEATS = 200

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d

    from neustream.backends.diffusers.parts import models_of
    from neustream.backends.diffusers.state import State


def pipeline() -> d.DiffusionPipeline:
    """Stable Diffusion 1.5 without its text encoder."""
    four = (128, 256, 512, 512)
    with torch.device("meta"):
        unet = d.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = d.AutoencoderKL(
            block_out_channels=four,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    scheduler = d.DDIMScheduler()
    return d.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)


def main() -> None:
    pipe = pipeline()
    state = State(pipe, models_of, lambda: False)
    modules = sum(1 for _, model in models_of(pipe) for _ in model.modules())
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        assert not state.changed()
        seconds.append(time.perf_counter() - began)
    microseconds = statistics.median(seconds) * 1e6
    print(f"{microseconds:.0f} us to compare {modules} modules with what they were, {microseconds / modules:.2f} each")


if __name__ == "__main__":
    main()
