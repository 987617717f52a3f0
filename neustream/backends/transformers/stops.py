"""Texts at which a text ends, wherever they lie between its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neustream.service.stops import before, told_and_held

BROKEN = "\ufffd"
"""What tokenizers make of the first bytes of a character whose others are in the next token."""


class Pieces:
    """What each token of one text adds to it, as a tokenizer writes them in company; `special`: with special ones."""

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._plain = not special
        self._ids: list[int] = []
        self._from, self._told = 0, 0  # tokens before `_told` are told; those from `_from` are decoded again

    def add(self, id: int, last: bool) -> str:
        if self._tokenizer is None:
            return ""
        self._ids.append(id)
        before, now = self._decode(self._ids[self._from : self._told]), self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(BROKEN) and not last):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._plain)
        return text


class Watch:
    """Whether a text has come to a stop string, token by token; special tokens count if a stop string has one."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        special = [token for token in getattr(tokenizer, "all_special_tokens", ()) for stop in stops if token in stop]
        self._pieces = Pieces(tokenizer, special=bool(special))
        self._stops = stops
        self._keep = max([len(stop) for stop in stops]) - 1
        self._tail = ""
        self.seen = 0

    def add(self, token: int) -> bool:
        """Whether a stop string ends in what the next token adds."""
        self.seen += 1
        text = self._tail + self._pieces.add(token, last=False)
        self._tail = text[max(len(text) - self._keep, 0) :]
        return any(stop in text for stop in self._stops)


class Told:
    """Text as callers get it: nothing of the stop string that ended it, and no more held back than may be one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str, *, last: bool, stopped: bool) -> str:
        """What may be told now that `piece` has come. `stopped`: a stop string has ended the text."""
        if not self._stops:
            return piece
        text, self._held = self._held + piece, ""
        if stopped:
            ended = before(text, self._stops)
            return text if ended is None else ended
        if last:
            return text
        told, self._held = told_and_held(text, self._stops)
        return told
