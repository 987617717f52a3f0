"""Text as clients get it: nothing of a stop string, and no more held back than may be one."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """The text of one choice, piece by piece.

    Held back is the longest end that a stop string may still begin with.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = list(strings)
        self._held = ""
        self.met = False

    def add(self, piece: str) -> str:
        """What may be told now that `piece` has come; `met` says whether a stop string has."""
        if not self._strings:
            return piece
        text = self._held + piece
        places = [text.find(string) for string in self._strings]
        found = [place for place in places if place >= 0]
        if found:
            self._held, self.met = "", True
            return text[: min(found)]
        keep = max(_beginning(text, string) for string in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with, and is longer than."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
