"""One forward call for prompts and decodes of any lengths: their tokens one behind the other in one lane.

All but attention computes each token by itself, so nothing is padded and weights are read once a step.
Attention is told apart: an implementation of our own hands each request's queries, with its own keys
and values, to the stock one. It is the model's for the time of a call, in its own thread only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from neustream.backends.torch import tensor_on

if TYPE_CHECKING:
    from neustream.backends.transformers.layers import SlotLayer
    from neustream.backends.transformers.slots import Row
    from neustream.backends.transformers.still import Decodes

STOCK, OWN = "sdpa", "neustream_packed"
"""The attention implementation that models have, and what it is called while one of our calls runs."""
ALIGNED = 8
"""Masks have a multiple of so many keys, as far as slots have them: GPU kernels copy them otherwise, in each layer."""
MERGED_BYTES = 1 << 17
"""Neighbours decode in one attention call, padded to the longest, where it reads so much more in vain at most."""


STREAMED_BYTES = range(1 << 17, 1 << 21)
"""Keys and values of so many are read through once before attention reads them, where weights push
them out of a CPU's cache between steps. Its kernel waits for each piece that is not there, and a sum
reads at the memory's full speed: 5 percent of a step. More of them would push each other out."""
CACHED_BYTES = 1 << 25
"""Weights of models of which that is so take more."""


class _Here(threading.local):
    call: Packed | Decodes | None = None


