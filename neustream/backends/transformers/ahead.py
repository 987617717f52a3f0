"""Numbers of seeded rows' next draws, drawn on other threads: they depend on no logits.

Where torch leaves a core to others, they are drawn while the model computes. Where it has all cores they would slow
that down, and are drawn on all of them when tokens are chosen. A row's own generator stays where it is until its
numbers are taken. Where it is moved, replayed or ends early, what was drawn is thrown away, and nothing has to be put
back.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from neustream.backends.transformers.draws import apart
from neustream.cores import cores

FEWEST = 1 << 16
"""Numbers that are worth another thread: they take half a millisecond."""
MOST = 1 << 24
"""Numbers that are kept for later draws, of all rows together: 128 MiB. Rows for which there is no room draw theirs
when they choose a token."""


class Uniforms:
    """Uniforms of some rows, one for each token of the vocabulary.

    Args:
        numbers: [held, vocabulary] in float64.
        rows: which of these rows are asked for, [rows]; None: all.
        least: [held, blocks] the smallest of each block, where that is known.
    """

    def __init__(
        self, numbers: torch.Tensor, rows: torch.Tensor | None = None, least: torch.Tensor | None = None
    ) -> None:
        self._numbers, self._least = numbers, least
        self._rows = torch.arange(len(numbers)) if rows is None else rows

    @property
    def columns(self) -> int:
        return int(self._numbers.shape[1])

    @property
    def least(self) -> torch.Tensor:
        """The smallest of each block of tokens that lie evenly apart, [rows, blocks]."""
        if self._least is None:
            self._least = apart(self._numbers).amin(1)
        return self._least[self._rows]

    def of(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Those of some tokens of some of the rows that are asked for."""
        return self._numbers[self._rows[rows], columns]


class Stream:
    """A request's random stream: a generator, and its next numbers, where they are drawn already.

    `generator` tells where it is; who draws from it takes `own()`.
    """

    __slots__ = ("_ahead", "generator")

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._ahead: tuple[_Batch, int] | None = None

    def batch(self, columns: int) -> _Batch | None:
        """Where its next numbers of so many tokens are; None: nowhere yet."""
        if self._ahead is None or self._ahead[0].numbers.shape[1] != columns:
            return None
        return self._ahead[0]

    @property
    def place(self) -> int:
        """The row of its batch that is its own."""
        assert self._ahead is not None
        return self._ahead[1]

    def put(self, batch: _Batch, place: int) -> None:
        self._ahead = batch, place

    def take(self) -> None:
        """Go on behind the numbers that were drawn already."""
        assert self._ahead is not None
        batch, place = self._ahead
        self.generator = batch.after[place]
        self._ahead = None

    def own(self) -> torch.Generator:
        """The generator, to draw from: what was drawn already is forgotten."""
        self._ahead = None
        return self.generator


class _Batch:
    """The next numbers of some generators, each from where it is now; `after` has generators behind these."""

    def __init__(self, generators: Sequence[torch.Generator], columns: int, threads: int) -> None:
        states = [generator.get_state() for generator in generators]
        with torch.inference_mode(False):  # else no other thread may write to it
            self.numbers = torch.empty(len(states), columns, dtype=torch.float64)
            self._least = apart(self.numbers).new_empty(len(states), apart(self.numbers).shape[2])
        self.after = [torch.Generator() for _ in states]
        size = -(-len(states) // threads)
        parts = [range(first, min(first + size, len(states))) for first in range(0, len(states), size)]
        self._parts = [_pool().submit(self._draw, part, states) for part in parts]

    def _draw(self, rows: Iterable[int], states: Sequence[torch.Tensor]) -> None:
        for row in rows:
            self.after[row].set_state(states[row])
            own = self.numbers[row : row + 1].uniform_(generator=self.after[row])
            torch.amin(apart(own), 1, out=self._least[row : row + 1])

    def uniforms(self, rows: Sequence[int]) -> Uniforms:
        """Those of some of the generators, by their places; waits until they are drawn."""
        for part in self._parts:
            part.result()
        return Uniforms(self.numbers, torch.tensor(rows), self._least)


_kept: weakref.WeakSet[_Batch] = weakref.WeakSet()
_keeping = threading.Lock()  # several models of a process share the room, each on threads of its own


def draw_ahead(streams: Sequence[Stream], columns: int) -> None:
    """Begin to draw the next numbers of streams that will be asked for so many, if a core is left for that."""
    _begin(streams, columns, cores() - torch.get_num_threads())


def draw_at_once(streams: Sequence[Stream], columns: int) -> None:
    """Begin to draw the next numbers of those that have none yet, on as many threads as torch has, if several."""
    if (threads := torch.get_num_threads()) > 1:
        _begin([stream for stream in streams if stream.batch(columns) is None], columns, threads)


def _begin(streams: Sequence[Stream], columns: int, threads: int) -> None:
    with _keeping:
        room = MOST - sum([batch.numbers.numel() for batch in _kept])
        some = streams[: max(room, 0) // columns]
        if threads < 1 or len(some) * columns < FEWEST:
            return
        batch = _Batch([stream.generator for stream in some], columns, threads)
        _kept.add(batch)
    for place, stream in enumerate(some):
        stream.put(batch, place)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "draws-ahead")


def _forked() -> None:
    """A forked process has none of these threads, and nobody who would give the lock back."""
    global _keeping
    _keeping = threading.Lock()
    _pool.cache_clear()


os.register_at_fork(after_in_child=_forked)
