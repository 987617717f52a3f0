"""HTTP/1.1 connections of a load generator: bytes are stamped as they come off the socket.

httptools (the extra `bench`) parses; a client that hands each piece to a task of its own takes two
to three times the processor's time for each event, and stamps it later.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from neustream.bench.hearing import Hearing
from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, ConfigError, shown

try:
    import httptools
except ImportError:
    raise BackendError("load over HTTP needs httptools: pip install 'neustream[bench]'") from None

IDLE_S = 1.0
"""A connection that was idle for longer is not used again: servers close theirs after seconds."""
Hear = Callable[[int, str, Mapping[str, str]], Hearing]
"""From status, reason and headers (names in lower case) to who hears the body."""
Address = tuple[Any, ...]
PATH, NAME = re.compile(r"/[!-~]*"), re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
VALUE = re.compile(r"(?![ \t])[\t -~\x80-\xff]*(?<![ \t])")
"""What a request's path, and the name and value of a header, may be."""


class Unanswered(ConnectionError):
    """A connection ended before there was a status."""


class Exchange:
    """One request on a connection. `over` is set when its answer is, or gets an Unanswered."""

    def __init__(self, hear: Hear, origin: float) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._origin = origin
        self._hearing: Hearing | None = None

    def head(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        self._hearing = self._hear(status, reason, headers)

    def body(self, at: float, piece: bytes) -> None:
        if self._hearing is not None:
            self._hearing.feed(at - self._origin, piece)

    def end(self, at: float, *, whole: bool) -> None:
        """The answer is over; cut, if it is not whole."""
        if self.over.done():
            return
        if self._hearing is None:
            self.over.set_exception(Unanswered("the connection ended without an answer"))
            return
        self._hearing.end(at - self._origin, whole=whole)
        self.over.set_result(None)


class Connection(asyncio.Protocol):
    """A connection, which one request at a time uses.

    `free` is called when another may, `gone` when it is closed.
    """

    def __init__(
        self, free: Callable[[Connection], None], gone: Callable[[Connection], None]
    ) -> None:
        self._free = free
        self._gone = gone
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._at = 0.0
        self._idle_since = 0.0
        self.on_message_begin()

    @property
    def usable(self) -> bool:
        """Whether another request may go over it."""
        gone = self._transport is None or self._transport.is_closing()
        return not gone and stopwatch() - self._idle_since < IDLE_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def begin(self, data: bytes, exchange: Exchange) -> None:
        """Send a request."""
        assert self._transport is not None and self._exchange is None
        self._exchange = exchange
        self._headed = False
        self._transport.write(data)

    def abort(self) -> None:
        """Go away at once."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._at = stopwatch()
        if self._exchange is None:  # nobody asked
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # a fault of ours
            self._exchange.over.set_exception(error.__context__ or error)
            self.abort()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._lost(whole=False)

    def eof_received(self) -> None:
        self._at = stopwatch()
        self._lost(whole=self._headed and self._until_close)

    def connection_lost(self, error: Exception | None) -> None:
        self._at = stopwatch()
        self._lost(whole=False)
        self._gone(self)

    def _lost(self, *, whole: bool) -> None:
        """The connection is over; that is also the end of an answer that has no other."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.end(self._at, whole=whole)
        self.abort()

    # -- what the parser calls --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._reason = b""
        self._headed = False
        self._until_close = False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._exchange is None:  # 100 Continue: the answer is still to come
            return
        chunked = "chunked" in self._headers.get("transfer-encoding", "").lower()
        self._until_close = not chunked and "content-length" not in self._headers
        self._headed = True
        self._exchange.head(status, self._reason.decode("latin-1"), self._headers)

    def on_body(self, piece: bytes) -> None:
        if self._exchange is not None:
            self._exchange.body(self._at, piece)

    def on_message_complete(self) -> None:
        if not self._headed or self._exchange is None:
            return
        exchange, self._exchange = self._exchange, None
        exchange.end(self._at, whole=True)
        assert self._transport is not None
        if self._parser.should_keep_alive():
            self._idle_since = self._at
            self._free(self)
        else:
            self._transport.close()


class Connections:
    """Connections to one server: as many as there are requests under way.

    Args:
        url: "http://host:port" or https, a path before all others allowed.
        verify_tls: False takes any certificate.

    Raises:
        ConfigError: it is no such URL.
    """

    def __init__(self, url: str, *, verify_tls: bool = True) -> None:
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise ConfigError(f"url {shown(url)}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.username:
            raise ConfigError(f"url {shown(url)}: expected http://HOST:PORT or https://HOST:PORT")
        self._host = host
        self._tls = _tls(verify_tls) if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._authority = parts.netloc
        self._addresses: list[Address] = []
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._last_key: tuple[Any, ...] = ()
        self._last_head = b""

    async def ask(
        self, path: str, headers: Mapping[str, str], body: bytes, hear: Hear, origin: float
    ) -> None:
        """Post a body, and wait until the answer is over.

        A server may close a connection that is idle, at the moment at which it is used again: who
        got no answer on such a one is sent on a new one. Stamps count from the instant `origin`.

        Raises:
            OSError: nobody takes the connection, or it ended before there was a status.
        """
        data = self._head(path, headers, len(body)) + body
        found = self._rested()
        if found is not None:
            try:
                await self._exchange(found, data, Exchange(hear, origin))
                return
            except Unanswered:
                pass
        await self._exchange(await self._connected(), data, Exchange(hear, origin))

    async def _exchange(self, connection: Connection, data: bytes, exchange: Exchange) -> None:
        try:
            connection.begin(data, exchange)
            await exchange.over
        except BaseException:
            connection.abort()
            raise

    def _head(self, path: str, headers: Mapping[str, str], length: int) -> bytes:
        key = (path, *headers.items())
        if key != self._last_key:  # most requests differ in their length alone
            self._last_key, self._last_head = key, self._checked_head(path, headers)
        return b"%scontent-length: %d\r\n\r\n" % (self._last_head, length)

    def _checked_head(self, path: str, headers: Mapping[str, str]) -> bytes:
        given = {"host": self._authority, "accept-encoding": "identity", **headers}
        if not PATH.fullmatch(path):
            raise ConfigError(
                f"path {shown(path)}: expected one that begins with /, without spaces"
            )
        lines = [f"POST {self._prefix}{path} HTTP/1.1"]
        for name, value in given.items():
            if not NAME.fullmatch(name) or not VALUE.fullmatch(value):
                raise ConfigError(f"header {shown(name)}: {shown(value)} is none of HTTP")
            lines.append(f"{name}: {value}")
        return "\r\n".join([*lines, ""]).encode("latin-1")

    def _rested(self) -> Connection | None:
        """An idle connection that may be used again."""
        while self._idle:
            found = self._idle.pop()
            if found.usable:
                return found
            found.abort()
        return None

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        if not self._addresses:
            kind = socket.SOCK_STREAM
            found_addresses = await loop.getaddrinfo(self._host, self._port, type=kind)
            self._addresses = [each[4] for each in found_addresses]
        fault: OSError | None = None
        for address in list(self._addresses):
            try:
                connection = await self._open(loop, address)
            except OSError as error:
                fault = error
                continue
            if address is not self._addresses[0]:  # as of a name for both IPv6 and IPv4
                with contextlib.suppress(ValueError):
                    self._addresses.remove(address)
                self._addresses.insert(0, address)
            return connection
        raise fault or ConnectionError(f"{self._host} has no address")

    async def _open(self, loop: asyncio.AbstractEventLoop, address: Address) -> Connection:
        _, connection = await loop.create_connection(
            lambda: Connection(self._idle.append, self._all.discard),
            address[0],
            address[1],
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        self._all.add(connection)
        return connection

    async def close(self) -> None:
        """Close all of them."""
        for connection in self._all:
            connection.abort()
        while self._all:  # the loop closes their sockets in its next turns
            await asyncio.sleep(0)


def _tls(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
