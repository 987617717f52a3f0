"""What a handler knows of the request that it answers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request

from neustream.core.types import SLO
from neustream.server.bodies import AnyAsk, Body, ChatBody, ImageBody, TokenizeBody
from neustream.server.config import ServerConfig
from neustream.server.errors import HTTPError
from neustream.server.gateway import Gateway
from neustream.server.metrics import Metrics
from neustream.server.promises import Promised, promised
from neustream.server.sessions import LEFT, Sessions, Share
from neustream.server.wire import Gone, body_of

B = TypeVar("B", bound=Body)
BODY = 256 * 1024
BODY_OF_TOKEN = 32
"""Bytes of a body for texts: so many, and for each token of the longest text."""


def request_id(request: Request) -> str:
    """The client's id of a request, cut to what is safe to print; else a new one."""
    given = re.sub(r"[^A-Za-z0-9._-]", "", request.headers.get("x-request-id", ""))[:64]
    return f"{given}-{uuid.uuid4().hex[:8]}" if given else uuid.uuid4().hex


def joined(headers: Headers) -> dict[str, str]:
    """Headers by name; one that comes several times is a list, as for HTTP (RFC 9110, 5.3), and so no number."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


@dataclass
class Context:
    """A request with what the server has for it."""

    request: Request
    gateway: Gateway
    config: ServerConfig
    metrics: Metrics
    id: str
    warnings: list[str] = field(default_factory=list)
    _share: Share | None = None

    @classmethod
    def of(cls, request: Request) -> Context:
        state = request.app.state
        known: str = request.scope["state"]["id"]
        return cls(request, state.gateway, state.config, state.metrics, known)

    async def body(self, kind: type[B]) -> B:
        """The request's body; HTTPError, as soon as the server takes nothing, or for what is none."""
        self.gateway.check()
        seen = issubclass(kind, ChatBody | TokenizeBody) and self.gateway.sees
        most = self._most_bytes(seen or issubclass(kind, ImageBody))
        found = await body_of(self.request, kind, most, self.config.http.body_timeout_s)
        self.noted(found)
        return found

    def _most_bytes(self, images: bool) -> int:
        """Of a body: parsing holds up everybody, so it is no more than a request can have a use for."""
        limits = self.config.limits
        if images:
            return limits.image_body_kb * 1024
        if limits.text_body_kb is not None:
            return limits.text_body_kb * 1024
        return BODY + BODY_OF_TOKEN * self.gateway.longest

    def noted(self, found: Body) -> None:
        """Fields of a body that nobody knows are counted, and told of."""
        if unknown := found.unknown:
            self.metrics.unknown(len(unknown))
            shown = [re.sub(r"[^A-Za-z0-9._-]", "?", name)[:40] or "''" for name in unknown[:5]]
            self.warnings.append(f"unknown fields: {' '.join(shown)}")

    def promise(self, body: AnyAsk, defaults: SLO) -> Promised:
        """What the request is promised."""
        headers = joined(self.request.headers)
        found = promised(headers, body, self.config.promises, defaults)
        sessions: Sessions = self.request.app.state.sessions
        share = sessions.share(self.request.scope["state"]["key"], headers, found.warnings)
        if share is not None:
            self._share = share
            self.request.scope["state"]["late_for_session"] = not share.first
            found = replace(found, slo=replace(found.slo, total=min(found.slo.total, share.total_s)))
        self.warnings += found.warnings
        self.metrics.bad_headers(len(found.warnings))
        return found

    def about(self, tell: Callable[[], dict[str, Any]]) -> None:
        """What the access log says of the request beside the answer, once it is over."""
        self.request.scope["state"]["about"] = tell

    @property
    def warned(self) -> dict[str, str]:
        """The header that names what was not taken, if anything was not."""
        return {"x-neustream-warning": "; ".join(self.warnings)[:500]} if self.warnings else {}

    def headers(self, promise: Promised) -> dict[str, str]:
        """Of an answer that is none of errors."""
        found = {"x-neustream-slo": promise.header} if promise.slo.promises else {}
        if self._share is not None:
            found[LEFT] = f"{self._share.left_ms():.0f}"
        return {**found, **self.warned}

    def cut(self, why: HTTPError | Gone) -> None:
        """A stream ended before it was whole."""
        status, code = (499, "gone") if isinstance(why, Gone) else (why.status, why.code or "")
        self.request.scope["state"]["code"] = code
        self.metrics.cut(status, code)
