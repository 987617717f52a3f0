"""Folders that a server's config names."""

from __future__ import annotations

from pathlib import Path

from neustream.errors import BackendError


def folder_of(path: Path) -> Path:
    """The folder itself; BackendError if it is none."""
    if not path.is_dir():
        raise BackendError(f"{str(path)!r} is no folder")
    return path
