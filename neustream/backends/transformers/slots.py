"""KV slots: keys and values of requests of different lengths, as a cache that stock models write and read.

Each request has a slot, a row of every layer's storage. One forward call works on some rows, each
at its own position: what it computes is written there, and attention gets the rows that it needs,
padded to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from neustream.backends.torch import tensor_on
from neustream.backends.transformers.layers import SlotLayer
from neustream.backends.transformers.masks import layers_of
from neustream.backends.transformers.packed import ALIGNED, Packed
from neustream.backends.transformers.sight import Sight

if TYPE_CHECKING:
    from neustream.backends.transformers.still import Decodes


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a forward call: `tokens` to be computed at positions `start`, `start + 1`, ...

    `sight`: the images of its prompt; None: it has none. `adapter`: that it chooses; None: what is active.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sight: Sight | None = None
    adapter: str | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def folded(self) -> bool:
        """Whether some of its tokens see others behind them."""
        return self.sight is not None and self.sight.sees is not None and self.start < len(self.sight.sees)


WASTE = 1.5
SHORT = 16
"""A row joins a forward call of longer rows, padded to them, if they have at most so many times or tokens more."""
FIRST = 512
"""Tokens of each slot for which there is storage at first, at least, where that grows by being made anew."""
HOLES = 0.5
"""Largest share of unused slots that a decode may compute and ignore: cheaper than gathering slots."""


def groups(rows: Mapping[str, Row]) -> list[list[str]]:
    """Requests by forward call: decodes together, prompts with others of similar length; by slot within each."""
    found: list[list[str]] = []
    width = 0
    for id in sorted(rows, key=lambda id: -len(rows[id].tokens)):
        length = len(rows[id].tokens)
        if not found or width > max(length * WASTE, length + SHORT) or (length == 1) != (width == 1):
            found.append([])
            width = length
        found[-1].append(id)
    for group in found:
        group.sort(key=lambda id: rows[id].slot)
    return found


@dataclass(eq=False)
class Call:
    """One forward call's rows, in the order of their slots, as tensors.

    `ids`, `positions`: [lanes, longest]. There is a lane for each row, padded on the left by repeats of
    its first token; in decodes also for the slots between them, if those are few, so that attention can
    read the storage as it lies. `lanes`: where the rows are (None: all lanes). `whole`: all lanes have
    the same start and length, so that the model can make its own mask. `context`: keys that attention
    reads in a padded lane, of the `length` of a slot.

    `shape`: lanes, tokens and keys of a call whose shape is given; lanes are slots 0 and on, or one.
    """

    rows: Sequence[Row]
    length: int
    device: torch.device
    shape: tuple[int, int, int] | None = None
    ids: torch.Tensor = field(init=False)
    positions: torch.Tensor = field(init=False)
    lanes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.start = max(row.start for row in self.rows)
        self._slots = self._tensor([row.slot for row in self.rows])
        width = max(len(row.tokens) for row in self.rows)
        self._single = width == 1
        self.whole = False
        self._view = self._in_place()
        if self.shape is not None:
            lanes, width, self.context = self.shape
            self._view = slice(0, lanes) if self._single else self._view
        else:
            self._fit()
        if not self._single:
            self._lay_prompts(width)
            return
        self._lay_decodes()
        if self._view is not None:
            self._spread(self._view)

    def _in_place(self) -> slice | None:
        """The slots that attention reads as they lie; None where too many between them have no row."""
        low, high = self.rows[0].slot, self.rows[-1].slot + 1
        holes = high - low - len(self.rows)
        if holes and not (self._single and holes <= HOLES * len(self.rows)):
            return None
        return slice(low, high)

    def _fit(self) -> None:
        """How many keys attention reads, where that is not given."""
        end = max(row.end for row in self.rows)
        self.context = min(-(-end // ALIGNED) * ALIGNED, self.length)
        alike = all(row.start == self.start and row.end == end and not row.folded for row in self.rows)
        if alike and (self._view is None or self._view.stop - self._view.start == len(self.rows)):
            self.whole, self.context = True, end

    def _lay_decodes(self) -> None:
        """One token a row: a lane for each."""
        self._at = self._tensor([row.start for row in self.rows])
        self.ids = self._tensor([row.tokens[0] for row in self.rows])[:, None]
        self.positions = self._at[:, None]

    def _spread(self, view: slice) -> None:
        """A lane for each slot of `view`, also for those without a row; nothing to do where all have one."""
        lanes = view.stop - view.start
        if lanes == len(self.rows) and self.shape is None:
            return
        self.lanes = self._slots - view.start
        self.ids = self.ids.new_zeros(lanes, 1).index_copy(0, self.lanes, self.ids)
        self.positions = self.positions.new_zeros(lanes, 1).index_copy(0, self.lanes, self.positions)

    def _lay_prompts(self, width: int) -> None:
        """Several tokens a row, padded to `width`; where each of them goes, but for the padding."""
        ids, positions = [], []
        places: list[tuple[int, int, int, int]] = []
        for lane, row in enumerate(self.rows):
            pad = width - len(row.tokens)
            ids.append([row.tokens[0]] * pad + list(row.tokens))
            positions.append([row.start] * pad + list(range(row.start, row.end)))
            places += [(lane, pad + column, row.slot, row.start + column) for column in range(len(row.tokens))]
        self.ids, self.positions = self._tensor(ids), self._tensor(positions)
        if len(self.rows) > 1:
            self._lane, self._column, self._slot, self._at = self._tensor(places).unbind(1)

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return tensor_on(self.device, values)

    def mask(self) -> torch.Tensor:
        """Which keys each query sees, [lanes, 1, queries, keys]: those of its own row up to its own position.

        Tokens of an image may see the whole of it.
        """
        last = self.positions
        if any(row.folded for row in self.rows):
            last = last.clone()
            for row, lane, first in self.places():
                if row.sight is not None:
                    last[lane, first:] = row.sight.limits(row.start, row.end).to(last)
        keys = torch.arange(self.context, device=self.device)
        return (keys <= last[:, :, None])[:, None]

    def places(self) -> list[tuple[Row, int, int]]:
        """Each row with its lane, and the column of its first token there."""
        lanes = range(len(self.rows)) if self.lanes is None else self.lanes.tolist()
        width = self.ids.shape[1]
        return [(row, lane, width - len(row.tokens)) for row, lane in zip(self.rows, lanes, strict=True)]

    def write(self, storage: torch.Tensor, states: torch.Tensor) -> None:
        """Put `states` [lanes, heads, queries, width] where they belong in `storage` [slots, heads, length, width]."""
        if len(self.rows) == 1 and self.lanes is None:
            row = self.rows[0]
            storage[row.slot, :, row.start : row.end] = states[0, :, -len(row.tokens) :]
        elif self._single:
            states = states[:, :, 0]
            storage[self._slots, :, self._at] = states if self.lanes is None else states[self.lanes]
        else:
            storage[self._slot, :, self._at] = states.transpose(1, 2)[self._lane, self._column]

    def update(self, layer: SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what a layer computed where it belongs; all that attention reads."""
        self.write(layer.keys, keys)
        self.write(layer.values, values)
        return self.read(layer.keys), self.read(layer.values)

    def read(self, storage: torch.Tensor) -> torch.Tensor:
        """The lanes [lanes, heads, context, width]: a view where their slots are neighbours, else a copy."""
        if self._view is not None:
            return storage[self._view, :, : self.context]
        return storage[:, :, : self.context].index_select(0, self._slots)


