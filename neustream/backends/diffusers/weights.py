"""Whether somebody wrote to the weights of a model, or put others in their place."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from neustream.backends.torch import Samples

PLAIN = (torch.Tensor, torch.nn.Parameter)
VERSION = operator.attrgetter("_version")
"""How often torch saw a tensor being written to."""
LARGEST = 64
"""Lists of more tensors are no tables."""


class Weights:
    """A model's weights as they were: parameters, buffers, and tables that modules keep as attributes.

    What is written to them in torch's sight is counted by torch. What is written through
    `weight.data` is not: it shows in samples, one value of each.

    Args:
        casts: whether stock calls cast the model and cast it back, which changes no value. While it is
            cast nothing is sampled, and never on other threads than the device's.
    """

    def __init__(self, model: torch.nn.Module, *, casts: bool = False) -> None:
        self._model = model
        self._casts = casts
        self._note()
        self._dtype = self._weights[0].dtype if self._weights else None
        self._values = self._samples.read()

    def written(self, *, sampled: bool) -> str:
        """What happened to them; empty: nothing. `sampled`: look into them, which waits for the device."""
        if list(map(VERSION, self._counted)) != self._versions:
            return "weights were written to"
        if self._casts and (not sampled or self._cast()):
            return ""
        moved = list(map(torch.Tensor.data_ptr, self._there)) != self._addresses
        if moved:  # maybe there and back
            self._note()
        if (moved or sampled) and self._samples.read() != self._values:
            return "weights were replaced" if moved else "weights were written to"
        return ""

    def _cast(self) -> bool:
        return any(weight.dtype != self._dtype for weight in self._weights[:1])

    def _note(self) -> None:
        """Where they are, and how often they were written to."""
        self._weights = list(_weights_of(self._model))
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._versions = list(map(VERSION, self._counted))
        self._there = [weight for weight in self._weights if not weight.is_meta and type(weight) in PLAIN]
        self._addresses = list(map(torch.Tensor.data_ptr, self._there))
        self._samples = Samples(self._there)


def _weights_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All that its modules keep: first the parameters."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in module.__dict__.values():
            several = isinstance(value, list | tuple) and len(value) <= LARGEST
            for one in value if several else (value,):
                if isinstance(one, torch.Tensor):
                    yield one
