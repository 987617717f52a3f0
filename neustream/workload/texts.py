"""Prompts of so many tokens, drawn at random; the same each time for the same seeds."""

from __future__ import annotations

import functools
import importlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neustream.errors import ConfigError, told

BYTES = "bytes"
"""The name of a tokenizer for which each byte is a token."""
LETTERS = np.array(list("etaoinshrdlucmfwypvbgk "))
_WORDS = (
    "the of and to in is that it for was on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more go see no way could"
)
WORDS = np.array(_WORDS.split())
"""Words that most vocabularies have as one token."""
TRIES = 10


def read_tokenizer(path: Path, allowed: str = "a tokenizer.json") -> Any:
    """The tokenizer in a file, of the library `tokenizers`.

    Args:
        allowed: what may be named in place of `path`.

    Raises:
        ConfigError: the library or the file is not there, or there is no tokenizer in it.
    """
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigError("a tokenizer needs tokenizers: pip install 'neustream[traces]'") from None
    if not path.is_file():
        raise ConfigError(f"tokenizer {path}: no such file; allowed: {allowed}")
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  it raises plain Exceptions
        raise ConfigError(f"tokenizer {path}: {told(error)}") from None


class Texts:
    """Makes texts and counts their tokens.

    Args:
        tokenizer: a tokenizer.json or a folder with one; "bytes"; None: a token a word, which is
            about what most models count.

    Raises:
        ConfigError: there is no such tokenizer.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self.name = tokenizer
        if tokenizer not in (None, BYTES):
            _ = self._library  # so that a fault is told at once

    @property
    def exact(self) -> bool:
        """Whether lengths are those of a tokenizer."""
        return self.name is not None

    def text(self, tokens: int, *seed: int) -> str:
        """A text of so many tokens."""
        rng = np.random.default_rng(seed)
        if self.name == BYTES:
            return "".join(rng.choice(LETTERS, tokens))
        if self.name is None:
            return "".join(f" {word}" for word in rng.choice(WORDS, tokens))
        return self._drawn(rng, tokens)

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        if self.name == BYTES:
            return len(text.encode())
        if self.name is None:
            return len(text.split())
        return len(self._library.encode(text, add_special_tokens=False).ids)

    def _drawn(self, rng: np.random.Generator, tokens: int) -> str:
        """Ids are decoded and encoded again until there are as many; else the nearest there was."""
        ids: list[int] = rng.choice(self._plain, tokens).tolist()
        best, off = "", tokens + 1
        for _ in range(TRIES):
            text = self._library.decode(ids)
            found = self._library.encode(text, add_special_tokens=False).ids
            missing = tokens - len(found)
            if abs(missing) < off:
                best, off = text, abs(missing)
            if missing == 0:
                break
            ids = found[:tokens] + rng.choice(self._plain, max(0, missing)).tolist()
        return best

    @cached_property
    def _library(self) -> Any:
        assert self.name is not None
        path = Path(self.name)
        path = path / "tokenizer.json" if path.is_dir() else path
        return read_tokenizer(path, "a tokenizer.json, or bytes")

    @cached_property
    def _plain(self) -> list[int]:
        """The ids of tokens that are no special ones."""
        special = set(self._library.get_added_tokens_decoder())
        return [each for each in range(self._library.get_vocab_size()) if each not in special]

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts, (self.name,)  # other processes load it anew


@functools.lru_cache(maxsize=4096)
def shared(texts: Texts, tokens: int, *seed: int) -> str:
    """A beginning that requests share, made once."""
    return texts.text(tokens, *seed)
