"""How much a call asks to be computed, by its arguments: pixels that no device has room or time for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from neustream.backends.diffusers.request import samples_of
from neustream.errors import RequestError, shown

MOST_PIXELS = 1 << 27
"""Of one call: 129 frames of 1280 x 720, or 8 pictures of 4096 x 4096."""
MOST_SIDE = 1 << 14
"""Attention over one side of more pixels ends no more than that over too many pixels."""
MOST_SECONDS = 3600
"""Of sound."""
SIDES = ("height", "width")
FRAMES = ("num_frames", "video_length")
SECONDS = ("audio_length_in_s", "audio_end_in_s")
PICTURES = ("image", "init_image", "mask_image", "control_image")


def check_extent(pipe: DiffusionPipeline, whole: Mapping[str, Any], most: int) -> None:
    """RequestError for a call that makes more than `most` pixels, of all its samples and frames.

    Args:
        whole: the arguments, with the pipeline's defaults for those that were not given. Sides that
            it does not say are those of a picture or of latents that it brings, or the pipeline's own.
    """
    for name in SECONDS:
        value = whole.get(name)
        if isinstance(value, Real) and float(value) > MOST_SECONDS:
            raise RequestError(f"{name} must be at most {MOST_SECONDS} seconds, got {shown(value)}")
    height, width = (_side(whole, at, pipe) for at in (0, 1))
    frames = next((int(whole[name]) for name in FRAMES if _is_whole(whole.get(name))), 1)
    samples = samples_of(whole)
    pixels = height * width * frames * samples
    if pixels > most:
        of = f"{samples} sample(s) of {frames} frame(s) of {height} x {width}"
        raise RequestError(f"{of} pixels (height x width) are {pixels}, more than max_pixels={most}")


def _side(whole: Mapping[str, Any], at: int, pipe: DiffusionPipeline) -> int:
    """The height (0) or the width (1) of what a call makes."""
    what, side = max(_says(whole, at, pipe), key=lambda said: said[1], default=("", 1))
    if side > MOST_SIDE:
        raise RequestError(f"{what} must be at most {MOST_SIDE} pixels in {SIDES[at]}, got {side}")
    return side


def _says(whole: Mapping[str, Any], at: int, pipe: DiffusionPipeline) -> Iterator[tuple[str, int]]:
    """Which arguments say a side, and how long it is."""
    factor = getattr(pipe, "vae_scale_factor", 1)
    factor = factor if _is_whole(factor) else 1
    latents = whole.get("latents")
    if isinstance(latents, torch.Tensor) and latents.ndim >= 4:
        yield "latents", latents.shape[at - 2] * factor
    value = whole.get(SIDES[at])
    if _is_whole(value):
        yield SIDES[at], int(value)
        return
    sizes = {name: _size(whole.get(name)) for name in PICTURES}
    found = [(name, size[at]) for name, size in sizes.items() if size is not None]
    usual = getattr(pipe, "default_sample_size", None)
    if found:
        yield found[0]
    elif _is_whole(usual):
        yield SIDES[at], usual * factor


def _size(picture: Any) -> tuple[int, int] | None:
    """Height and width of a picture, or of the first one of a list; None: it cannot be told."""
    if isinstance(picture, list | tuple) and picture:
        picture = picture[0]
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    shape: Sequence[int] = getattr(picture, "shape", ())
    if isinstance(picture, torch.Tensor) and len(shape) >= 2:
        return shape[-2], shape[-1]
    if isinstance(picture, np.ndarray) and len(shape) >= 3:
        return shape[-3], shape[-2]
    return None


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
