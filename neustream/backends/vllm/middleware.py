"""Drops of our scheduler class as errors, on vLLM's own HTTP server; imports no vLLM.

    vllm serve MODEL --scheduler-cls ... --middleware neustream.backends.vllm.HonestDrops

vLLM answers 200 in any case, and ends a stream that was given up with `[DONE]`, so clients count it
as done. With this a drop before the first token is 429 (400 where the promise could not have been
kept even alone), and one behind it 504, or in a stream an error event and a cut connection.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from neustream.backends.vllm.slo_args import ALONE, OURS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ABORT = b'"abort"'
"""What is in each answer, or part of one, that tells of a drop."""


class HonestDrops:
    """ASGI middleware; what is no answer of completions goes through untouched."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        texts = scope["type"] == "http" and scope["path"].endswith("/completions")
        await self._app(scope, receive, Held(send) if texts else send)


class Held:
    """A `send` that keeps an answer back until it has a token in it, or its end."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._kept: list[Message] = []
        self._over = False

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body = message.get("body", b"")
        reason = reason_in(body) if ABORT in body else None
        if reason is not None:
            await self._tell(reason, had_tokens=self._start is None or has_text(body))
        elif self._start is None:
            await self._send(message)
        else:
            self._kept.append(message)
            if is_token(body) or not message.get("more_body"):
                await self._release()

    async def _release(self) -> None:
        assert self._start is not None
        await self._send(self._start)
        self._start = None
        for message in self._kept:
            await self._send(message)
        self._kept.clear()

    async def _tell(self, reason: str, *, had_tokens: bool) -> None:
        """A drop: a status if nothing was sent, else an error event, and no end."""
        self._over = True
        code, status = ("late", 504) if had_tokens else ("crowded", 429)
        if reason.endswith(ALONE):
            code, status, reason = "unattainable", 400, reason.removesuffix(ALONE)
        kind = "invalid_request_error" if status == 400 else "server_error"
        error = {"message": reason, "type": kind, "param": None, "code": code}
        content = json.dumps({"error": error}).encode()
        if self._start is None:
            body = b"data: " + content + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            return
        more = (b"retry-after", b"1") if status == 429 else (b"x-should-retry", b"false")
        length = b"%d" % len(content)
        headers = [(b"content-type", b"application/json"), (b"content-length", length), more]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})


def answers_in(body: bytes) -> Iterator[dict[str, Any]]:
    """The choices in a part of a stream, or in a whole answer; none where it is neither."""
    lines = body.split(b"\n") if body.startswith(b"data: ") else [body]
    for line in lines:
        try:
            found = json.loads(line.removeprefix(b"data: "))
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("choices"), list):
            yield from [choice for choice in found["choices"] if isinstance(choice, dict)]


def reason_in(body: bytes) -> str | None:
    """Why our scheduler gave up what is answered here; None: it did not."""
    for choice in answers_in(body):
        reason = choice.get("stop_reason")
        ours = isinstance(reason, str) and reason.startswith(OURS)
        if ours and choice.get("finish_reason") == "abort":
            return str(reason).removeprefix(OURS)
    return None


def has_text(body: bytes) -> bool:
    """Whether anything of a text is in it."""
    for choice in answers_in(body):
        inner = choice.get("delta") or choice.get("message") or choice
        if inner.get("text") or inner.get("content"):
            return True
    return False


def is_token(body: bytes) -> bool:
    """Whether it is of a token: all choices are, but for those that only say a chat's role."""
    for choice in answers_in(body):
        delta = choice.get("delta")
        if not isinstance(delta, dict) or "role" not in delta or delta.get("content"):
            return True
    return False
