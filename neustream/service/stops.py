"""Stop strings in texts that come piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


def told_and_held(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """What of a text without a stop string may be told, and its end, which one may still begin with."""
    held = max([_beginning(text, stop) for stop in stops], default=0)
    border = len(text) - held
    return text[:border], text[border:]


def before(text: str, stops: Sequence[str], behind: int = 0) -> str | None:
    """A text up to the first stop string in it that ends behind so many characters; None: there is none."""
    places = [text.find(stop, max(behind - len(stop) + 1, 0)) for stop in stops]
    found = [place for place in places if place >= 0]
    return text[: min(found)] if found else None


def _beginning(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
