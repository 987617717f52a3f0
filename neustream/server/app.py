"""The routes as one ASGI application, behind a guard."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neustream.engine.clock import stopwatch
from neustream.errors import NeustreamError
from neustream.server import admin, agents, images, text, ui
from neustream.server.config import ServerConfig
from neustream.server.context import request_id
from neustream.server.errors import HTTPError, forget_frames, log_fault, of_request
from neustream.server.gateway import Gateway
from neustream.server.metrics import Metrics
from neustream.server.observe.access import AccessLog
from neustream.server.openapi import document
from neustream.server.protocol import LARGEST_HEAD
from neustream.server.sessions import LEFT, Sessions, late_for_session
from neustream.server.wire import Gone

log = logging.getLogger("neustream.server")

LOCAL = ("localhost", "127.0.0.1", "[::1]", "testserver")
"""Hosts that may be meant where it listens on a loopback address."""
OPEN = ("/health", "/ready", *ui.PARTS)
"""Routes without a key."""

TOLD = (
    "retry-after",
    "x-request-id",
    "x-neustream-outcome",
    LEFT,
    "x-neustream-slo",
    "x-neustream-warning",
)
"""Headers of answers that pages of other origins may read."""

ROUTES = [
    Route("/v1/completions", text.completions, methods=["POST"]),
    Route("/v1/chat/completions", text.chat_completions, methods=["POST"]),
    Route("/v1/images/generations", images.generations, methods=["POST"]),
    Route("/v1/images/edits", images.edits, methods=["POST"]),
    Route("/v1/agents/{name}", agents.runs, methods=["POST"]),
    Route("/v1/models", admin.models, methods=["GET"]),
    Route("/v1/models/{id}", admin.model, methods=["GET"]),
    Route("/tokenize", admin.tokenize, methods=["POST"]),
    Route("/detokenize", admin.detokenize, methods=["POST"]),
    Route("/inference", admin.inference, methods=["POST"]),
    Route("/stats", admin.stats, methods=["GET"]),
    Route("/health", admin.health, methods=["GET"]),
    Route("/ready", admin.ready, methods=["GET"]),
    Route("/cluster", admin.cluster, methods=["GET"]),
    Route("/metrics", admin.metrics, methods=["GET"]),
    Route("/version", admin.version, methods=["GET"]),
    *[Route(path, ui.part, methods=["GET"]) for path in ui.PARTS],
    Route("/ui/events", ui.events, methods=["GET"]),
    Route("/openapi.json", admin.openapi, methods=["GET"]),
]


def build_app(
    gateway: Gateway,
    config: ServerConfig,
    metrics: Metrics,
    keys: Sequence[str] = (),
    access: AccessLog | None = None,
) -> ASGIApp:
    """The application.

    Args:
        keys: one of them has to come with each request; none: nobody is asked.
        access: told of each request once it is over.
    """
    handlers: dict[Any, Any] = {
        HTTPError: _told,
        NeustreamError: _of_ours,
        Gone: _gone,
        404: _lost,
        405: _other_method,
        Exception: _of_ours,
    }
    app = Starlette(routes=ROUTES, exception_handlers=handlers)
    app.router.redirect_slashes = False  # another path is another route, and no client sends a body twice
    app.state.gateway = gateway
    app.state.config = config
    app.state.metrics = metrics
    app.state.sessions = Sessions(config.promises.sessions)
    app.state.openapi = document()
    guard: ASGIApp = Guard(app, config, metrics, keys, access)
    origins = config.http.cors_origins
    if not origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=TOLD
    )


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPError)
    state = request.scope["state"]
    log_fault(error, state["id"])
    forget_frames(error)
    if state.get("late_for_session"):
        error = late_for_session(error)
    state["code"] = error.code or ""
    return JSONResponse(error.body, error.status, headers=error.all_headers)


async def _of_ours(request: Request, error: Exception) -> Response:
    if isinstance(error, NeustreamError):  # others are logged with their frames
        forget_frames(error)
    return await _told(request, of_request(error))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _lost(request: Request, error: Exception) -> Response:
    return await _told(request, HTTPError(404, "no such route: GET /openapi.json has all of them", "not_found"))


async def _other_method(request: Request, error: Exception) -> Response:
    allow = ", ".join(sorted(_methods(request.scope)))
    wrong = HTTPError(405, f"allowed: {allow}", "method_not_allowed", headers={"allow": allow})
    return await _told(request, wrong)


def _methods(scope: Scope) -> set[str]:
    for route in ROUTES:
        match, _ = route.matches(scope)
        if match is not Match.NONE:
            return set(route.methods or ())
    return set()


class Wire:
    """The messages of one request on their way, counted; answers get its id.

    Attributes:
        status: of the answer, 0 before; streams: whether events have begun; size: bytes of the body.
    """

    def __init__(self, receive: Receive, send: Send, id: str, begun: Callable[[], None]) -> None:
        self._receive, self._send, self._id, self._begun = receive, send, id, begun
        self.status = self.size = 0
        self.streams = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self._id.encode())]
            message["headers"] = headers
            if any(value.startswith(b"text/event-stream") for _, value in headers):
                self.streams = True
                self._begun()
        await self._send(message)


class Guard:
    """Who may come in: hosts, keys. It gives each request an id, and counts answers."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        metrics: Metrics,
        keys: Sequence[str],
        access: AccessLog | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._access = access
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open = {*OPEN, "/metrics"} if config.http.open_metrics else set(OPEN)
        web = config.http.local and config.http.uds is None  # pages reach it by a name of their own
        allowed = [name.lower() for name in config.http.allowed_hosts]
        self._hosts = {*LOCAL, *allowed} if web else None
        self._headers = config.limits.headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _without_host(scope)
        request = Request(scope)
        known = request_id(request)
        scope.setdefault("state", {}).update(id=known, code="", key="")
        began = stopwatch()
        wire = Wire(receive, send, known, lambda: self._metrics.streams(1))
        route = _route(scope)
        self._metrics.arrived(known, route, request.headers)
        try:
            self._check(request)
            await self._app(scope, wire.receive, wire.send)
        except HTTPError as error:
            await (await _told(request, error))(scope, wire.receive, wire.send)
        except Exception as error:
            log.exception("request %s failed", known)
            if not wire.status:
                answer = await _told(request, of_request(error))
                await answer(scope, wire.receive, wire.send)
        finally:
            if wire.streams:
                self._metrics.streams(-1)
            self._metrics.answered(known, route, wire.status, scope["state"]["code"], wire.size)
            if self._access is not None:
                self._access(_facts(scope, wire, route, stopwatch() - began))
            scope["state"].pop("about", None)  # servers keep a scope in a ring, and this has all that was answered

    def _check(self, request: Request) -> None:
        if _head_size(request.scope) > LARGEST_HEAD:
            raise HTTPError(431, f"the head is larger than {LARGEST_HEAD} bytes", "too_large")
        if len(request.headers) > self._headers:
            text = f"{len(request.headers)} headers; at most {self._headers}"
            raise HTTPError(431, text, "too_large")
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            text = "transfer-encoding and content-length: where the body ends could be read in two ways"
            raise HTTPError(400, text, "invalid", headers={"connection": "close"})
        host = request.headers.get("host", "")
        name = host if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name.lower() not in self._hosts:
            raise HTTPError(403, f"host {host[:100]!r} is not allowed here", "host")
        if not self._digests or request.scope["path"] in self._open:  # what is routed by: a URL has Host in it
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        fits = [hmac.compare_digest(digest, each) for each in self._digests]
        request.scope["state"]["key"] = digest.hex()
        if scheme.lower() != "bearer" or not any(fits):
            headers = {"www-authenticate": "Bearer"}
            raise HTTPError(401, "a key is needed: Authorization: Bearer KEY", "key", headers=headers)


ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
"""How a target begins that clients of proxies send: with a scheme and a host."""


