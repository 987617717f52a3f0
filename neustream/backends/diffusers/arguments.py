"""What arguments of a call can never be, whatever the pipeline: told by name, at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from neustream.backends.diffusers.signatures import CallSignature, Kind
from neustream.errors import RequestError, shown

WHOLE = frozenset(("height", "width", "num_frames", "video_length", "batch_size"))
"""Whole numbers of at least 1, beside all whose names end as below."""
STEPS = "num_inference_steps"
ENDINGS = (STEPS, "_per_prompt")
MOST_STEPS = 100_000
"""More denoising steps nobody waits for; schedulers make tables of all of them."""
LABELS = "class_labels"
TENSORS = ("latents", "_embeds")
"""How names of tensors end."""
LEAST_DIMENSIONS = 2
"""Of such tensors."""
IMAGES = frozenset(("image", "mask_image", "control_image", "ip_adapter_image"))
NEGATIVE = frozenset(("negative_prompt", "negative_prompt_2", "negative_prompt_3"))
MAY_BE_NONE = frozenset(("max_sequence_length",))
"""Numbers that tokenizers do without, whatever pipelines say."""
NUMBER: frozenset[Kind] = frozenset(("number",))
Check = Callable[[str, Any], None]


def check_arguments(named: Mapping[str, Any], signature: CallSignature, device: torch.device) -> None:
    """RequestError for an argument that no pipeline takes.

    Args:
        named: the arguments; signature: of the pipeline's call.
        device: that the pipeline runs on.
    """
    for name, value in named.items():
        if value is None:
            _check_none(name, named, signature)
            continue
        if isinstance(value, list | tuple) and not value and (name in IMAGES or name == "prompt"):
            raise RequestError(f"{name} is an empty list")
        for check in _by_name(name):
            check(name, value)
        check_kind = _by_kind(name, signature)
        if check_kind is not None:
            check_kind(name, value)
    _check_generators(named.get("generator"), device)


def _by_name(name: str) -> Iterator[Check]:
    """What has to be looked at in an argument, by its name."""
    if name in WHOLE or name.endswith(ENDINGS):
        yield _check_whole
    if name in IMAGES:
        yield _check_image
    if "prompt" in name:
        yield _check_text
    if name in NEGATIVE:
        yield _check_words
    if name == "clip_skip":
        yield _check_layers
    if name in ("timesteps", "sigmas"):
        yield _check_numbers
    if "callback" in name and not name.endswith(("_inputs", "_steps")):
        yield check_callable


def _by_kind(name: str, signature: CallSignature) -> Check | None:
    """What has to be looked at in an argument, by its annotation and its default."""
    default = signature.defaults.get(name)
    if name == LABELS:
        return None  # `check_labels` says more
    if name.endswith(TENSORS) and default is None:
        return _check_tensor
    kinds = signature.kinds.get(name, frozenset()) - {"none"}
    if not kinds or "other" in kinds:
        plain = isinstance(default, int | float) and not isinstance(default, bool)
        return _check_numeric if plain else None
    if kinds == NUMBER:
        return _check_number
    if kinds == {"numbers"}:
        return _check_numbers
    if kinds == {"number", "numbers"}:
        return _check_one_or_more
    if "texts" in kinds and kinds <= {"text", "texts"}:
        return _check_prompt if name == "prompt" else _check_words
    return _check_mapping if kinds == {"mapping"} else None


def _check_none(name: str, named: Mapping[str, Any], signature: CallSignature) -> None:
    """RequestError for None in place of a number that has a default."""
    if name == STEPS and (named.get("timesteps") is not None or named.get("sigmas") is not None):
        return
    if name in MAY_BE_NONE | signature.optional or signature.defaults.get(name) is None:
        return
    kinds = signature.kinds.get(name, frozenset())
    if name.endswith("_per_prompt"):
        _check_whole(name, None)
    if kinds == NUMBER:
        _check_number(name, None)


# -- numbers --------------------------------------------------------------------------------------


def _check_whole(name: str, value: Any) -> None:
    most = MOST_STEPS if name.endswith(STEPS) else math.inf
    for one in value if isinstance(value, list | tuple) else [value]:
        whole = isinstance(one, int | np.integer) and not isinstance(one, bool)
        if not whole or not 1 <= one <= most:
            allowed = "of at least 1" if most == math.inf else f"from 1 to {most}"
            raise RequestError(f"{name} must be a whole number {allowed}, got {shown(value)}")


def _check_layers(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number, got {shown(value)}")


def _is_number(value: Any) -> bool:
    """Whether a value is one number: Python's, numpy's, or a tensor's without dimensions."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_number(name: str, value: Any) -> None:
    if not _is_number(value):
        raise RequestError(f"{name} must be a number, got {shown(value)}")
    _check_finite(name, value, "a finite number")


