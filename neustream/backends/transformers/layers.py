"""Keys and values of one layer in all slots, as the caches of stock models keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from neustream.backends.torch import free_on
from neustream.backends.transformers.growing import Growing, grows

if TYPE_CHECKING:
    from neustream.backends.transformers.packed import Packed
    from neustream.backends.transformers.slots import Call
    from neustream.backends.transformers.still import Decodes


def _check_memory(needed: int, beside: int, device: torch.device, slots: int) -> None:
    """MemoryError if a device has not as much memory as keys and values of all slots come to take, and steps beside."""
    free = free_on(device)
    if free is None or needed + beside <= free:
        return
    steps = f", steps {beside:,}" if beside else ""
    room = max(0, free - beside) * slots // needed
    raise MemoryError(f"they may take {needed:,} bytes{steps}, and {free:,} are free: as much as {room} slots take")


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [slots, heads, room, width] each, made at the first call.

    They begin as zeros: attention multiplies what its mask hides by 0, which NaN would survive.

    Args:
        length: tokens that a slot may come to have.
        tokens: that all slots together may have memory for; None: as many as they hold.
        layers: this one and those behind it, which take as much each.
        spare: tokens behind those of each slot, for what nobody reads.
        beside: bytes that steps take.
    """

    def __init__(
        self, slots: int, length: int, tokens: int | None = None, layers: int = 1, spare: int = 0, beside: int = 0
    ) -> None:
        super().__init__()
        self.slots, self.length, self.spare = slots, length, spare
        self.room = length  # tokens of each slot for which there is storage, but for the spare ones
        self.call: Call | Packed | Decodes | None = None
        self._tokens, self._layers, self._beside = slots * length if tokens is None else tokens, layers, beside
        self._growing: tuple[Growing, Growing] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        both, device = (key_states, value_states), key_states.device
        tokens = self._tokens if grows(device) else self.slots * (self.length + self.spare)
        token_bytes = sum([one.shape[1] * one.shape[3] * one.itemsize for one in both])
        _check_memory(tokens * self._layers * token_bytes, self._beside, device, self.slots)
        if grows(device):
            first, second = (self._pages(one) for one in both)
            self._growing = first, second
            self.keys, self.values = first.tensor, second.tensor
        else:
            self.keys, self.values = map(self._whole, both)
        self.is_initialized = True

    def _whole(self, like: torch.Tensor) -> torch.Tensor:
        empty = like.new_empty(self.slots, like.shape[1], self.room + self.spare, like.shape[3])
        return empty.zero_()  # written, so that no step waits for its memory

    def _pages(self, like: torch.Tensor) -> Growing:
        return Growing(self.slots, like.shape[1], self.length + self.spare, like.shape[3], like.dtype)

    def resize(self, room: int) -> None:
        """Storage for so many tokens of each slot, with what is in them; where it does not grow by itself."""
        before, self.room = self.room, room
        if not self.is_initialized or self._growing is not None or before == room:
            return
        kept = min(before, room)
        try:
            keys, values = map(self._whole, (self.keys, self.values))
        except BaseException:
            self.room = before
            raise
        keys[:, :, :kept], values[:, :, :kept] = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.keys, self.values = keys, values

    @property
    def grows(self) -> bool:
        """Whether memory is taken as slots fill."""
        return self._growing is not None

    def forget(self, slot: int, first: int = 0) -> None:
        """Nothing is in a slot any more from token `first` on; its memory is given back, where slots grow."""
        if self._growing is None:
            self.keys[slot, :, first:] = 0
            self.values[slot, :, first:] = 0
            return
        for storage in self._growing:
            storage.give_back(slot, first)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.call is not None
        return self.call.update(self, key_states, value_states)

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        assert self.call is not None
        return self.call.context, 0

    def get_seq_length(self) -> int:
        return 0 if self.call is None else self.call.start

    def get_max_length(self) -> int:
        return self.length

    get_max_cache_shape = get_max_length  # its name in transformers 4
