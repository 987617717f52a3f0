"""Streams as bytes on a connection: whichever way parts are written, and whatever happens between them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import threading
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from serving import until  # noqa: E402
from starlette.middleware.cors import CORSMiddleware  # noqa: E402
from uvicorn.protocols.http.h11_impl import RequestResponseCycle  # noqa: E402

from neustream.errors import RequestFailed  # noqa: E402
from neustream.server.errors import HTTPError, of_request  # noqa: E402
from neustream.server.protocol import Protocol, Rules  # noqa: E402
from neustream.server.streams import EventStream, Outlet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = b"GET /%b HTTP/1.1\r\nhost: localhost\r\norigin: http://there\r\n\r\n"
BUFFER = 65_536
"""Bytes that the system is asked to keep for each side."""
LIMIT = 2_000_000
"""Bytes that all buffers on the way hold less than."""


class Streams:
    """An application whose answers are the events of a path. `made`: bytes of events that were made."""

    def __init__(self):
        self.given, self.outlets, self.failed, self.made, self.short = {}, {}, [], {}, {}

    async def __call__(self, scope, receive, send):
        path = scope["path"].strip("/")
        events, outlet = self._events(path), Outlet()
        self.outlets[path] = outlet
        stream = EventStream(b"", events, {}, outlet=outlet, failed=self.failed.append)
        await stream(scope, receive, send)

    async def _events(self, path):
        for part in self.given[path]:
            if isinstance(part, Exception):
                raise part
            self.made[path] = self.made.get(path, 0) + len(part)
            yield part
            await asyncio.sleep(0)


@pytest.fixture
def streams():
    return Streams()


@pytest.fixture
def port(streams):
    rules = Rules(head_timeout_s=60, write_timeout_s=60, most=100, refused=lambda status, code: None)
    app = CORSMiddleware(streams, allow_origins=["http://there"])
    config = uvicorn.Config(app, http=partial(Protocol, rules), log_config=None, lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def asking(port, asked):
    with socket.socket() as connection:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.connect(("127.0.0.1", port))
        connection.sendall(asked)
        with connection.makefile("rb") as file:
            yield connection, file


def head_of(file):
    lines = []
    while (line := file.readline()) not in (b"\r\n", b""):
        lines.append(line.lower().strip())
    return lines


def chunked(file):
    """A body in chunks; None behind it if it was cut."""
    parts = []
    while line := file.readline():
        size = int(line, 16)
        part = file.read(size)
        assert file.read(2) == b"\r\n"
        if not size:
            return b"".join(parts)
        parts.append(part)
    return b"".join(parts), None


PARTS = {
    "one": [b"data: 1\n\n"],
    "none": [],
    "with parts without bytes": [b"", b"data: 1\n\n", b"", b"", b"data: 2\n\n", b""],
    "only parts without bytes": [b"", b""],
    "that look like chunks": [b"0\r\n\r\n", b"\r\n", b"5\r\nhello\r\n"],
    "of all sizes": [random.Random(0).randbytes(size) for size in (1, 15, 16, 17, 255, 4096, 65_536, 300_000, 1)],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_stream_arrives_as_it_was_made_and_its_connection_goes_on(streams, port, name):
    streams.given = {"a": PARTS[name], "b": [b"data: next\n\n"]}
    with asking(port, ASK % b"a" + ASK % b"b") as (connection, file):
        assert head_of(file)[0] == b"http/1.1 200 ok"
        assert chunked(file) == b"".join(PARTS[name])
        head_of(file)
        assert chunked(file) == b"data: next\n\n"
        connection.sendall(ASK % b"a")
        head_of(file)
        assert chunked(file) == b"".join(PARTS[name])


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_only_a_client_that_reads_chunks_gets_some(streams, port, method, version):
    """A head alone is an answer of its own: what follows on its connection is the next one."""
    streams.given = {"a": [b"data: 1\n\n", b"data: 2\n\n"], "b": [b"data: next\n\n"]}
    whole = b"".join(streams.given["a"])
    ask = (ASK % b"a").replace(b"GET", method).replace(b"1.1", version)
    with asking(port, ask + ASK % b"b") as (_, file):
        lines = head_of(file)
        assert (b"transfer-encoding: chunked" in lines) == (version == b"1.1")
        if version == b"1.0":
            assert file.read() == (b"" if method == b"HEAD" else whole)
            return
        if method == b"GET":
            assert chunked(file) == whole
        assert head_of(file)[0] == b"http/1.1 200 ok"
        assert chunked(file) == b"data: next\n\n"
    assert ("a" in streams.made) == (method == b"GET")


def test_a_stream_that_fails_is_cut_behind_what_came_and_why(streams, port):
    why = HTTPError(503, "no more", "closed")
    streams.given = {"a": [b"data: 1\n\n", why, b"data: 2\n\n"]}
    with asking(port, ASK % b"a") as (_, file):
        head_of(file)
        assert chunked(file) == (b"data: 1\n\n" + why.event, None)
    assert streams.failed == [why]


def caused(error, cause):
    error.__cause__ = cause
    return error


FAULTS = {
    "ours": (lambda: KeyError("key"), True),
    "ours, of values": (lambda: ValueError("value"), True),
    "ours, as clients are told it": (lambda: caused(of_request(KeyError("key")), KeyError("key")), True),
    "the client's": (lambda: caused(of_request(TypeError("no")), TypeError("no")), False),
    "a stage's": (lambda: RequestFailed("request 'a': no", reason="no"), False),
    "a stage's, as clients are told it": (lambda: caused(of_request(RequestFailed("no")), RequestFailed("no")), False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_stream_came_to_by_a_fault_of_ours_is_logged_with_its_frames(streams, port, name, caplog):
    make, logged = FAULTS[name]
    streams.given = {"a": [b"data: 1\n\n", make()]}
    with asking(port, ASK % b"a") as (_, file):
        head_of(file)
        chunked(file)
    shown = [record for record in caplog.records if record.exc_info and record.name == "neustream.server"]
    assert len(shown) == logged
    assert not logged or type(shown[0].exc_info[1]) in (KeyError, ValueError)


def test_a_client_that_does_not_read_holds_up_its_own_stream_and_gets_all_of_it_later(streams, port):
    part = bytes(1000)
    streams.given = {"a": [part] * (2 * LIMIT // len(part)), "b": [b"data: 1\n\n"]}
    with asking(port, ASK % b"a") as (_, slow):
        until(lambda: "a" in streams.outlets and streams.outlets["a"].blocked)
        with asking(port, ASK % b"b") as (_, file):
            head_of(file)
            assert chunked(file) == b"data: 1\n\n"
        until(lambda: streams.outlets["a"].blocked)
        assert streams.made["a"] < LIMIT
        head_of(slow)
        assert chunked(slow) == part * len(streams.given["a"])


def test_what_is_asked_outside_of_streams_leaves_no_ring(streams, port):
    """A way to a connection that is in the state of its request must not keep it."""
    ask = (
        (ASK % b"a").replace(b"GET", b"OPTIONS").replace(b"\r\n\r\n", b"\r\naccess-control-request-method: GET\r\n\r\n")
    )
    gc.collect()
    gc.disable()
    try:
        with asking(port, b"") as (connection, file):
            for _ in range(20):
                connection.sendall(ask)
                assert head_of(file)[0] == b"http/1.1 200 ok"
                assert file.read(2) == b"OK"
            assert sum(type(one) is RequestResponseCycle for one in gc.get_objects()) < 5
    finally:
        gc.enable()