_here = _Here()


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens `first` to `last` of the lane, whose attention is one call: a prompt's, or decodes of neighbours.

    `slots`: where their keys are; `context`: how many of each; `mask`: [rows, 1, queries, context].
    `fresh`: the keys are those of the call itself; `streamed`: they are read through first.
    """

    first: int
    last: int
    slots: slice
    context: int
    mask: torch.Tensor | None
    decodes: bool
    fresh: bool = False
    streamed: bool = False


@lru_cache(maxsize=16)
def _counted(device: torch.device, length: int) -> torch.Tensor:
    """0, 1, ... on a device."""
    return torch.arange(length, device=device)


@cache
def _weighed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention on a CPU adds to the score of a key that is seen, and of one that is not."""
    return torch.zeros((), dtype=dtype), torch.full((), -torch.inf, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Which keys tokens at `positions` of a lane see, of `length` in a slot; masks have a multiple of `aligned`.

    With a `dtype` masks are what attention adds to its scores: it makes these of other masks, anew in each layer.
    """

    positions: torch.Tensor
    length: int
    aligned: int
    dtype: torch.dtype | None

    def mask(self, first: int, last: int, most: int) -> tuple[torch.Tensor, int]:
        """The mask [tokens, keys] of tokens `first` to `last`, which see `most` keys at most; how many it has."""
        context = min(-(-most // self.aligned) * self.aligned, self.length)
        seen = _counted(self.positions.device, self.length)[:context] <= self.positions[first:last, None]
        return seen if self.dtype is None else torch.where(seen, *_weighed(self.dtype)), context


def _places(prompts: Sequence[Row], first: int) -> Iterator[tuple[Row, int, int]]:
    """Where each one's tokens begin and end, behind `first` others."""
    for row in prompts:
        last = first + len(row.tokens)
        yield row, first, last
        first = last


class Packed:
    """One forward call's rows as one lane: `ids`, `positions` [1, tokens], decodes first.

    Args:
        rows: in the order of their slots.
        token_bytes: keys and values of one token in one layer.
        length: tokens of a slot.
        cold: whether they are in no cache when a step begins.
        dtype: of keys and values.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        device: torch.device,
        token_bytes: int,
        length: int,
        *,
        cold: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rows, self.device = rows, device
        self.start = max(row.start for row in rows)
        self.context = max(row.end for row in rows)
        decodes = [row for row in rows if len(row.tokens) == 1]
        prompts = [row for row in rows if len(row.tokens) > 1]
        self.ordered = ordered = [*decodes, *prompts]
        lane = _lane(ordered, device)
        self.ids, self.positions = lane[:1], lane[1:2]
        streamed = token_bytes if cold else 0
        gpu = device.type == "cuda"
        keys = _Keys(lane[1], length, ALIGNED if gpu else 1, None if gpu else dtype)
        self.parts = list(_decoding(decodes, keys, _most_waste(device, token_bytes), streamed))
        self._decodes = len(decodes)
        self._one = decodes[0] if len(decodes) == 1 else None
        self._at, self._slots = lane[1, : len(decodes)], lane[2, : len(decodes)]
        self._prompts = list(_places(prompts, len(decodes)))
        self.parts += [_prompt(row, first, last, keys) for row, first, last in self._prompts]
        self.wanted = self._wanted(ordered)
        self._layer: SlotLayer | None = None

    def _wanted(self, ordered: Sequence[Row]) -> torch.Tensor | None:
        """Where the last tokens of the rows are, in the order in which rows are given; None: all, as they are."""
        if not self._prompts:
            return None
        ends, at = {}, 0
        for row in ordered:
            at += len(row.tokens)
            ends[row.slot] = at - 1
        return tensor_on(self.device, [ends[row.slot] for row in self.rows])

    def update(self, layer: SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what a layer computed, [1, heads, tokens, width] each, into its slots; attention reads them there."""
        self._layer = layer
        for storage, states in ((layer.keys, keys), (layer.values, values)):
            if self._one is not None:
                storage[self._one.slot, :, self._one.start] = states[0, :, 0]
            elif self._decodes:
                storage[self._slots, :, self._at] = states[0, :, : self._decodes].transpose(0, 1)
            for row, first, last in self._prompts:
                storage[row.slot, :, row.start : row.end] = states[0, :, first:last]
        return keys, values

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer, [1, tokens, heads, width]: each part's own, by the stock function."""
        layer, self._layer = self._layer, None
        if layer is None or how.get("position_bias") is not None:
            raise RuntimeError("attention without keys of its own, or with a bias by position, cannot be packed")
        outputs = []
        for part in self.parts:
            queries = query[:, :, part.first : part.last]
            if part.decodes:
                queries = queries.permute(2, 1, 0, 3)
            if part.fresh:
                keys, values = key[:, :, part.first : part.last], value[:, :, part.first : part.last]
            else:
                keys = layer.keys[part.slots, :, : part.context]
                values = layer.values[part.slots, :, : part.context]
                if part.streamed:
                    keys.sum(), values.sum()
            found, _ = sdpa_attention_forward(module, queries, keys, values, part.mask, **how)
            outputs.append(found.transpose(0, 1) if part.decodes else found)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _lane(rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """The rows' tokens one behind the other: their ids, positions and slots [3, tokens]."""
    ids = [token for row in rows for token in row.tokens]
    positions = [place for row in rows for place in range(row.start, row.end)]
    slots = [row.slot for row in rows for _ in row.tokens]
    return tensor_on(device, [ids, positions, slots])


def _most_waste(device: torch.device, token_bytes: int) -> float:
    """Keys that an attention call may read in vain: elsewhere than on CPUs, calls cost more than reading."""
    return MERGED_BYTES / max(token_bytes, 1) if device.type == "cpu" else float("inf")


def is_cold(model: torch.nn.Module) -> bool:
    """Whether a step of this model pushes keys and values out of the cache."""
    size: int = sum([weight.nbytes for weight in model.parameters() if weight.device.type == "cpu"])
    return size > CACHED_BYTES


def _decoding(rows: Sequence[Row], keys: _Keys, most: float, streamed: int) -> Iterator[_Part]:
    """Decodes by attention call: neighbours that waste at most so many keys more than apart.

    `streamed`: bytes of a token's keys and values that may be read through first; 0: none are.
    """
    first = 0
    while first < len(rows):
        last, longest, kept = first + 1, rows[first].end, rows[first].end
        while last < len(rows) and rows[last].slot == rows[last - 1].slot + 1:
            longer, more = max(longest, rows[last].end), kept + rows[last].end
            if (last + 1 - first) * longer - more > most * (last - first):
                break
            last, longest, kept = last + 1, longer, more
        mask, context = None, longest
        if kept < longest * (last - first):
            mask, context = keys.mask(first, last, longest)
            mask = mask[:, None, None]
        slots = slice(rows[first].slot, rows[last - 1].slot + 1)
        first_read = (last - first) * longest * streamed in STREAMED_BYTES
        yield _Part(first, last, slots, context, mask, decodes=True, streamed=first_read)
        first = last


def _prompt(row: Row, first: int, last: int, keys: _Keys) -> _Part:
    """The attention call of a part of a prompt."""
    mask, context = None, row.end
    if row.start:
        mask, context = keys.mask(first, last, row.end)
        mask = mask[None, None]
    return _Part(first, last, slice(row.slot, row.slot + 1), context, mask, decodes=False, fresh=not row.start)


@contextlib.contextmanager
def packing(config: Any, call: Packed | Decodes) -> Iterator[None]:
    """Let a model with this config attend as `call` says; what other threads ask of it meanwhile is as ever."""
    if config._attn_implementation == STOCK:  # else somebody has chosen another one, which is noticed after the step
        config._attn_implementation = OWN
    _here.call = call
    try:
        yield
    finally:
        _here.call = None
        if config._attn_implementation == OWN:
            config._attn_implementation = STOCK


def implementation(config: Any) -> Any:
    """The attention implementation of a config, whether or not a call runs."""
    found = getattr(config, "_attn_implementation", None)
    return STOCK if found == OWN else found


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    if _here.call is not None:
        return _here.call.attend(module, query, key, value, **how)
    outputs: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    return outputs


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask in a packed call: its parts have their own."""
    if _here.call is not None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(OWN, _attention)
AttentionMaskInterface.register(OWN, _mask)
