"""Models of a pipeline whose weights are not here: others run them (roles of a cluster).

Such a model is on torch's meta device: its settings, its dtype and the shapes of what it says are known.
A request that comes to it fails. Where a call is only looked at or timed, zeros of these shapes stand for
what it would say, so that whoever has a part of a pipeline knows what its requests look like there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from neustream.backends.diffusers.calls import Part
from neustream.backends.diffusers.foreign import offloaded
from neustream.backends.diffusers.results import rebuilt
from neustream.errors import StageFailed, told


def is_lacking(model: torch.nn.Module) -> bool:
    """Whether the weights of a model are not here. Those that are offloaded come back at each call."""
    weight = next(model.parameters(), None)
    return weight is not None and weight.is_meta and not offloaded(model)


def refusing(part: Part, device: torch.device) -> Part:
    """A part of a model that is not here, as requests are served with it on `device`: not at all."""
    return _with(part, _Refusing(part.name), device)


def shaped(part: Part, device: torch.device) -> Part:
    """The same where calls are looked at: zeros on `device`, of the shapes of what the model says."""
    return _with(part, _Shaped(part.name, part.function, device), device)


def _with(part: Part, function: Any, device: torch.device) -> Part:
    other = copy.copy(part)
    other.function, other.place, other.reused = function, device, False
    return other


class _Refusing:
    """In place of a model that is not here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise StageFailed(f"{self._name} is called here, and its weights are not loaded here")


class _Shaped:
    """What a model would say, as zeros."""

    def __init__(self, name: str, function: Any, device: torch.device) -> None:
        self._name, self._function, self._device = name, function, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with _Unanswered():
                said = self._function(*_on_meta(args), **_on_meta(kwargs))
        except Exception as error:
            raise StageFailed(
                f"{self._name} is not loaded here, and what it says cannot be told without its weights: {told(error)}"
            ) from error
        return rebuilt(said, lambda tensor: torch.zeros_like(tensor, device=self._device), strict=False)


class _Unanswered(TorchFunctionMode):
    """Whether something holds of values that there are not (that a mask hides nothing): no."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def _on_meta(value: Any) -> Any:
    """Arguments with tensors that have no data."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {name: _on_meta(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_on_meta, value))
    return value
