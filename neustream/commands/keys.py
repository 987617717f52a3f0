"""API keys in files."""

from __future__ import annotations

from pathlib import Path

from neustream.errors import ConfigError


def keys_in(path: Path) -> list[str]:
    """The keys of `--api-key-file`, one or more; ConfigError, by the option, if there are none."""
    try:
        keys = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from None
    if not keys:
        raise ConfigError(f"--api-key-file {path}: no key in it")
    return keys
