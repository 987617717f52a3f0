"""A language model on several devices, or several times on one: what its replicas share, and what not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from neustream.backends.torch import device_of
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Texts
from neustream.engine.executor import ThreadExecutor
from neustream.errors import BackendError, shown, told


@dataclass(frozen=True)
class Replica:
    """One copy that serves: its KV slots, what is in them, and the thread that calls it."""

    model: LanguageModel
    texts: Texts
    executor: ThreadExecutor


def places_of(device: str | None, devices: Sequence[str] | None) -> list[str] | None:
    """The device of each replica; None: one, where the model is. BackendError for what names none."""
    if devices is None:
        return None if device is None else [device]
    if device is not None:
        raise BackendError("give device (one replica) or devices (one on each), not both")
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise BackendError(f"devices must be a list of device names, as ['cpu', 'cpu'], got {shown(devices)}")
    for name in devices:
        if not isinstance(name, str):
            raise BackendError(f"devices: a device is a name, as 'cpu', got {shown(name)}")
    return list(devices)


def replicate(model: PreTrainedModel, devices: Sequence[str]) -> list[PreTrainedModel]:
    """A model for each of `devices`; the first is `model` itself, moved there.

    Another device gets a copy. Models on one device share their weights, and nothing else: threads call
    them at the same time, and some write down what they have in buffers and attributes.

    Raises:
        BackendError: a device that is not there, or a model that cannot be copied.
    """
    places = [device_of(name) for name in devices]
    model.to(places[0])
    on: dict[torch.device, PreTrainedModel] = {places[0]: model}
    models = [model]
    for place in places[1:]:
        if place in on:
            models.append(twin(on[place]))
            continue
        on[place] = _copy(model, {}).to(place)
        models.append(on[place])
    return models


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model again, on the same weights."""
    return _copy(model, {id(weight): weight for weight in model.parameters()})


def _copy(model: PreTrainedModel, shared: dict[int, object]) -> PreTrainedModel:
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:  # whatever objects a model holds
        raise BackendError(f"{type(model).__name__} cannot have replicas: copying it raised {told(error)}") from error
