"""Texts where no tokenizer is at hand: as many words as the server counts as so many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neustream.workload.texts import BYTES, Texts


class Words(Texts):
    """Texts of words, of which `a_token` are a token for the server."""

    def __init__(self, a_token: float) -> None:
        super().__init__(None)
        self.a_token = a_token

    def text(self, tokens: int, *seed: int) -> str:
        """A text of about so many tokens."""
        return super().text(max(1, round(tokens * self.a_token)) if tokens else 0, *seed)

    def count(self, text: str) -> int:
        """About how many tokens a text has."""
        return round(super().count(text) / self.a_token)

    def __reduce__(self) -> tuple[Any, ...]:
        return Words, (self.a_token,)


def tokenizer_of(name: str) -> str | None:
    """A tokenizer that is at hand by this name: a file, the folder of one, or bytes; else None."""
    path = local_path(name)
    if name == BYTES or (path is not None and path.is_file()):
        return name
    return name if path is not None and (path / "tokenizer.json").is_file() else None


def local_path(name: str) -> Path | None:
    """The file or folder of a name; None if there is none, or the name can be none."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such home
        return None
