"""Texts at which a text ends, wherever they lie between its tokens, those of the prompt included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neustream.service.stops import before, told_and_held

BROKEN = "\ufffd"
"""What tokenizers make of the first bytes of a character whose others are in the next token."""
BYTES = 4
"""Of a character, at most: tokens that may be a part of one."""


def lead_of(prompt: Sequence[int], stops: Sequence[str]) -> tuple[int, ...]:
    """The last tokens of a prompt, in which a stop string may begin that an output completes."""
    longest = max([len(stop.encode()) for stop in stops], default=0)
    return tuple(prompt[max(len(prompt) - longest - BYTES, 0) :]) if longest else ()


class Pieces:
    """What each token of one text adds to it, as a tokenizer writes them in company.

    Args:
        special: with special tokens.
        lead: tokens before the first one.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False, lead: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._plain = not special
        self._ids = list(lead)
        self._from, self._told = 0, len(lead)  # tokens before `_told` are told; those from `_from` are decoded again
        self.lead = self._decode(self._ids) if lead else ""
        """The text of the tokens before the first one."""
        while self._told and self.lead.endswith(BROKEN) and len(lead) - self._told < BYTES:
            self._told -= 1
            self.lead = self._decode(self._ids[: self._told])

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
    """Whether a text has come to a stop string, token by token; special tokens count if a stop string has one.

    As in `generate`, one may begin in the prompt, whose last tokens are the `lead`.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], lead: Sequence[int] = ()) -> None:
        special = [token for token in getattr(tokenizer, "all_special_tokens", ()) for stop in stops if token in stop]
        self._pieces = Pieces(tokenizer, special=bool(special), lead=lead)
        self._stops = stops
        self._keep = max([len(stop) for stop in stops]) - 1
        self._tail = self._end(self._pieces.lead)
        self.seen = 0

    def add(self, token: int) -> bool:
        """Whether a stop string ends in what the next token adds."""
        self.seen += 1
        known, text = len(self._tail), self._tail + self._pieces.add(token, last=False)
        self._tail = self._end(text)
        return any(text.find(stop, max(known - len(stop) + 1, 0)) >= 0 for stop in self._stops)

    def _end(self, text: str) -> str:
        return text[max(len(text) - self._keep, 0) :]


class Told:
    """The text of outputs as callers get it: nothing of the stop string that ended it.

    No more is held back than may be one.

    Args:
        lead: the last tokens of the prompt.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], lead: Sequence[int] = ()) -> None:
        self._stops = stops
        self._pieces = Pieces(tokenizer)
        self._behind = Pieces(tokenizer, lead=lead) if stops and lead else None
        self._held = "" if self._behind is None else self._behind.lead
        self._silent = len(self._held)  # characters of it that are not of outputs
        self._first = ""  # of the outputs, behind the prompt

    def add(self, token: int, *, last: bool, stopped: bool) -> str:
        """What may be told now that `token` has come. `stopped`: a stop string has ended the text."""
        piece = self._pieces.add(token, last)
        if not self._stops:
            return piece
        if self._behind is not None:
            self._join(self._behind, token, piece)
        text, self._held = self._held + piece, ""
        if stopped:
            ended = before(text, self._stops, behind=self._silent)
            return self._own(text if ended is None else ended)
        if last:
            return self._own(text)
        told, self._held = told_and_held(text, self._stops)
        return self._own(told)

    def _join(self, behind: Pieces, token: int, piece: str) -> None:
        """What lies between the prompt and the first output: a blank with which a text alone does not begin."""
        self._first += behind.add(token, last=False)
        if piece:
            between = self._first.removesuffix(piece) if self._first.endswith(piece) else ""
            self._held, self._silent, self._behind = self._held + between, self._silent + len(between), None

    def _own(self, text: str) -> str:
        """That of it which is of outputs."""
        silent = min(self._silent, len(text))
        self._silent -= silent
        return text[silent:]
