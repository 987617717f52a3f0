"""What arguments of a call can never be, whatever the pipeline: told by name, at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from neustream.errors import RequestError, shown

WHOLE = frozenset(("height", "width", "num_frames", "video_length", "batch_size"))
"""Whole numbers of at least 1, beside all whose names end as below."""
ENDINGS = ("num_inference_steps", "_per_prompt")
TENSORS = ("latents", "_embeds")
"""How names of tensors end."""
IMAGES = frozenset(("image", "mask_image", "control_image", "ip_adapter_image"))


def check_arguments(named: Mapping[str, Any], defaults: Mapping[str, Any], device: torch.device) -> None:
    """RequestError for an argument that no pipeline takes.

    Args:
        named: the arguments; defaults: of the pipeline's own, by name.
        device: that the pipeline runs on.
    """
    for name, value in named.items():
        if value is None:
            continue
        if isinstance(value, list | tuple) and not value and (name in IMAGES or name == "prompt"):
            raise RequestError(f"{name} is an empty list")
        for check in _checks(name, defaults.get(name)):
            check(name, value)
    for one in _listed(named.get("generator")):
        if one is not None:
            _check_generator(one, device)


def _checks(name: str, default: Any) -> Iterator[Callable[[str, Any], None]]:
    """What has to be looked at in an argument, by its name and by its default."""
    if name in WHOLE or name.endswith(ENDINGS):
        yield _check_whole
    elif isinstance(default, int | float) and not isinstance(default, bool):
        yield _check_number
    if name in IMAGES:
        yield _check_image
    if "prompt" in name:
        yield _check_text
    if name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3"):
        yield _check_words
    if name.endswith(TENSORS) and default is None:
        yield _check_tensor
    if name == "clip_skip":
        yield _check_number
    if name in ("timesteps", "sigmas"):
        yield _check_numbers
    if "callback" in name and not name.endswith(("_inputs", "_steps")):
        yield check_callable


def _check_whole(name: str, value: Any) -> None:
    numbers = value if isinstance(value, list | tuple) else [value]
    for one in numbers:
        if isinstance(one, bool | np.bool_) or not isinstance(one, int | np.integer) or one < 1:
            raise RequestError(f"{name} must be a whole number of at least 1, got {shown(value)}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, str | bytes | bool):
        raise RequestError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {shown(value)}")


def _check_image(name: str, value: Any) -> None:
    for one in _listed(value):
        if one is not None and not isinstance(one, Image.Image | np.ndarray | torch.Tensor | list | tuple | Mapping):
            kinds = "a PIL image, an array, a tensor, or a list of them"
            raise RequestError(f"{name} must be {kinds}, got {shown(value)}")


def _check_numbers(name: str, value: Any) -> None:
    if isinstance(value, str | bytes | bool):
        raise RequestError(f"{name} must be a list of numbers, got {shown(value)}")


def _check_words(name: str, value: Any) -> None:
    if not isinstance(value, str | list | tuple):
        raise RequestError(f"{name} must be text or a list of texts, got {shown(value)}")


def _check_tensor(name: str, value: Any) -> None:
    if isinstance(value, str | bytes | bool | int | float | np.ndarray):
        raise RequestError(f"{name} must be a tensor or a list of them, got {shown(value)}")


def _check_text(name: str, value: Any) -> None:
    for text in _listed(value):
        if not isinstance(text, str):
            continue
        at = next((at for at, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is not None:
            raise RequestError(f"{name} has half of a surrogate pair at character {at}, which is no text")


def check_callable(name: str, value: Any) -> None:
    """RequestError if `value` cannot be called; None is no value."""
    if value is not None and not callable(value):
        raise RequestError(f"{name} must be a function, got {shown(value)}")


def _listed(value: Any) -> Any:
    """What is in a list, or the one value."""
    return value if isinstance(value, list | tuple) else [value]


def _check_generator(generator: Any, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise RequestError(f"generator must be a torch.Generator or a list of them, got {shown(generator)}")
    if generator.device.type not in ("cpu", device.type):
        raise RequestError(f"generator is on {generator.device}, the pipeline on {device}; one on the CPU always goes")
