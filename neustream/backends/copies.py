"""A model on several devices, or several times on one: what its copies share, and what not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from neustream.backends.torch import device_of, free_on
from neustream.errors import BackendError, told

Model = TypeVar("Model")
Parts = Callable[[Any], Iterable[torch.nn.Module]]


def itself(model: Any) -> Iterator[torch.nn.Module]:
    """The modules of a model that is one."""
    yield model


def to_device(model: Any, device: torch.device) -> None:
    """A model on a device, which has a method for that."""
    model.to(device)


def copies(
    model: Model,
    places: Sequence[str],
    parts: Parts = itself,
    to: Callable[[Any, torch.device], object] = to_device,
) -> list[Model]:
    """A model for each of `places`; the first is `model` itself, moved there.

    Another device gets a copy. Models on one device share their weights, and nothing else: threads
    call them at the same time, and some write down what they have in buffers and attributes.

    Args:
        model: a torch module, or something of several with `to`.
        parts: the modules that it is made of, those that are to be moved.
        to: moves it.

    Raises:
        BackendError: a device that is not there, or has no memory for the weights; or a model that cannot be copied.
    """
    devices = [device_of(place) for place in places]
    _move(model, devices[0], parts, to)
    on: dict[torch.device, Model] = {devices[0]: model}
    made = [model]
    for device in devices[1:]:
        if device in on:
            made.append(twin(on[device], parts))
            continue
        on[device] = _copy(model, {})
        _move(on[device], device, parts, to)
        made.append(on[device])
    return made


def twin(model: Model, parts: Parts = itself) -> Model:
    """The same model again, on the same weights."""
    weights = [weight for part in parts(model) for weight in part.parameters()]
    return _copy(model, {id(weight): weight for weight in weights})


def _move(model: Any, device: torch.device, parts: Parts, to: Callable[[Any, torch.device], object]) -> None:
    """To `device`, unless all of it is there, or moves by itself (offloading)."""
    for part in parts(model):
        hooked = hasattr(part, "_hf_hook")
        weight = next(part.parameters(), None)
        if weight is not None and weight.device != device and not hooked:
            _check_memory(model, device, parts)
            to(model, device)
            return


def _check_memory(model: Any, device: torch.device, parts: Parts) -> None:
    """BackendError if a device has no memory for the weights of a model that are elsewhere: a half is not moved."""
    there = [weight for part in parts(model) for weight in (*part.parameters(), *part.buffers())]
    needed = sum([weight.nbytes for weight in there if not _is_on(weight, device)])
    free = free_on(device)
    if free is not None and needed > free:
        name = type(model).__name__
        raise BackendError(f"{name} has {needed:,} bytes of weights to be moved to {device}, where {free:,} are free")


def _is_on(weight: torch.Tensor, device: torch.device) -> bool:
    """Whether a weight is on a device, which may be told without its number."""
    there = weight.device
    return there.type == device.type and (device.index is None or there.index == device.index)


def _copy(model: Model, shared: dict[int, object]) -> Model:
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:  # whatever objects a model holds
        raise BackendError(
            f"{type(model).__name__} cannot be on several devices: copying it raised {told(error)}"
        ) from error
