"""Calls that find no memory: they are made smaller, so that only a request fails that never fits alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from neustream.backends.transformers.slots import Row

log = logging.getLogger("neustream")

PATIENCE = 200
"""Steps without such a call behind which calls of twice as many tokens are tried again."""


class Lacking:
    """How large calls of one model may be, by those that found no memory.

    Args:
        name: what the log calls the model.

    Attributes:
        most: tokens of a call, at most; None: as many as a step has.
    """

    def __init__(self, name: str) -> None:
        self.most: int | None = None
        self._name = name
        self._failed = 0  # tokens of the largest call that found no memory since calls were last as large as ever
        self._steps = 0

    def found_none(self, tokens: int, why: str) -> None:
        """A call of so many tokens found no memory."""
        self._failed = max(self._failed, tokens)
        self._steps = 0
        if tokens < 2 or (self.most is not None and self.most <= tokens // 2):
            return
        self.most = tokens // 2
        log.warning(
            "%s: no memory for a call of %d tokens (%s); calls have at most %d for now",
            self._name, tokens, why, self.most,
        )  # fmt: skip

    def step(self) -> None:
        """A step begins: after many that found memory, larger calls are tried again."""
        if self.most is None:
            return
        self._steps += 1
        if self._steps > PATIENCE:
            self._steps = 0
            self.most *= 2
            if self.most >= self._failed:
                self.most, self._failed = None, 0

    def parted(self, groups: Sequence[list[str]], rows: Mapping[str, Row]) -> list[list[str]]:
        """The same groups, or smaller ones where a call has too many tokens; the order stays."""
        if self.most is None:
            return list(groups)
        found: list[list[str]] = []
        for group in groups:
            room = 0
            for id in group:
                count = len(rows[id].tokens)
                if count > room:
                    found.append([])
                    room = self.most
                found[-1].append(id)
                room -= count
        return found

    def cut(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, with more tokens than a call may have in several."""
        if self.most is None:
            return list(rows)
        return [piece for row in rows for piece in pieces(row, self.most)]


def pieces(row: Row, most: int) -> list[Row]:
    """A row in pieces of at most so many tokens, one behind the other."""
    firsts = range(0, len(row.tokens), most)
    return [replace(row, start=row.start + at, tokens=row.tokens[at : at + most]) for at in firsts]
