"""What tiny requests bring: noise, pictures, masks, embeddings of prompts, by the request's number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ("a cat", "two dogs", "the sea at night", "a red tree on a hill")


def noise(at: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + at))


def noisy(*shape: int, other: int = 0) -> Callable[[int], torch.Tensor]:
    """Noise of a shape, another for each request; `other` tells arguments of one request apart."""
    return lambda at: noise(at + 50 * other, *shape)


def ones(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda at: torch.ones(shape, dtype=torch.long)


def picture(at: int, size: int = 16) -> Image.Image:
    pixels = np.random.RandomState(at).randint(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictured(size: int, other: int = 0) -> Callable[[int], Image.Image]:
    return lambda at: picture(at + 50 * other, size)


def mask(at: int, size: int = 16) -> Image.Image:
    rows = np.where(np.arange(size)[:, None] < size // 4 + at, 255, 0)
    return Image.fromarray(rows.repeat(size, 1).astype(np.uint8))


def masked(size: int) -> Callable[[int], Image.Image]:
    return lambda at: mask(at, size)


EMBEDS: Mapping[str, Any] = {
    "prompt": ...,
    "negative_prompt": ...,
    "prompt_embeds": noisy(1, 8, 32),
    "negative_prompt_embeds": noisy(1, 8, 32, other=1),
}
"""For pipelines whose tokenizer needs files: the prompt's encoding in its place."""
MASKED = {**EMBEDS, "prompt_embeds_mask": ones(1, 8), "negative_prompt_embeds_mask": ones(1, 8)}
ATTENDED = {**EMBEDS, "prompt_attention_mask": ones(1, 8), "negative_prompt_attention_mask": ones(1, 8)}
