"""Text as clients get it: nothing of a stop string, and no more held back than may be one."""

from __future__ import annotations

from collections.abc import Sequence

from neustream.service.stops import before, told_and_held


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
        stopped = before(text, self._strings)
        if stopped is not None:
            self._held, self.met = "", True
            return stopped
        told, self._held = told_and_held(text, self._strings)
        return told

    def rest(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held