def _check_numeric(name: str, value: Any) -> None:
    """Of an argument whose default is a number, and which may be anything else."""
    if isinstance(value, str | bytes | bool):
        raise RequestError(f"{name} must be a number, got {shown(value)}")
    _check_finite(name, value, "a finite number")


def _check_numbers(name: str, value: Any) -> None:
    _check_all(name, value, "a list of numbers")


def _check_one_or_more(name: str, value: Any) -> None:
    values = [value] if _is_number(value) else value
    _check_all(name, values, "a number or a list of numbers")


def _check_all(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, torch.Tensor | np.ndarray):
        return
    if not isinstance(value, list | tuple | range) or not all(map(_is_number, value)):
        raise RequestError(f"{name} must be {allowed}, got {shown(value)}")
    for one in value:
        _check_finite(name, one, "finite")


def _check_finite(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise RequestError(f"{name} must be {allowed}, got {shown(value)}")


def check_labels(labels: Any, most: int | None) -> None:
    """RequestError for classes that are none: a GPU that looks them up is lost to everybody.

    `most`: the last class; None: it is not known.
    """
    if labels is None or (isinstance(labels, torch.Tensor) and labels.device.type != "cpu"):
        return  # what is on the device is not read here
    values = labels.tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
    if not isinstance(values, list | tuple) or not values:
        raise RequestError(f"class_labels must be a list of whole numbers, got {shown(labels)}")
    allowed = f"whole numbers from 0 to {most}" if most else "whole numbers of at least 0"
    for one in values:
        whole = isinstance(one, int | np.integer) and not isinstance(one, bool)
        if not whole or not 0 <= one <= (math.inf if most is None else most):
            raise RequestError(f"class_labels must be {allowed}, got {shown(labels)}")


# -- other kinds ----------------------------------------------------------------------------------


def _check_image(name: str, value: Any) -> None:
    for one in _listed(value):
        if one is not None and not isinstance(one, Image.Image | np.ndarray | torch.Tensor | list | tuple | Mapping):
            kinds = "a PIL image, an array, a tensor, or a list of them"
            raise RequestError(f"{name} must be {kinds}, got {shown(value)}")


def _check_prompt(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):  # prompts by frame
        _check_words(name, value)


def _check_words(name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise RequestError(f"{name} must be text or a list of texts, got {shown(value)}")


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a mapping, got {shown(value)}")


def _check_tensor(name: str, value: Any) -> None:
    if isinstance(value, str | bytes | bool | int | float | np.ndarray):
        raise RequestError(f"{name} must be a tensor or a list of them, got {shown(value)}")
    for one in _listed(value):
        if not isinstance(one, torch.Tensor):
            continue
        if not one.is_floating_point():
            raise RequestError(f"{name} must be of floating point numbers, got {one.dtype}")
        if one.ndim < LEAST_DIMENSIONS:
            allowed = f"have {LEAST_DIMENSIONS} dimensions or more, the first one of samples"
            raise RequestError(f"{name} must {allowed}, got the shape {list(one.shape)}")


def _check_text(name: str, value: Any) -> None:
    for text in _listed(value):
        if not isinstance(text, str):
            continue
        at = next((at for at, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is not None:
            what = f"has half of a surrogate pair at character {at}, which is no text"
            raise RequestError(f"{name} {what}")


def check_callable(name: str, value: Any) -> None:
    """RequestError if `value` cannot be called; None is no value."""
    if value is not None and not callable(value):
        raise RequestError(f"{name} must be a function, got {shown(value)}")


def _listed(value: Any) -> Any:
    """What is in a list, or the one value."""
    return value if isinstance(value, list | tuple) else [value]


def _check_generators(given: Any, device: torch.device) -> None:
    if given is None:
        return
    for one in given if isinstance(given, list) else [given]:
        if one is None:  # that sample draws from torch's own
            continue
        if not isinstance(one, torch.Generator):
            kinds = "a torch.Generator or a list of them"
            raise RequestError(f"generator must be {kinds}, got {shown(given)}")
        if one.device.type not in ("cpu", device.type):
            where = f"is on {one.device}, the pipeline on {device}"
            raise RequestError(f"generator {where}; one on the CPU always goes")
