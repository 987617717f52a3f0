"""The arguments of one call: by name, for trials, and what they say of its cost."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from neustream.backends.diffusers.signatures import signature_of
from neustream.errors import RequestError

COUNTS = {"num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"}
SIZES = {"height", "width", "num_frames", "video_length", "max_sequence_length", "audio_length_in_s", "clip_skip"}
"""Arguments that the shape of a request's tensors follows from, beside the shapes of what it brings."""
PLAIN = {"num_inference_steps", "device", "timesteps", "sigmas", "mu", "custom_timesteps"}
"""Parameters of a scheduler's `set_timesteps` without which it takes the same numbers of steps."""
BATCHES = ("prompt", "class_labels", "prompt_embeds", "image")
"""Arguments that say how many samples a request has, the first one given decides."""


@dataclass(frozen=True, slots=True)
class StockCall:
    """A call as its caller made it: its arguments, those with the pipeline's defaults, its kind.

    `stepped`: the pipeline's schedulers as they were then, by name.
    """

    named: dict[str, Any]
    whole: Mapping[str, Any]
    kind: Hashable
    steps: int
    samples: int
    on_step: Callable[[Any], None] | None
    stepped: Mapping[str, Any]


def named_arguments(pipe: DiffusionPipeline, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; TypeError, as of a call, if they do not fit the pipeline's signature."""
    try:
        return signature_of(pipe).named(args, kwargs)
    except TypeError as error:
        raise TypeError(f"{type(pipe).__name__}.__call__() {error}") from None


def without_side_effects(named: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for a trial: no callbacks, containers and generators that are copies.

    `whole` has the defaults of the others.
    """
    trial = {name: _copied(value) for name, value in named.items() if not ("callback" in name and callable(value))}
    if "generator" in whole:
        trial["generator"] = _cloned(named.get("generator"))
    return trial


def _copied(value: Any) -> Any:
    """A container of its own: some calls take something out of theirs."""
    return copy.copy(value) if type(value) in (dict, list) else value


def shortened(named: Mapping[str, Any], steps: int | None, whole: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for a trial of so many steps, or of as many as it has (None); `whole` has all.

    Fewer steps than a call asks for may be none that the pipeline can take.
    """
    trial = without_side_effects(named, whole)
    if steps is None or not can_shorten(whole):
        return trial
    if trial.get("output_type") == "latent":
        del trial["output_type"]  # others will want theirs decoded
    trial["num_inference_steps"] = steps
    return trial


def can_shorten(whole: Mapping[str, Any]) -> bool:
    """Whether the number of steps is the only thing that says how many there are."""
    return "num_inference_steps" in whole and all(whole.get(name) is None for name in ("timesteps", "sigmas"))


def tensors_of(named: Mapping[str, Any], pipe: DiffusionPipeline | None) -> str:
    """The tensors that a call brought, with their types and shapes, in words; empty if it brought none."""
    found = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not found:
        return ""
    shapes = ", ".join(f"{name} as {value.dtype} {list(value.shape)}" for name, value in found.items())
    return shapes if pipe is None else f"{shapes}; the pipeline is in {pipe.dtype}"


def _cloned(generator: Any) -> Any:
    if isinstance(generator, list):
        return [_cloned(one) for one in generator]
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    return torch.Generator().manual_seed(0) if generator is None else generator


def samples_of(named: Mapping[str, Any]) -> int:
    """How many images (videos) a call makes."""
    count = 1
    for name in BATCHES:
        value = named.get(name)
        if value is None:
            continue
        if isinstance(value, list | tuple | torch.Tensor | np.ndarray) and not (name == "image" and _is_one(value)):
            count = len(value)
        break
    for name in COUNTS:
        if isinstance(each := named.get(name), int | np.integer):
            count *= int(each)
    return max(count, 1)


def _is_one(image: Any) -> bool:
    return isinstance(image, torch.Tensor | np.ndarray) and image.ndim < 4


def kind_of(named: Mapping[str, Any]) -> Hashable:
    """What decides over the shapes of a call's tensors: calls of one kind are alike but for their content."""
    kind: list[Hashable] = [samples_of(named)]
    for name, value in sorted(named.items()):
        if name in SIZES:
            kind.append((name, value))
        elif name.endswith("guidance_scale") and isinstance(value, int | float):
            kind.append((name, value > 1))
        elif (shape := _shape(value)) is not None:
            kind.append((name, shape))
    return tuple(kind)


def _shape(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, torch.Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, Image.Image):
        return tuple(value.size)
    if isinstance(value, list | tuple) and value and _shape(value[0]) is not None:
        return tuple(_shape(one) for one in value)
    return None


class StepCounts:
    """How many denoising steps calls take with a pipeline's scheduler (Heun: 2 n - 1, PNDM: n + 1, most: n)."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._scheduler: Any = None
        self._known: dict[int, int] = {}

    def of(self, named: Mapping[str, Any]) -> int:
        """Expected steps of a call, from its arguments and the pipeline's defaults.

        RequestError if the scheduler cannot take so many.
        """
        for own in ("timesteps", "sigmas"):
            if isinstance(given := named.get(own), list):
                return max(len(given), 1)
        given = [
            int(value)
            for name, value in named.items()
            if name.endswith("num_inference_steps") and isinstance(value, int | np.integer)
        ]
        steps = self._calls(given[0]) if len(given) == 1 else sum(given)
        strength = named.get("strength")
        if isinstance(strength, int | float) and hasattr(self._pipe, "get_timesteps"):
            steps = round(steps * min(max(strength, 0.0), 1.0))
        return max(steps, 1)

    def _calls(self, steps: int) -> int:
        scheduler: Any = getattr(self._pipe, "scheduler", None)
        if self._scheduler is not scheduler:
            self._scheduler, self._known = scheduler, {}
        if steps not in self._known:
            self._known[steps] = steps
            if hasattr(scheduler, "set_timesteps") and not getattr(scheduler.config, "use_dynamic_shifting", False):
                trial: Any = copy.deepcopy(scheduler)
                try:
                    trial.set_timesteps(steps)
                except Exception as error:  # noqa: BLE001  schedulers refuse numbers in ways of their own
                    if set(inspect.signature(trial.set_timesteps).parameters) - PLAIN:
                        return steps  # the call itself may say more than this
                    del self._known[steps]
                    raise RequestError(f"{type(trial).__name__} cannot take {steps} steps: {error}") from None
                self._known[steps] = len(trial.timesteps)
        return self._known[steps]
