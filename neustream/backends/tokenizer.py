"""The tokenizer of a checkpoint, for any backend that serves texts; it needs transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from neustream.errors import BackendError, told


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer that a folder has; BackendError if it has none: transformers makes one without words then."""
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file ends in whatever reads it
        raise BackendError(f"the tokenizer in {str(folder)!r} cannot be made: {told(error)}") from error
    if len(found) <= len(found.all_special_tokens):
        raise BackendError(f"{str(folder)!r} has no tokenizer: give tokenizer: a folder that has one, or bytes")
    return found
