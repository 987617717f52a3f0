"""Beginnings of texts that were computed before: their keys and values in blocks, kept for whoever begins alike.

Blocks are found by what they hold and by what is before them, token by token: nothing is shared by
chance. So many tokens are kept; of those that nothing kept is behind, the least recently used go first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from neustream.backends.torch import OUT_OF_MEMORY, free_on
from neustream.backends.transformers.fixed import BLOCK as FIXED_BLOCK
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.slots import Slots
from neustream.backends.transformers.text import Ask, Text
from neustream.errors import BackendError

log = logging.getLogger("neustream")

BLOCK = 16
"""Tokens of a block."""
SHARE = 4
"""One token of so many that slots hold is kept, if nobody says how many."""
PATIENCE = 200
"""Steps behind which texts that were given up are kept again, if there is memory; twice as many each further time."""

Key = tuple[int | str, tuple[int, ...]]
"""The number of the block before (0: none; or the adapter that is chosen), and the tokens."""


def kept_tokens(model: LanguageModel, cache: Slots, asked: int | None) -> int:
    """How many tokens of earlier texts are kept: as asked, else as many as there is room for.

    BackendError if so many are asked that a device has no memory for them.
    """
    free = _free(model, cache)
    token_bytes = cache.token_bytes * len(cache.used)
    if asked is None:
        return _with_room(cache, cache.slots * cache.length // SHARE, free)
    if free is not None and asked * token_bytes > free:
        raise BackendError(
            f"{model.name}: prefix_tokens={asked} may take {asked * token_bytes:,} bytes on {model.device}, "
            f"where {free:,} are free behind the slots: give fewer, or fewer slots"
        )
    return asked


def _free(model: LanguageModel, cache: Slots) -> int | None:
    """Bytes that are free on a device behind what slots may come to take; None: not known, or slots take pages."""
    free = None if cache.grows else free_on(model.device)
    return None if free is None else max(free - cache.to_come, 0)


def _with_room(cache: Slots, tokens: int, free: int | None) -> int:
    """So many tokens, or fewer: they get half of the bytes that are free, at most. None: that is not known."""
    return tokens if free is None else min(tokens, free // 2 // (cache.token_bytes * len(cache.used)))


class Prefixes:
    """Blocks of one model's keys and values on its device, beside its slots.

    `match` may be called from any thread, the others by the one that runs the model. Room is taken at
    the first text that is kept. Where memory lacks, nothing is kept for some time.

    Args:
        cache: the slots.
        tokens: that are kept, at most; below one block: none.
    """

    def __init__(self, model: LanguageModel, cache: Slots, tokens: int) -> None:
        self.model, self.cache = model, cache
        self.block = BLOCK if model.fixed is None else FIXED_BLOCK
        self._tokens = tokens
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # its number, and its place in the room
        self._numbers = 0
        self._room: list[torch.Tensor] = []
        self._given_up = 0  # how often
        self._since = 0  # steps since memory lacked
        self._begin(tokens)

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._known) * self.block

    def match(self, ask: Ask) -> int:
        """How many tokens of a prompt are there; at least its last one is left to compute."""
        tokens = ask.prompt
        with self._lock:
            found = list(self._path(tokens, ask.adapter))
            self._touch([key for key, _ in found])
        return min(len(found) * self.block, (len(tokens) - 1) // self.block * self.block)

    @torch.inference_mode()
    def fill(self, slot: int, ask: Ask, most: int) -> int:
        """Copy the beginning of a prompt into a slot, up to `most` tokens; how many were there."""
        try:
            with self._lock:
                places = [place for _, place in self._path(ask.prompt[:most], ask.adapter)]
                if not places:
                    return 0
                at = torch.tensor(places, device=self.model.device)
                states = [room.index_select(0, at) for room in self._room]
            self.cache.write(slot, 0, [one.permute(1, 2, 0, 3, 4).flatten(2, 3) for one in states])
        except OUT_OF_MEMORY:
            return 0  # it is computed
        return len(places) * self.block

    @torch.inference_mode()
    def keep(self, slot: int, text: Text, computed: int) -> None:
        """Keep what is in a slot of the first `computed` tokens of a text.

        Where shapes are fixed, only the prompt's: outputs are computed in other calls than prompts.
        """
        last = computed if self.model.fixed is None else min(computed, len(text.ask.prompt))
        tokens = text.tokens(0, last // self.block * self.block)
        if not tokens or not self.blocks or text.ask.sight is not None:
            return
        with self._lock:
            keys = [key for key, _ in self._path(tokens, text.ask.adapter)]
            self._touch(keys)
            first = len(keys)
            before = self._known[keys[-1]][0] if keys else text.ask.adapter or 0
            places = self._places(len(tokens) // self.block - first, keys)
            if not places:
                return
            for at, place in enumerate(places, start=first):
                self._numbers += 1
                key = (before, tuple(tokens[at * self.block : (at + 1) * self.block]))
                self._known[key] = (self._numbers, place)
                keys.append(key)
                before = self._numbers
            self._touch(keys)
            try:
                self._copy(slot, first * self.block, places)
                return
            except OUT_OF_MEMORY:
                pass
        self.give_up()

    def give_up(self) -> None:
        """Keep nothing for now: the memory is wanted for steps."""
        with self._lock:
            self._since = 0
            if not self.blocks:
                return
            self._given_up += 1
            log.warning("%s: memory lacks, so beginnings of texts are kept no more for now", self.model.name)
            self._known.clear()
            self._room = []
            self._begin(0)

    def step(self) -> None:
        """A step begins: what was given up is had again behind many that found memory, as far as there is room."""
        if not self._given_up or self.blocks:
            return
        self._since += 1
        if self._since <= PATIENCE << (self._given_up - 1):
            return
        free = free_on(self.model.device) if self.cache.grows else _free(self.model, self.cache)
        tokens = _with_room(self.cache, self._tokens, free)
        with self._lock:
            self._since = 0
            self._begin(tokens)
        if self.blocks:
            log.info("%s: beginnings of texts are kept again, up to %d tokens", self.model.name, tokens)

    # -- inside -----------------------------------------------------------------------------------

    def _begin(self, tokens: int) -> None:
        """Room for so many tokens, with nothing in it."""
        self.blocks = tokens // self.block
        self._free = list(range(self.blocks - 1, -1, -1))

    def _path(self, tokens: Sequence[int], adapter: str | None) -> Iterator[tuple[Key, int]]:
        """The blocks that a text begins with, as far as they are there, with their places."""
        before: int | str = adapter or 0
        for first in range(0, len(tokens) - self.block + 1, self.block):
            key = (before, tuple(tokens[first : first + self.block]))
            if (known := self._known.get(key)) is None:
                return
            before, place = known
            yield key, place

    def _touch(self, keys: Sequence[Key]) -> None:
        """They were used: the last ones are the first of them to go."""
        for key in reversed(keys):
            self._known.move_to_end(key)

    def _places(self, count: int, path: Sequence[Key]) -> list[int]:
        """Room for so many blocks behind a path, or for fewer; others go for it."""
        own = set(path)
        while len(self._free) < count:
            oldest = next(iter(self._known), None)
            if oldest is None or oldest in own:
                break
            self._free.append(self._known.pop(oldest)[1])
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def _copy(self, slot: int, first: int, places: Sequence[int]) -> None:
        states = self.cache.read(slot, first, first + len(places) * self.block)
        if not self._room:
            shapes = [(self.blocks, 2, one.shape[1], self.block, one.shape[3]) for one in states]
            self._room = [one.new_empty(shape) for one, shape in zip(states, shapes, strict=True)]
        at = torch.tensor(places, device=self.model.device)
        for room, one in zip(self._room, states, strict=True):
            room[at] = one.unflatten(2, (len(places), self.block)).permute(2, 0, 1, 3, 4)
