"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

LEAST = -9999.0
"""In place of minus infinity, which is no JSON."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece calls a token of a byte."""
BROKEN = "\ufffd"


class Likelihood(Protocol):
    """How likely a model found a token, as backends tell it: ids and natural logarithms."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A token that is told of: where it begins in the text, and its likelihood; None of the first one."""

    token: int
    offset: int
    likelihood: Likelihood | None


class Names:
    """What tokens are called: their own text, or their ids.

    Args:
        tokenizer: None: there are only ids.
    """

    def __init__(self, tokenizer: Any, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """Its text; bytes of a part of a character as OpenAI writes them, `bytes:\\xe2\\x80`."""
        if self._as_ids:
            return f"token_id:{token}"
        text, raw = self._both(token)
        return text if BROKEN not in text else "bytes:" + "".join([f"\\x{byte:02x}" for byte in raw])

    def raw(self, token: int) -> list[int] | None:
        """The bytes of its text; None where there is no tokenizer."""
        return None if self._tokenizer is None else list(self._both(token)[1])

    def _both(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            text = self._tokenizer.decode([token])
            raw = self._bytes(token) if BROKEN in text else None
            self._known[token] = text, text.encode("utf-8", "replace") if raw is None else raw
        return self._known[token]

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of a token that is no whole character; None if its tokenizer does not tell them."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        table = _of_letters()
        return bytes([table[letter] for letter in name]) if all(letter in table for letter in name) else None


@cache
def _of_letters() -> dict[str, int]:
    """The bytes that letters stand for in tokens of byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + at): byte for at, byte in enumerate(others)}


def of_completion(names: Names, places: Iterable[Place]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions: four lists with an entry a token."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for place in places:
        likely = place.likelihood
        found["tokens"].append(names.text(place.token))
        found["text_offset"].append(place.offset)
        found["token_logprobs"].append(None if likely is None else _number(likely.logprob))
        tops = None
        if likely is not None:
            pairs = [*likely.top, (likely.token, likely.logprob)]
            tops = {names.text(token): _number(logprob) for token, logprob in reversed(pairs)}
            tops = dict(reversed(tops.items()))  # the likeliest first, and of equal names the likeliest
        found["top_logprobs"].append(tops)
    return dict(found)


def of_chat(names: Names, places: Iterable[Place]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""
    content = []
    for place in places:
        likely = place.likelihood
        if likely is not None:
            tops = [_named(names, token, logprob) for token, logprob in likely.top]
            content.append({**_named(names, likely.token, likely.logprob), "top_logprobs": tops})
    return {"content": content, "refusal": None}


def _named(names: Names, token: int, logprob: float) -> dict[str, Any]:
    return {"token": names.text(token), "logprob": _number(logprob), "bytes": names.raw(token)}


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
