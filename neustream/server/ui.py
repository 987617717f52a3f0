"""The dashboard: one page without a framework, and the feed that it reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from neustream.server.context import Context
from neustream.server.errors import HTTPError
from neustream.server.streams import EventStream, Outlet

MOST_VIEWERS = 10
EVERY_S = 1.0
PARTS = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/ui/plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    "/ui/style.css": ("style.css", "text/css; charset=utf-8"),
    "/ui/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
"""Path -> file in `static/`, and its media type. They hold nothing of anybody: no key is needed."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _read() -> Mapping[str, bytes]:
    folder = files("neustream.server") / "static"
    return {path: (folder / name).read_bytes() for path, (name, _) in PARTS.items()}


CONTENT = _read()


async def part(request: Request) -> Response:
    """GET /ui, and its parts."""
    _check(request)
    path: str = request.scope["path"]
    return Response(CONTENT[path], media_type=PARTS[path][1], headers=HEADERS)


async def events(request: Request) -> Response:
    """GET /ui/events: a snapshot a second, as JSON in events."""
    _check(request)
    context = Context.of(request)
    metrics = context.metrics
    if metrics.viewers >= MOST_VIEWERS:
        raise HTTPError(429, f"{MOST_VIEWERS} dashboards are open: no more", "viewers")
    metrics.viewers += 1
    feed = _feed(context)
    stream: Any = EventStream(
        await anext(feed),
        feed,
        {},
        outlet=Outlet(),
        failed=lambda why: None,
    )
    response: Response = stream
    return response


def _check(request: Request) -> None:
    if not request.app.state.config.observe.ui:
        raise HTTPError(404, "no such route", "not_found")


async def _feed(context: Context) -> AsyncIterator[bytes]:
    """Snapshots until the server drains: who watches must not hold that up."""
    metrics, seen = context.metrics, 0
    try:
        while True:
            gauges = context.gateway.gauges()
            shown = metrics.snapshot(gauges, seen)
            seen = max([seen, *[dot[0] for dot in shown["dots"]]])
            yield b"data: " + json.dumps(shown, allow_nan=False).encode() + b"\n\n"
            if gauges.state not in ("loading", "ready", "short"):
                return
            await asyncio.sleep(EVERY_S)
    finally:
        metrics.viewers -= 1
