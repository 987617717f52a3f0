"""Every exception that neustream raises on purpose.

    NeustreamError
    ├── ConfigError     a YAML file, a --set option or an argument is wrong
    ├── GraphError      a graph cannot be built, or its control flow misbehaved
    ├── ProfileError    a latency was asked for that nobody measured
    ├── RequestError    a request is refused (duplicate id, impossible numbers, too many open)
    │   ├── RequestDropped    the policy gave it up: its promise could not be kept
    │   ├── RequestFailed     a stage failed it
    │   └── RequestCancelled  it was cancelled, by its caller or because serving ended
    ├── PolicyError     a policy broke its contract (unknown job, two stages in one batch, a stall)
    ├── StageFailed     a stream module raised, or returned something it must not
    └── BackendError    a backend cannot serve this model here

A message names the thing, the value and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal


class NeustreamError(Exception):
    """Parent of all errors of this library."""


class ConfigError(NeustreamError):
    """A configuration is wrong; the message names file, key and value."""


class GraphError(NeustreamError):
    """A graph is malformed, or one of its control-flow callbacks gave an impossible answer."""


class ProfileError(NeustreamError):
    """A latency profile is malformed, missing, or was not measured where it is needed."""


class RequestError(NeustreamError):
    """A request cannot be accepted, or came to nothing (the three classes below).

    Attributes:
        status: "refused" if it was never accepted, else how it ended.
        reason: why, without the request's name.
        code: the same for programs. Refused: "invalid", "too_many" (open requests), "closed"
            (nothing is served any more), "moved" (another service goes on with it), "too_early"
            (to move). Else as of `neustream.core.events.Ended.code`: "unattainable", "late",
            "crowded", "failed", "cancelled".
        retry_after_s: seconds after which the same request may well be served, at the pace at which
            requests have been done lately; None: not known, or it does not matter.
        argument: the one of the request's that is wrong; empty: none alone.
    """

    status: Literal["refused", "dropped", "failed", "cancelled"] = "refused"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        code: str = "",
        retry_after_s: float | None = None,
        argument: str = "",
    ) -> None:
        super().__init__(message)
        self.argument = argument
        self.code = code or ("invalid" if self.status == "refused" else self.status)
        self.reason = message if reason is None else reason
        self.retry_after_s = retry_after_s


class RequestDropped(RequestError):
    """A policy gave an accepted request up, mostly because its promise could not be kept."""

    status = "dropped"


class RequestFailed(RequestError):
    """A stage, or the request's own objects, failed an accepted request."""

    status = "failed"


class RequestCancelled(RequestError):
    """An accepted request was cancelled: on its caller's wish, or because serving ended."""

    status = "cancelled"


class PolicyError(NeustreamError):
    """A policy returned a decision that the scheduler cannot carry out."""


class StageFailed(NeustreamError):
    """A stage could not produce a usable result for one job or a whole batch."""


class BackendError(NeustreamError):
    """A backend cannot build or serve the model it was asked for."""


MANY = 100
"""Names of which a message lists none."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint for an unknown `word`: the closest allowed one, and all of them if they are not too many to read."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    if len(names) > MANY:
        return f"{meant}{len(names)} are allowed"
    return f"{meant}allowed: {', '.join(names) or 'none'}"


def one_line(error: BaseException) -> str:
    """What an error says of itself, which may be on several lines; whatever its `str()` does."""
    try:
        return " ".join(str(error).split())
    except BaseException:  # noqa: BLE001  it may be anybody's
        return "its text could not be made"


def cut(text: str, most: int) -> str:
    """A text of at most `most` characters, with dots in place of what there was more."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object, most: int = 60) -> str:
    """How a value is shown in a message, in at most `most` characters; whatever its `repr()` does."""
    try:
        text = " ".join(repr(value).split())
    except BaseException:  # noqa: BLE001  it may be anybody's, or a number of too many digits
        return f"a {type(value).__name__}"
    return cut(text, most)


def told(error: BaseException) -> str:
    """An error in a line of a message: ours as it is, others with their type."""
    text = one_line(error)
    if isinstance(error, NeustreamError):
        return text
    return f"{type(error).__name__}: {cut(text, 200)}" if text else type(error).__name__
