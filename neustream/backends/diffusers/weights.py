"""Whether somebody wrote to the weights of a model, or put others in their place."""

from __future__ import annotations

import torch

from neustream.backends.torch import Samples

PLAIN = (torch.Tensor, torch.nn.Parameter)


class Weights:
    """A model's weights as they were.

    What is written to them in torch's sight is counted by torch. What is written through
    `weight.data` is not: it shows in samples.

    Args:
        casts: whether stock calls cast the model and cast it back, which changes no value. While it is
            cast nothing is sampled, and never on other threads than the device's.
    """

    def __init__(self, model: torch.nn.Module, *, casts: bool = False) -> None:
        self._casts = casts
        self._weights = [weight for weight in model.parameters() if not weight.is_inference()]
        self._there = [weight for weight in self._weights if not weight.is_meta and type(weight) in PLAIN]
        self._dtype = next((weight.dtype for weight in self._weights), None)
        self._versions = [weight._version for weight in self._weights]
        self._find()
        self._values = self._samples.read()

    def written(self, *, sampled: bool) -> str:
        """What happened to them; empty: nothing. `sampled`: look into them, which waits for the device."""
        if [weight._version for weight in self._weights] != self._versions:
            return "weights were written to"
        if self._casts and (not sampled or self._cast()):
            return ""
        moved = [weight.data_ptr() for weight in self._there] != self._addresses
        if moved:  # maybe there and back
            self._find()
        if (moved or sampled) and self._samples.read() != self._values:
            return "weights were replaced" if moved else "weights were written to"
        return ""

    def _cast(self) -> bool:
        return any(weight.dtype != self._dtype for weight in self._weights[:1])

    def _find(self) -> None:
        self._addresses = [weight.data_ptr() for weight in self._there]
        self._samples = Samples(self._there)
