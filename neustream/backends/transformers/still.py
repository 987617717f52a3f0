"""Calls whose tensors stay where they are: a CUDA graph computes with the same memory each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from neustream.backends.transformers.layers import SlotLayer
    from neustream.backends.transformers.slots import Row


class NotReplayed(Exception):
    """A model's decodes are no graphs, and why."""


class Decodes:
    """A decode call whose tensors stay where they are: lane i has a token of the text in slot i.

    Args:
        inputs: [4, lanes]: ids, positions, where keys go in the slot, and lanes whose logits are wanted.
        context: keys of each slot that attention reads.
    """

    rows: Sequence[Row] = ()
    lanes = None
    whole = False

    def __init__(self, inputs: torch.Tensor, context: int) -> None:
        self.ids, self.positions = inputs[0, :, None], inputs[1, :, None]
        self._to, self.wanted = inputs[2], inputs[3]
        self._slots = torch.arange(inputs.shape[1], device=inputs.device)
        self.context, self.start = context, context - 1

    def mask(self) -> torch.Tensor:
        """Which keys each query sees, [lanes, 1, 1, keys]: those of its own slot up to its own position."""
        keys = torch.arange(self.context, device=self.positions.device)
        self._seen = (keys <= self.positions[:, :, None])[:, None]
        return self._seen

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention of a layer: heads that have the same keys are queries of one, which reads them once.

        Stock attention makes a copy of keys and values for each of these heads. `query`: [lanes, heads, 1, width].
        """
        if how.get("position_bias") is not None:
            raise NotReplayed("its attention has a bias by position")
        lanes, heads, _, width = query.shape
        together = query.reshape(lanes, key.shape[1], -1, width)
        found = scaled_dot_product_attention(together, key, value, self._seen, scale=how.get("scaling"))
        return found.reshape(lanes, 1, heads, -1), None

    def update(self, layer: SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what a layer computed, [lanes, heads, 1, width] each, into its slots; what attention reads, a view."""
        for storage, states in ((layer.keys, keys), (layer.values, values)):
            storage[self._slots, :, self._to] = states[:, :, 0]
        count = len(self._slots)
        return layer.keys[:count, :, : self.context], layer.values[:count, :, : self.context]


class Prompt(Decodes):
    """The call of a prompt whose tensors stay where they are; it begins with the text's first token.

    Args:
        inputs: [5, tokens]: ids, positions, where keys go in the slot, the slot, and first the place whose logits
            are wanted.
    """

    def __init__(self, inputs: torch.Tensor) -> None:
        self.ids, self.positions = inputs[0:1], inputs[1:2]
        self._to, self._slots, self.wanted = inputs[2], inputs[3], inputs[4, :1]
        self.context, self.start = inputs.shape[1], 0

    def update(self, layer: SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what a layer computed, [1, heads, tokens, width] each, into the slot; attention reads it as it is."""
        for storage, states in ((layer.keys, keys), (layer.values, values)):
            storage[self._slots, :, self._to] = states[0].transpose(0, 1)
        return keys, values