def _without_host(scope: Scope) -> None:
    """Make a target with a scheme and a host one of a path alone; its host counts, whatever `Host` says."""
    raw: bytes = scope.get("raw_path") or b""
    found = ABSOLUTE.match(raw)
    if found is None:
        return
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", found[1]), *others]
    scope["raw_path"] = raw[found.end() :] or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("ascii"))


def _head_size(scope: Scope) -> int:
    """About the bytes of a head; the protocol only counts what has not come whole."""
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
    target = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    return target + sum([len(name) + len(value) + 4 for name, value in pairs])


def _facts(scope: Scope, wire: Wire, route: str, seconds: float) -> dict[str, Any]:
    """What the access log says of a request."""
    state = scope["state"]
    found = {
        "id": state["id"],
        "method": scope["method"],
        "route": route,
        "status": wire.status,
        "code": state["code"],
        "ms": round(seconds * 1e3, 3),
        "body_bytes": wire.size,
        "stream": wire.streams,
    }
    about: Callable[[], dict[str, Any]] | None = state.get("about")
    return found if about is None else {**found, **about()}


def _route(scope: Scope) -> str:
    """The pattern of the route that answered; never a path, which may be anything."""
    for route in ROUTES:
        match, _ = route.matches(scope)
        if match is not Match.NONE:
            return route.path
    return "none"