class Slots(Cache):
    """The cache that a model is given: `slots` requests of up to `length` tokens.

    All tokens are kept, also where layers look at a window of them only. On a CPU under Linux memory
    is taken for tokens that were written, in pages. Elsewhere there is storage for the same number of
    tokens of each slot: twice as many once a text has more. NotShared for models for which the stock library
    makes no cache; MemoryError at the first call if the memory that is free on its device does not suffice.

    Args:
        tokens: that all slots together may have memory for, at most; None: as many as they hold.
        spare: tokens behind those of each slot, for what nobody reads.
        beside: bytes that steps take.
        least: tokens of a slot that calls read at least.

    Attributes:
        taken: tokens of each slot for which there is memory; those that are not there have none.
        total: of all of them.
        first: tokens of each slot for which there is storage at first: with `tokens`, what all may have, shared
            alike; room: for which there is now.
        version: how often that was made anew, elsewhere than it was.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        length: int,
        tokens: int | None = None,
        spare: int = 0,
        beside: int = 0,
        least: int = 0,
    ) -> None:
        self.slots, self.length = slots, length
        self.tokens = slots * length if tokens is None else min(tokens, slots * length)
        self.taken: dict[int, int] = {}
        self.total = 0
        self._token_bytes = 0
        granted = 0 if tokens is None else tokens // slots // ALIGNED * ALIGNED
        self.first = min(length, max(FIRST, granted, -(-least // ALIGNED) * ALIGNED))
        self.room, self.version = length, 0
        lefts = range(len(layers_of(model)), 0, -1)
        super().__init__(layers=[SlotLayer(slots, length, self.tokens, left, spare, beside) for left in lefts])

    def select(self, call: Call | Packed | Decodes) -> None:
        """Say which rows the next forward call works on."""
        self.reserve(call.context)
        for layer in self.layers:
            layer.call = call
        for row in call.rows:
            self.note(row.slot, row.end)

    def reserve(self, tokens: int) -> None:
        """Have storage for so many tokens of each slot.

        Doubled, so that it is seldom made anew. Where memory lacks, the error of the device is raised, and all that
        is in slots stays.
        """
        if tokens > self.room:
            self._resize(min(self.length, self.first * 2 ** math.ceil(math.log2(tokens / self.first))))

    def shrink(self) -> None:
        """Give back all storage but for the first tokens of each slot; nobody has anything behind them."""
        if self.used and not self.grows:
            self._resize(self.first)

    @torch.inference_mode()
    def _resize(self, room: int) -> None:
        if room == self.room:
            return
        self.version += 1  # also where memory lacks for some layers: others are elsewhere by then
        for layer in self.layers:
            layer.resize(room)
        self.room = room

    def note(self, slot: int, tokens: int) -> None:
        """A slot is written up to so many tokens."""
        self.reserve(tokens)
        more = tokens - self.taken.get(slot, 0)
        if more > 0:
            self.taken[slot] = tokens
            self.total += more

    @property
    def grows(self) -> bool:
        """Whether memory is taken as slots fill, and given back; known behind the first call."""
        return any(layer.grows for layer in self.used)

    @property
    def plain(self) -> bool:
        """Whether what it keeps of a text's beginning depends on nothing behind that, in all layers."""
        return all(type(layer) is SlotLayer for layer in self.layers)

    @property
    def used(self) -> list[SlotLayer]:
        """The layers that have storage by now: the model's calls use these."""
        return [layer for layer in self.layers if layer.is_initialized]

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy what is in a slot to another one."""
        self.note(target, tokens)
        for layer in self.used:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[target, :, :tokens] = layer.values[source, :, :tokens]

    def read(self, slot: int, first: int, last: int) -> list[torch.Tensor]:
        """Keys and values of tokens `first` to `last` of a slot: [2, heads, last - first, width] of each layer."""
        place = (slot, slice(None), slice(first, last))
        return [torch.stack((layer.keys[place], layer.values[place])) for layer in self.used]

    @torch.inference_mode()
    def write(self, slot: int, first: int, states: Sequence[torch.Tensor]) -> None:
        """Put what `read` gave into a slot, from token `first` on."""
        for layer, both in zip(self.used, states, strict=True):
            last = first + both.shape[2]
            self.note(slot, last)
            place = (slot, slice(None), slice(first, last))
            layer.keys[place], layer.values[place] = both[0], both[1]

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The shapes of what `read` gives of so many tokens."""
        return [(2, layer.keys.shape[1], tokens, layer.keys.shape[3]) for layer in self.used]

    @torch.inference_mode()
    def scrub(self, slot: int, first: int = 0) -> None:
        """Forget what is in a slot from token `first` on: it may hold NaN, or its memory is wanted elsewhere."""
        for layer in self.used:
            layer.forget(slot, first)
        had = self.taken.pop(slot, 0)
        if first and had:
            self.taken[slot] = min(had, first)
        self.total -= had - self.taken.get(slot, 0)

    def free(self, slot: int) -> None:
        """Nothing to do: who gets a slot writes it before he reads it."""

    @torch.inference_mode()
    def pretend(self, slot: int, tokens: int) -> None:
        """Take the memory of so many tokens: what is in a slot reads as well as what had been computed."""
        first = self.taken.get(slot, 0)
        self.note(slot, tokens)
        for layer in self.used:
            layer.keys[slot, :, first:tokens] = 0
            layer.values[slot, :, first:tokens] = 0

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer; 0 before the first call."""
        if not self._token_bytes and (used := self.used):
            values = sum([math.prod(shape) for shape in self.shapes(1)])
            self._token_bytes = values * used[0].keys.itemsize // len(used)
        return self._token_bytes

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first call."""
        return next((layer.keys.dtype for layer in self.used), None)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take now, but for the rest of their last pages."""
        tokens = self.total if self.grows else self.slots * self.room
        return tokens * self.token_bytes * len(self.used)

    @property
    def to_come(self) -> int:
        """Bytes that storage may take beyond what it has, where it is made anew to grow."""
        return 0 if self.grows else self.slots * (self.length - self.room) * self.token_bytes * len(self.used)
