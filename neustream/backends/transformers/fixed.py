"""Fixed shapes: calls of a few shapes that depend on each request alone, never on its company.

Kernels round by the shape of what they are given. Where each token of a request is computed in a call
of the same shape, whoever else is in it, its results are the same to the last bit: in any company,
any parts of its prompt, and after it lost its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from neustream.backends.transformers.slots import Row
from neustream.backends.values import whole
from neustream.errors import BackendError, shown

BLOCK = 32
"""Tokens of a prompt that are computed in one call, from each multiple of it on."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The shapes of one model's calls.

    A prompt is computed in calls of one row of `BLOCK` tokens, and outputs in calls of `slots` rows
    of one token. Either reads the smallest of `contexts` that has room for it.
    """

    slots: int
    contexts: tuple[int, ...]

    def context(self, end: int) -> int:
        """Keys that a call reads for a row that ends there."""
        return next(context for context in self.contexts if context >= end)

    def shape(self, rows: Sequence[Row]) -> tuple[int, int, int]:
        """Lanes, tokens and keys of a call of some rows."""
        context = self.context(rows[0].end)
        return (self.slots, 1, context) if len(rows[0].tokens) == 1 else (1, BLOCK, context)

    def calls(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The calls that compute `rows`, in order; each row's last piece is in the last call that has its slot."""
        found: list[list[Row]] = []
        singles: dict[int, list[Row]] = {}
        for row in rows:
            *before, last = pieces(row)
            found += [[piece] for piece in before]
            if len(last.tokens) > 1:
                found.append([last])
            else:
                singles.setdefault(self.context(last.end), []).append(last)
        return [*found, *singles.values()]


def pieces(row: Row) -> list[Row]:
    """A row cut at the multiples of `BLOCK`."""
    edges = [row.start, *range((row.start // BLOCK + 1) * BLOCK, row.end, BLOCK), row.end]
    if len(edges) == 2:
        return [row]
    return [
        replace(row, start=low, tokens=row.tokens[low - row.start : high - row.start]) for low, high in pairwise(edges)
    ]


def floor(end: int, prompt: int) -> int:
    """The last place up to `end` where one piece of a text ends and another begins."""
    return end if end >= prompt else end // BLOCK * BLOCK


def rows_of(row: Row, prompt: int) -> list[Row]:
    """Rows for the tokens of one: what is of the prompt at once, and each output by itself."""
    tokens = row.tokens
    inside = max(0, min(prompt - row.start, len(tokens)))
    first = [replace(row, tokens=tokens[:inside])] if inside else []
    singles = [replace(row, start=row.start + at, tokens=tokens[at : at + 1]) for at in range(inside, len(tokens))]
    return first + singles


def fixed_of(buckets: Any, slots: int, max_len: int) -> Fixed | None:
    """What `buckets` of a caller say; None for none. BackendError for what are no lengths."""
    if isinstance(buckets, str) or not isinstance(buckets, Sequence):
        raise BackendError(f"buckets must be a list of lengths, as [128, 512], got {shown(buckets)}")
    lengths = {whole("buckets: a length", one, 1, max_len, error=BackendError) for one in buckets}
    return Fixed(slots, (*sorted(lengths - {max_len}), max_len)) if lengths else None
