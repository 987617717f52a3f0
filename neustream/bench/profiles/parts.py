"""What the readers of all dialects do with a URL, a list of values, and data that are no texts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.words import local_path
from neustream.errors import ConfigError, shown


def base_url(key: str, given: str) -> str:
    """A server's URL without the route's version, "" if it is not known yet.

    Raises:
        ConfigError: it is no URL of a server.
    """
    url = given.strip().rstrip("/").removesuffix("/v1")
    if not url:
        return ""
    try:
        split = urlsplit(url)
        whole = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(f"{key}: {given!r} is no URL as http://HOST:PORT")
    return url


def local_file(key: str, path: str) -> Path:
    """A file that a profile names; Unrunnable if there is no such file."""
    found = local_path(path)
    if found is None or not found.is_file():
        raise Unrunnable(f"{key}: {shown(path)} is no local file, and nothing is loaded from a hub")
    return found


def each_or_last(values: list[float], number: int, many: int, key: str) -> float:
    """The value of a load: one for all, or one each."""
    if len(values) not in (1, many):
        raise ConfigError(
            f"{key}: {len(values)} values for {many} loads; allowed: one, or one each"
        )
    return values[0] if len(values) == 1 else values[number]


def refuse_media(kind: str) -> Unrunnable:
    """What is said of data with pictures or sound."""
    return Unrunnable(f"{kind}: prompts are texts alone")
