"""Every exception that neustream raises on purpose.

    NeustreamError
    ├── ConfigError     a YAML file, a --set option or an argument is wrong
    ├── GraphError      a graph cannot be built, or its control flow misbehaved
    ├── ProfileError    a latency was asked for that nobody measured
    ├── RequestError    a request cannot be accepted (duplicate id, impossible numbers)
    ├── PolicyError     a policy broke its contract (unknown job, two stages in one batch, a stall)
    ├── StageFailed     a stream module raised, or returned something it must not
    └── BackendError    a backend cannot serve this model here

A message names the thing, the value and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NeustreamError(Exception):
    """Parent of all errors of this library."""


class ConfigError(NeustreamError):
    """A configuration is wrong; the message names file, key and value."""


class GraphError(NeustreamError):
    """A graph is malformed, or one of its control-flow callbacks gave an impossible answer."""


class ProfileError(NeustreamError):
    """A latency profile is malformed, missing, or was not measured where it is needed."""


class RequestError(NeustreamError):
    """A request cannot be accepted."""


class PolicyError(NeustreamError):
    """A policy returned a decision that the scheduler cannot carry out."""


class StageFailed(NeustreamError):
    """A stage could not produce a usable result for one job or a whole batch."""


class BackendError(NeustreamError):
    """A backend cannot build or serve the model it was asked for."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint for an unknown `word`: the closest allowed one, and all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}allowed: {', '.join(names) or 'none'}"


def told(error: BaseException) -> str:
    """What an error says of itself, with its type if it is not one of ours; whatever its `str()` does."""
    try:
        text = str(error)
    except BaseException:
        text = "its text could not be made"
    if isinstance(error, NeustreamError):
        return text
    return f"{type(error).__name__}: {text}"


def shown(value: object) -> str:
    """`repr(value)`, shortened; whatever its `repr()` does."""
    try:
        text = repr(value)
    except BaseException:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"
