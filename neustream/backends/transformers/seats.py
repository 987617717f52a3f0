"""Which request has which slot of a model, and what those that have left leave there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neustream.backends.torch import OUT_OF_MEMORY
from neustream.backends.transformers.own import Own
from neustream.backends.transformers.prefixes import Prefixes
from neustream.backends.transformers.slots import Slots
from neustream.backends.transformers.text import Text


@dataclass(frozen=True, slots=True, eq=False)
class _Aside:
    """What a request had in its slot, in the host's memory: [2, heads, tokens, width] of each layer."""

    held: Held
    states: Sequence[torch.Tensor]


Begins = tuple[str | None, list[int]]
"""The adapter of a prompt, and its tokens, told apart."""


class Held:
    """A request's slot, how many of its tokens are in it, and when it was last used.

    `prompt`: what its prompt's keys and values depend on. `shared`: tokens that came from a prefix. `sure`: the text
    after the latest step that a model did which is the one that is served, and how many tokens of it
    were in the slot.
    """

    __slots__ = ("cached", "prompt", "shared", "slot", "sure", "used")

    def __init__(self, slot: int) -> None:
        self.slot, self.cached, self.used, self.shared = slot, 0, 0, 0
        self.prompt: Begins | None = None
        self.sure: tuple[Text, int] | None = None

    @property
    def kept(self) -> int:
        """Tokens of it that others may go on from; the last one may have been computed anew since."""
        return 0 if self.sure is None else self.sure[1] - 1


class Seats:
    """The slots of one device's requests. A slot keeps what was in it until somebody gets it.

    Args:
        cache: where the slots are.
        prefixes: where texts that leave are kept; None: nowhere.
    """

    def __init__(self, cache: Slots | Own, prefixes: Prefixes | None) -> None:
        self.cache, self.prefixes = cache, prefixes
        self.held: dict[str, Held] = {}
        self._aside: dict[str, _Aside] = {}
        self._left: dict[int, Held] = {}
        self._free = list(range(cache.slots - 1, -1, -1))  # the lowest last: neighbours are read without a copy

    def take(self, id: str, now: int) -> Held:
        """A free slot, or that of the request that has not used its own for the longest time."""
        self._make_room()
        return self._give(id, self._free[-1], now)

    def fork(self, id: str, prompt: Begins, tokens: int, now: int) -> Held | None:
        """A slot that begins with so many tokens of a prompt, from a request of the same; None: nobody has them.

        That request may be over: its slot is taken as it is, while nobody else has it.
        """
        self._make_room()
        known = [one for one in (*self._left.values(), *self.held.values()) if _has(one, prompt, tokens)]
        if not known:
            return None
        first = known[0]
        if first.slot in self._left:
            held = self._give(id, first.slot, now)
        else:
            held = self._give(id, self._free[-1], now)
            self.cache.move(first.slot, held.slot, tokens)
        assert first.sure is not None
        held.sure = (first.sure[0], tokens + 1)
        held.cached, held.prompt = tokens, first.prompt
        return held

    def _make_room(self) -> None:
        if not self._free:
            self.leave(min(self.held, key=lambda id: self.held[id].used))

    def _give(self, id: str, slot: int, now: int) -> Held:
        self._free.remove(slot)
        self._left.pop(slot, None)
        held = self.held[id] = Held(slot)
        held.used = now
        return held

    def put_aside(self, id: str) -> None:
        """Its slot is free; what was in it is kept in the host's memory."""
        held, cache = self.held.get(id), self.cache
        if held is not None and held.cached and isinstance(cache, Slots):
            with contextlib.suppress(*OUT_OF_MEMORY):  # then it is computed again
                states = [one.to("cpu") for one in cache.read(held.slot, 0, held.cached)]  # copies
                self._aside[id] = _Aside(held, states)
        self._free_slot(id)

    def bring_back(self, id: str, now: int) -> Held | None:
        """A slot with what was put aside of a request; None: nothing was."""
        aside, cache = self._aside.pop(id, None), self.cache
        if aside is None or not isinstance(cache, Slots):
            return None
        self.expect(aside.held.cached)
        held = self.take(id, now)
        held.prompt = aside.held.prompt
        try:
            cache.write(held.slot, 0, aside.states)
        except OUT_OF_MEMORY:
            return held  # it is computed again
        held.cached, held.shared, held.sure = aside.held.cached, aside.held.shared, aside.held.sure
        return held

    def leave(self, id: str) -> None:
        """Its slot is free, and nothing is kept aside."""
        self._aside.pop(id, None)
        self._free_slot(id)

    def _free_slot(self, id: str) -> None:
        held = self.held.pop(id, None)
        if held is None:
            return
        if held.sure is not None and isinstance(self.cache, Slots):
            self._left[held.slot] = held
            if self.prefixes is not None:
                self.prefixes.keep(held.slot, held.sure[0], held.kept)
        self.cache.free(held.slot)
        self._free.append(held.slot)
        self._free.sort(reverse=True)
        self._trim()

    def expect(self, tokens: int) -> None:
        """So many tokens are to be written: give back what memory nobody needs, if the cache has not as much left.

        First that of slots that nobody has, those that were left first; then behind the texts of those that are held.
        """
        cache = self.cache
        if isinstance(cache, Own) or cache.total + tokens <= cache.tokens or not cache.grows:
            return
        for slot in self._idle(cache):
            self._forget(slot)
            if cache.total + tokens <= cache.tokens:
                return
        for held in self.held.values():
            if cache.taken.get(held.slot, 0) > held.cached:
                cache.scrub(held.slot, held.cached)

    def _trim(self) -> None:
        """Give back slots that nobody has, those first that were left first.

        As many tokens are kept as one slot may have, or as there are in those that are held.
        """
        cache = self.cache
        if isinstance(cache, Own) or not cache.grows:
            return
        idle = self._idle(cache)
        spare = sum([cache.taken[slot] for slot in idle])
        most = max(cache.total - spare, cache.length)
        for slot in idle:
            if spare <= most:
                return
            spare -= cache.taken[slot]
            self._forget(slot)

    def _idle(self, cache: Slots) -> list[int]:
        """Slots with memory that nobody has, those first that were left first."""
        others = [slot for slot in self._free if slot in cache.taken and slot not in self._left]
        return others + [slot for slot in self._left if slot in cache.taken]

    def _forget(self, slot: int) -> None:
        self._left.pop(slot, None)
        self.cache.scrub(slot)

    def close_up(self, ids: Sequence[str], lanes: float = math.inf) -> None:
        """Move texts from the highest slots into free ones between the others: neighbours are read without a copy.

        Those that are not in the first `lanes` slots move into free ones below the others too. The lowest free
        slots are left to those of `ids` that have none yet, who get them.
        """
        held = sorted((self.held[id] for id in ids if id in self.held), key=lambda one: one.slot)
        new = len(ids) - len(held)
        while held:
            first = held[0].slot if held[-1].slot < lanes else -1
            others = self._free[: max(0, len(self._free) - new)]
            hole = min((slot for slot in others if slot > first), default=math.inf)
            if hole > held[-1].slot:
                return
            top, at = held.pop(), self._free.index(int(hole))
            self._left.pop(int(hole), None)
            self.cache.move(top.slot, int(hole), top.cached)
            self._free[at], top.slot = top.slot, int(hole)
            self._free.sort(reverse=True)


def _has(held: Held, prompt: Begins, tokens: int) -> bool:
    return held.kept >= tokens > 0 and held.prompt == prompt
