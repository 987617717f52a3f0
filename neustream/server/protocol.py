"""HTTP/1.1 on a connection: heads and reads in time, and an answer to what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from neustream.errors import BackendError
from neustream.server.config import HttpConfig
from neustream.server.errors import HTTPError, forget_frames
from neustream.server.wire import CHUNKS, SLOW

LARGEST_HEAD = 65_536
OURS = (
    "ASGI callable returned without completing response",
    "Invalid HTTP request received.",
    "Unsupported upgrade request.",
    "No supported WebSocket library detected.",
)
"""What uvicorn says of streams that we cut on purpose, and of what we answer and count ourselves: any client may have
it said as often as it likes."""
BACKLOG = 2048


class NotOurs(logging.Filter):
    """Leaves out what uvicorn says of what is ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in OURS)


@dataclass(frozen=True)
class Rules:
    """What connections are held to.

    Args:
        head_timeout_s: a head has to come within it; write_timeout_s: what is written has to be read.
        most: connections at once; more are closed.
        refused: told of the status and the code of an answer to what is no HTTP.
    """

    head_timeout_s: float
    write_timeout_s: float
    most: int
    refused: Callable[[int, str], None]


class Protocol(H11Protocol):
    """HTTP/1.1 by `rules`."""

    def __init__(self, rules: Rules, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rules = rules
        self._blocked: asyncio.TimerHandle | None = None
        self._over = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self._rules.most:
            transport.close()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        known = self.cycle
        super().data_received(data)
        if self.cycle is not None and self.cycle is not known and _chunks(self.cycle.scope):
            # the cycle knows its scope: a ring, had the scope a reference to it
            self.cycle.scope.setdefault("state", {})[CHUNKS] = partial(_chunk, weakref.ref(self.cycle))
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._head is None:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too large a head; one that is answered already is cut."""
        error = sys.exc_info()[1]
        wrong = HTTPError(400, f"no HTTP: {error}", "invalid")
        if getattr(error, "error_status_hint", 0) == 431:
            wrong = HTTPError(431, f"the head is larger than {LARGEST_HEAD} bytes", "too_large")
        if error is not None:
            forget_frames(error)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # what it would answer is not sent any more
            cycle.message_event.set()
        self._rules.refused(wrong.status, wrong.code or "")
        self._answer(wrong)
        self._linger()

    def _linger(self) -> None:
        """Read on for a while: a client that still sends would not hear what it was answered."""
        self._over = True
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self._stop()
        self._wait()

    def _answer(self, wrong: HTTPError) -> None:
        body = json.dumps(wrong.body).encode()
        lines = [
            f"HTTP/1.1 {wrong.status} {HTTPStatus(wrong.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {uuid.uuid4().hex}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked = self.loop.call_later(self._rules.write_timeout_s, self._unread)

    def resume_writing(self) -> None:
        self._go_on()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._go_on()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._head = self.loop.call_later(self._rules.head_timeout_s, self._late)

    def _stop(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _go_on(self) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

    def _unread(self) -> None:
        """The client takes nothing: what it has asked for ends, and so does the connection."""
        if self.scope is not None:
            self.scope.setdefault("state", {})[SLOW] = True
        self.transport.abort()

    def _late(self) -> None:
        """Half a head, or none: nobody is served by this connection."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _chunks(scope: Mapping[str, Any]) -> bool:
    """Whether a body of no length that is told goes to the client of a request in chunks."""
    return (scope["http_version"], scope["method"] == "HEAD") == ("1.1", False)


def _chunk(known: weakref.ref[RequestResponseCycle], body: bytes) -> bool:
    """Write a part of a body that has begun, of no length that was told; False if h11 has to, or the client is to be
    waited for. One without bytes is none: in chunks it would be the end."""
    cycle = known()
    if cycle is None or not body or cycle.disconnected or cycle.flow.write_paused:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


def listening(http: HttpConfig) -> socket.socket:
    """A socket there; BackendError if there can be none.

    Its connections send at once what they are given, and so they inherit it: asyncio asks for that
    only where a socket names its protocol. Else a token waits for the client to acknowledge the one
    before, 40 ms where that is in no hurry.
    """
    if http.uds is not None:
        return _of_this_machine(http.uds)
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        sock = socket.create_server((http.host, http.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BackendError(f"cannot listen on {http.host}:{http.port}: {error.strerror or error}") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _of_this_machine(path: Path) -> socket.socket:
    """A Unix socket for its owner and group; what a server that is gone has left there is replaced."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            if _answers(path):
                raise BackendError(f"cannot listen on {path}: somebody does already")
            path.unlink()
        sock.bind(str(path))
        os.chmod(path, 0o660)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise BackendError(f"cannot listen on {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def address_of(http: HttpConfig, sock: socket.socket) -> str:
    """Where clients find it."""
    if http.uds is not None:
        return f"unix:{http.uds}"
    host = f"[{http.host}]" if ":" in http.host else http.host
    return f"http://{host}:{sock.getsockname()[1]}"
