"""One request to a server over HTTP: what is sent, what comes back, what became of its promise."""

from __future__ import annotations

import base64
import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, cut, told

Outcome = Literal["on_time", "late", "done", "dropped", "failed", "refused"]
GIVEN_UP = ("unattainable", "crowded", "late", "expired", "too_many", "queue_full", "wait")
"""Codes of requests that the server gave up, or did not take for want of room."""
LONGEST = 1000
"""Characters of a server's message that are shown."""


@dataclass
class Told:
    """What became of a request.

    Attributes:
        outcome: done: nothing was promised; refused: the request itself is wrong.
        status: of HTTP; code, reason: of an error; retry_after_s: when to come again.
        ttft_s, tpot_s, e2e_s: as seen here; None: there were none.
        tokens, text: of a text; image: the bytes of one.
        server: what the server says of it, if it does.
        warning: what of the request the server did not take.
    """

    outcome: Outcome = "done"
    status: int = 0
    code: str = ""
    reason: str = ""
    retry_after_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    tokens: int = 0
    text: str = ""
    image: bytes = field(default=b"", repr=False)
    promised: str = ""
    server: dict[str, Any] = field(default_factory=dict)
    warning: str = ""


class Server:
    """A server at `url`.

    Args:
        key: that is sent along; None: none.
        timeout_s: of each read.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._timeout_s = timeout_s

    def models(self) -> dict[str, str]:
        """The models that it serves, and their kinds; BackendError if it does not answer so."""
        try:
            with self._open("/v1/models", None) as answer:
                found = json.load(answer)["data"]
            return {model["id"]: model.get("neustream", {}).get("kind", "text") for model in found}
        except urllib.error.HTTPError as error:
            raise BackendError(f"{self.url}: {_fault(error).reason}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{self.url}/v1/models: no list of models: {told(error)}") from None

    def cluster(self) -> dict[str, Any]:
        """How the cluster behind it is; BackendError if nobody answers, or there is none."""
        try:
            with self._open("/cluster", None) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise BackendError(f"{self.url}: {_fault(error).reason}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BackendError(f"{self.url}/cluster: {told(error)}") from None
        if not isinstance(found, dict):
            raise BackendError(f"{self.url}/cluster: no answer of a neustream server: {cut(repr(found), LONGEST)}")
        return found

    def ask(self, path: str, body: Mapping[str, Any], heard: Callable[[str], None]) -> Told:
        """Send a request; `heard` gets each piece of a text. BackendError if nobody answers."""
        began = stopwatch()
        try:
            with self._open(path, body) as answer:
                found = Told(status=answer.status)
                found.promised = answer.headers.get("x-neustream-slo", "")
                found.warning = answer.headers.get("x-neustream-warning", "")
                if body.get("stream"):
                    _follow(answer, found, began, heard)
                else:
                    _whole(answer, found, began)
        except urllib.error.HTTPError as error:
            found = _fault(error)
            found.e2e_s = stopwatch() - began
        return found

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(self.url + path, data, headers)
            return urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            why = error.reason if isinstance(error.reason, str) else told(error.reason)
            raise BackendError(f"{self.url}: {why}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BackendError(f"{self.url}: {told(error)}") from None


def _fault(error: urllib.error.HTTPError) -> Told:
    """What an answer that is an error says."""
    found = Told("failed", status=error.code)
    try:
        said = json.loads(error.read())["error"]
        _say(found, said)
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        found.reason = f"status {error.code}, {error.reason}"
    if found.code in GIVEN_UP or error.code in (429, 503, 504):
        found.outcome = "dropped"
    elif error.code < 500:
        found.outcome = "refused"
    wait = error.headers.get("retry-after", "")
    found.retry_after_s = float(wait) if wait.isdecimal() and wait.isascii() else None
    return found


def _say(found: Told, said: Mapping[str, Any]) -> None:
    found.code = str(said.get("code") or "")
    found.reason = cut(str(said.get("message") or said), LONGEST)


def _follow(answer: Any, found: Told, began: float, heard: Callable[[str], None]) -> None:
    """Read a stream to its end."""
    latest = began
    finished = False
    try:
        for chunk in _events(answer):
            if chunk is None:
                finished = True
                break
            if "error" in chunk:
                _say(found, chunk["error"])
                break
            found.server = (chunk.get("usage") or {}).get("neustream") or found.server
            for choice in chunk.get("choices", []):
                latest = _take(choice, found, began, heard)
    except (OSError, ValueError, http.client.HTTPException, AttributeError, TypeError) as error:
        found.reason = found.reason or f"the stream broke: {cut(told(error), LONGEST)}"
    found.e2e_s = stopwatch() - began
    if found.ttft_s is not None and found.tokens > 1:
        found.tpot_s = (latest - began - found.ttft_s) / (found.tokens - 1)
    if not finished:
        found.outcome = "dropped" if found.code in GIVEN_UP else "failed"
        found.reason = found.reason or "the stream was cut"


def _take(choice: Mapping[str, Any], found: Told, began: float, heard: Callable[[str], None]) -> float:
    """One token of a stream; when it came."""
    now = stopwatch()
    found.tokens += 1
    if found.ttft_s is None:
        found.ttft_s = now - began
    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    found.text += piece
    heard(piece)
    return now


def _events(answer: Any) -> Iterator[dict[str, Any] | None]:
    """The JSON of each event; None for the last one."""
    for line in answer:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            yield None if data == b"[DONE]" else json.loads(data)


def _whole(answer: Any, found: Told, began: float) -> None:
    """Read an image."""
    try:
        found.image = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    except (OSError, ValueError, http.client.HTTPException, KeyError, TypeError, IndexError) as error:
        found.outcome, found.reason = "failed", f"no image came: {cut(told(error), LONGEST)}"
    found.e2e_s = stopwatch() - began
    outcome = answer.headers.get("x-neustream-outcome")
    if outcome is not None:
        found.server["on_time"] = outcome == "on_time"


def judge(found: Told, promised: Mapping[str, float]) -> None:
    """Say of what is done whether it was on time: by the server's word, else as seen here.

    `promised`: seconds by name: ttft, tpot, e2e; the server told them back.
    """
    if found.outcome != "done" or not promised:
        return
    on_time = found.server.get("on_time")
    if on_time is None:
        seen = {"ttft": found.ttft_s, "tpot": found.tpot_s, "e2e": found.e2e_s}
        on_time = all((seen[name] or 0.0) <= seconds for name, seconds in promised.items())
    found.outcome = "on_time" if on_time else "late"


def budgets(header: str) -> dict[str, float]:
    """Seconds by name of `ttft=500;tpot=50;e2e=inf;class=chat`; what is not promised is left out."""
    parts = [part.partition("=") for part in header.split(";")]
    found = {}
    for name, _, value in parts:
        if name in ("ttft", "tpot", "e2e") and value.replace(".", "", 1).isdecimal():
            found[name] = float(value) / 1e3
    return {name: seconds for name, seconds in found.items() if math.isfinite(seconds)}
