"""Lists in the arguments of a call that have to be as long as others: told by name, at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline

from neustream.backends.diffusers.request import samples_of
from neustream.errors import RequestError, shown

PROMPTS = ("prompt", "prompt_embeds", "class_labels")
"""Arguments that say how many samples a call has, whose lists of others are compared with them."""
BESIDE = ("prompt_2", "prompt_3", "prompt_4")
NEGATIVE = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_4")
GUIDANCE = ("true_cfg_scale", "guidance_scale", "prior_guidance_scale")
"""The first one that a pipeline has says whether negative prompts are looked at."""
COUNTED = "list of generators of length"
"""In the source of stock calls that take a generator for each sample, and no more."""
COMPARED = "has batch size"
"""In that of those which compare the number of negative prompts with that of prompts."""
TYPED = "should be the same type to `prompt`"
"""In that of those which take a list of negative prompts for a list of prompts, and else one."""
SPREAD = "* [negative_prompt]"
"""In that of those which take one for all."""


def check_lengths(kind: type, whole: Mapping[str, Any]) -> None:
    """RequestError for a list of texts or generators that no call of its size takes.

    Args:
        kind: the class of the pipeline.
        whole: the arguments, with the pipeline's defaults for those that were not given.
    """
    if not any(whole.get(name) is not None for name in PROMPTS):
        return  # what other arguments say of it is the pipeline's business
    _check_generators(kind, whole)
    count = _texts_of(whole)
    if not count:
        return
    for name in BESIDE:
        _check_count(name, whole.get(name), {count})
    if _is_guided(whole):
        _check_negative(kind, whole, count)


def _check_count(name: str, given: Any, counts: set[int]) -> None:
    if isinstance(given, list | tuple) and len(given) not in counts:
        allowed = f"as many texts as there are prompts, {max(counts)}"
        raise RequestError(f"{name} must be {allowed}, got {len(given)}")


def _check_negative(kind: type, whole: Mapping[str, Any], count: int) -> None:
    one_for_all = set() if _says(kind, COMPARED) else {1}  # the others repeat its rows, or its noise
    for name in NEGATIVE:
        _check_count(name, whole.get(name), {count} | one_for_all)
    prompt, given = whole.get("prompt"), whole.get("negative_prompt")
    typed = _says(kind, TYPED) and not _says(kind, SPREAD)
    if typed and None not in (prompt, given) and isinstance(prompt, str) != isinstance(given, str):
        allowed = "text as prompt is" if isinstance(prompt, str) else "a list as prompt is"
        raise RequestError(f"negative_prompt must be {allowed}, got {shown(given)}")


def _check_generators(kind: type, whole: Mapping[str, Any]) -> None:
    given = whole.get("generator")
    if not isinstance(given, list):
        return
    count, samples = len(given), samples_of(whole)
    fits = count == samples if _says(kind, COUNTED) else count == 1 or count >= samples
    if not fits:
        allowed = f"one, or as many as the call has samples, {samples}"
        raise RequestError(f"generator must be {allowed}, got a list of {count}")


@cache
def _says(kind: type, words: str) -> bool:
    """Whether the source of a pipeline has some words in it."""
    return any(words in _source(cls) for cls in kind.__mro__ if issubclass(cls, DiffusionPipeline))


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # made at run time
        return ""


def _texts_of(whole: Mapping[str, Any]) -> int:
    """How many prompts a call has; 0: it cannot be told."""
    prompt, embeds = whole.get("prompt"), whole.get("prompt_embeds")
    if isinstance(prompt, str):
        return 1
    if isinstance(prompt, list | tuple):
        return len(prompt)
    return embeds.shape[0] if prompt is None and isinstance(embeds, torch.Tensor) else 0


def _is_guided(whole: Mapping[str, Any]) -> bool:
    """Whether a call looks at negative prompts."""
    scale = next((whole[name] for name in GUIDANCE if name in whole), None)
    return isinstance(scale, Real) and float(scale) > 1
