"""Stock diffusers pipelines, served step by step.

`DiT(pipe)` and `StableDiffusion(pipe)` take a pipeline that the user loaded, unchanged, and give the
graph and the stream modules that an engine serves; requests at different timesteps, with
different step counts, seeds and guidance scales, share one call of the denoiser.
"""

from neustream.backends.diffusers.dit import DiT
from neustream.backends.diffusers.stable_diffusion import StableDiffusion

__all__ = ["DiT", "StableDiffusion"]
