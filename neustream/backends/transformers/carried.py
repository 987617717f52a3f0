"""Keys and values of a request as plain data, on their way from one slot to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from neustream.backends.transformers.slots import Slots
from neustream.errors import StageFailed


@dataclass(frozen=True, slots=True, eq=False)
class KeysAndValues:
    """Keys and values of tokens `first` to `last` of a request, out of a slot.

    `layers`: the bytes of [2, heads, last - first, width] in `dtype`, of each layer, as uint8.
    """

    first: int
    last: int
    dtype: str
    layers: tuple[np.ndarray, ...]

    def check(self, cache: Slots, id: str, model: str, there: int, most: int) -> None:
        """StageFailed if they cannot be put behind the `there` tokens of request `id` in a slot, `most` in all."""
        dtype = cache.used[0].keys.dtype
        sizes = [math.prod(shape) * dtype.itemsize for shape in cache.shapes(self.last - self.first)]
        why = ""
        if str(dtype) != self.dtype or sizes != [one.nbytes for one in self.layers]:
            why = (
                f"they are of {len(self.layers)} layer(s) in {self.dtype}, {model} here has {len(sizes)} in {dtype}, "
                "or other heads"
            )
        elif self.last > cache.length:
            why = f"a slot here has {cache.length} tokens"
        elif self.last > most:
            why = f"its state is of {most} computed tokens"
        elif self.first != there:
            why = f"{there} tokens are there"
        if why:
            raise StageFailed(
                f"keys and values of tokens {self.first} to {self.last} of request {id!r} cannot be used: {why}"
            )

    def states(self, cache: Slots, device: torch.device) -> list[torch.Tensor]:
        """Of each layer [2, heads, last - first, width], as `cache` keeps them."""
        dtype, shapes = cache.used[0].keys.dtype, cache.shapes(self.last - self.first)
        return [
            torch.frombuffer(bytearray(one), dtype=torch.uint8).view(dtype).reshape(shape).to(device)
            for one, shape in zip(self.layers, shapes, strict=True)
        ]


def carried(cache: Slots, slot: int, first: int, last: int) -> KeysAndValues:
    """Those of tokens `first` to `last` in a slot."""
    states = cache.read(slot, first, last)
    layers = tuple(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for x in states)
    return KeysAndValues(first, last, str(states[0].dtype), layers)
