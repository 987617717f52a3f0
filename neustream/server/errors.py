"""What went wrong, as clients are told it: the only place that knows status codes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from neustream.errors import BackendError, NeustreamError, RequestError, cut, told

log = logging.getLogger("neustream.server")

SHOWN = 10
"""Faults of one body that are named, at most."""
LONGEST = 100
"""Characters of a wrong value that are shown."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's `type` of an error, by status; else server_error."""
STATUS = {
    "invalid": 400,
    "unattainable": 400,
    "too_many": 429,
    "crowded": 429,
    "closed": 503,
    "cancelled": 503,
    "late": 504,
    "failed": 500,
}
"""By the code of a `RequestError`."""


@dataclass
class HTTPError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people; `code`: for programs; `param`: the field that is meant.
        retry_after_s: when to come again.
        headers: more of them.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = KINDS.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def all_headers(self) -> dict[str, str]:
        """With when to come again, and whether clients should try by themselves."""
        found = dict(self.headers)
        if self.status in (429, 503):
            found["retry-after"] = str(retry_after(self.retry_after_s))
        elif self.status >= 500:
            found["x-should-retry"] = "false"
        return found

    @property
    def event(self) -> bytes:
        """As an event of a stream that has begun; the stream is cut behind it."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


def retry_after(seconds: float | None) -> int:
    """Whole seconds from 1 to 60: clients obey no others."""
    if seconds is None or not math.isfinite(seconds):
        return 1
    return min(max(math.ceil(seconds), 1), 60)


def of_request(error: BaseException) -> HTTPError:
    """What a client is told of what a service raised."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, RequestError):
        status = STATUS.get(error.code, 500)
        reason = error.reason if status != 500 else "a stage failed: " + cut(error.reason, 200)
        return HTTPError(status, reason, error.code, error.argument or None, error.retry_after_s)
    if isinstance(error, BackendError):
        return HTTPError(400, str(error), "invalid")
    if isinstance(error, NeustreamError):
        return HTTPError(500, str(error), "failed")
    if isinstance(error, TypeError | ValueError):  # of a stock call that looked at its arguments
        return HTTPError(400, cut(told(error), 500), "invalid")
    return HTTPError(500, "an error of this server; its log has the request's id", "internal")


def log_fault(error: BaseException, id: str) -> None:
    """Log with its frames what a request came to, if clients are told no more than that this server has a fault."""
    behind = error.__cause__ if isinstance(error, HTTPError) else error
    foreseen = isinstance(error, HTTPError) and error.code != "internal"
    if isinstance(behind, Exception) and not foreseen and not isinstance(behind, NeustreamError):
        log.error("request %s failed", id, exc_info=behind)


def forget_frames(error: BaseException) -> None:
    """Let go of where an error was raised, once a client was told of it, and of the errors behind it.

    The frames know the request, and what the request came to knows the error: only a collection of
    garbage would free them.
    """
    behind: list[BaseException | None] = [error]
    seen: set[int] = set()
    while behind:
        one = behind.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            behind += [one.__cause__, one.__context__]


def of_validation(error: ValidationError, *inside: str) -> HTTPError:
    """What is wrong with a body, or with what is `inside` of one."""
    faults = []
    param = None
    for problem in error.errors(include_url=False, include_context=False)[:SHOWN]:
        where = ".".join(str(part) for part in (*inside, *problem["loc"])) or "body"
        param = param or where
        value = problem.get("input")
        got = "" if isinstance(value, dict | list) else f", got {cut(repr(value), LONGEST)}"
        if problem["type"] in ("missing", "json_invalid"):
            got = ""
        faults.append(f"{cut(where, LONGEST)}: {cut(problem['msg'], 200)}{got}")
    code = "invalid_json" if param == "body" else "invalid"
    return HTTPError(400, "; ".join(faults), code, cut(param or "", LONGEST) or None)
