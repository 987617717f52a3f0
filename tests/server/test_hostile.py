"""Clients that reset, half-close, pour in, or come by the thousand: each has an answer, and nothing of it stays."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import socket
import struct

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service, until  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PATH = "/v1/completions"
ASK = {"model": "tiny", "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
LONG = {**ASK, "max_tokens": 240}
JSON = {"content-type": "application/json"}
MOST = 600
"""Requests that may be open; twice as many connections."""


@pytest.fixture(scope="module")
def running():
    loaded, model = [], stock()

    def load(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with serving(load, limits={"max_open": MOST}) as (url, said, _):
        said.get(timeout=60)
        yield url, loaded[0].service


@pytest.fixture
def url(running):
    return running[0]


def address(url):
    return "127.0.0.1", int(url.rpartition(":")[2])


def head(*more, path=PATH, method="POST", media="application/json"):
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-type: {media}", *more, "", ""]
    return "\r\n".join(lines).encode()


def whole(body):
    content = json.dumps(body).encode()
    return head(f"content-length: {len(content)}") + content


def heard(connection, seconds=60):
    """All that comes until the connection ends."""
    connection.settimeout(seconds)
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def gauge(client, name):
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"neustream:{name} "))


# -- who resets -----------------------------------------------------------------------------------------


STATES = {
    "connected": (b"", 0),
    "half a head": (b"POST /v1/comp", 0),
    "a head without its body": (head("content-length: 50"), 0),
    "half a body": (head("content-length: 50") + b'{"prompt": ', 0),
    "half a chunk": (head("transfer-encoding: chunked") + b'20\r\n{"prompt"', 0),
    "asked whether to go on": (head("content-length: 50", "expect: 100-continue"), 12),
    "waiting for all of it": (whole(LONG), 0),
    "in a stream": (whole({**LONG, "stream": True}), 20),
    "answered": (whole(ASK), 20),
    "answered, and asking again": (whole(ASK) + whole(LONG), 20),
}


@pytest.mark.parametrize("state", STATES)
def test_who_resets_leaves_nothing(running, client, state):
    url, service = running
    sent, read = STATES[state]
    assert client.get("/health").status_code == 200
    before = {name: gauge(client, name) for name in ("http_connections", "event_loop_tasks", "http_streams")}
    for _ in range(4):
        with socket.create_connection(address(url)) as connection:
            connection.settimeout(60)
            connection.sendall(sent)
            while read and len(connection.recv(read, socket.MSG_PEEK)) < min(read, 12):
                pass
            # no time to linger: what is left is thrown away, and the other side hears of a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert settled(service)
    for name, there in before.items():
        until(lambda name=name, there=there: gauge(client, name) <= there)
    assert client.post(PATH, json=ASK).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_says_that_no_more_comes_is_gone(running, stream):
    """As for most servers: a half-closed connection is one of a client that has left."""
    url, service = running
    before = service.report.counts["cancelled"]
    with socket.create_connection(address(url)) as connection:
        connection.sendall(whole({**LONG, "stream": stream}))
        until(lambda: service.answers or service.report.counts["cancelled"] > before)
        connection.shutdown(socket.SHUT_WR)
        found = heard(connection)
    assert b"[DONE]" not in found and b'"usage"' not in found
    until(lambda: service.report.counts["cancelled"] > before)
    assert settled(service)


# -- who comes by the thousand ----------------------------------------------------------------------------


def test_a_thousand_connections_are_each_answered(url, client):
    """All at once: as many as there is room for are served, and the others are told when to come again."""

    async def one(begun, go):
        reader, writer = await asyncio.open_connection(*address(url))
        begun.release()
        await go.wait()
        writer.write(whole(ASK))
        found = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return found

    async def all_of_them():
        begun, go = asyncio.Semaphore(0), asyncio.Event()
        tasks = [asyncio.ensure_future(one(begun, go)) for _ in range(1000)]
        for _ in tasks:
            await begun.acquire()
        there = await asyncio.to_thread(client.get, "/health")
        go.set()
        return there, await asyncio.wait_for(asyncio.gather(*tasks), 300)

    there, found = asyncio.run(all_of_them())
    statuses = [lines[0][9:12] for lines in found]
    assert there.status_code == 200
    assert set(statuses) <= {b"200", b"429"} and b"200" in statuses
    for lines in found:
        assert lines[0][9:12] == b"200" or any(line.startswith(b"retry-after: ") for line in lines)
    until(lambda: gauge(client, "http_connections") <= 2)


# -- who reads streams by other rules ------------------------------------------------------------------------


def streamed(**more):
    return {**ASK, "max_tokens": 9, "temperature": 0, "stream": True, **more}


def test_a_stream_for_a_client_of_http_1_0_has_no_chunks(url, client):
    content = json.dumps(streamed()).encode()
    start = head(f"content-length: {len(content)}").replace(b"HTTP/1.1", b"HTTP/1.0")
    with socket.create_connection(address(url)) as connection:
        connection.sendall(start + content)
        found, _, body = heard(connection).partition(b"\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200 ") and b"chunked" not in found.lower()
    assert texts(body) == texts(client.post(PATH, json=streamed()).content)
    assert body.startswith(b"data: {") and body.endswith(b"\n\ndata: [DONE]\n\n")


def test_streams_that_are_asked_for_at_once_come_one_after_the_other(url, client):
    asks = [streamed(), streamed(max_tokens=5), streamed()]
    content = [json.dumps(ask).encode() for ask in asks]
    heads = [head(f"content-length: {len(one)}") for one in content]
    heads[-1] = head(f"content-length: {len(content[-1])}", "connection: close")
    with socket.create_connection(address(url)) as connection:
        connection.sendall(b"".join(one + body for one, body in zip(heads, content, strict=True)))
        found = [unchunked(part) for part in heard(connection).split(b"HTTP/1.1 200 ")[1:]]
    assert found == [client.post(PATH, json=ask).content.count(b"data: {") for ask in asks]


def unchunked(answer):
    """How many tokens a chunked answer has; all its chunks are as long as they say."""
    _, _, left = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, left = left.partition(b"\r\n")
        length = int(size, 16)
        assert left[length : length + 2] == b"\r\n"
        body, left = body + left[:length], left[length + 2 :]
        if not length:
            assert not left and body.endswith(b"data: [DONE]\n\n")
            return body.count(b"data: {")


def texts(body):
    events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(event)["choices"][0]["text"] for event in events]


# -- who pours in -----------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_before_it_comes(url):
    """Nobody is asked to send it, and what comes all the same is not kept."""
    with socket.create_connection(address(url)) as connection:
        connection.sendall(head(f"content-length: {10**12}", "expect: 100-continue"))
        found = b""
        connection.settimeout(60)
        while b"\r\n\r\n" not in found:
            found += connection.recv(4096)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_that_grows_too_large_is_cut_short(url):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(address(url)) as connection:
        connection.sendall(head("transfer-encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                connection.sendall(chunk)
        found = heard(connection) if connection.fileno() >= 0 else b""
    assert found[:12] in (b"", b"HTTP/1.1 413")  # a reset may overtake the answer
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        ["content-length: -5"],
        ["content-length: five"],
        ["content-length: 5", "content-length: 6"],
        ["content-length: 5", "transfer-encoding: chunked"],
        ["transfer-encoding: gzip"],
    ],
)
def test_a_length_that_may_be_read_in_two_ways_is_400(url, lines):
    """Or the proxy before it may take another part of the bytes for the body."""
    with socket.create_connection(address(url)) as connection:
        connection.sendall(head(*lines) + b"5\r\nhello\r\n0\r\n\r\n")
        found = heard(connection)
    assert found[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 501"), found
    assert found.count(b"HTTP/1.1") == 1


# -- who sends what is no request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"prompt": "x"} {"prompt": "x"}',
        b'{"prompt": "x" /* more */}',
        codecs.BOM_UTF8 + b'{"prompt": "x"}',
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\x41"}',
        b'{"prompt": "a\nb"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": 1e999}',
        b'{"prompt": "x", "num_tokens": Infinity, "model": NaN}',
        b'{"prompt": "x", "more": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b"\x00" * 100,
    ],
    ids=lambda body: ascii(body[:40]),
)
def test_what_is_no_json_is_400(client, body):
    for path in (PATH, "/v1/chat/completions", "/tokenize", "/inference"):
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] in ("invalid", "invalid_json") and len(answer.content) < 4000


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br, gzip"},
    ],
    ids=str,
)
def test_other_media_are_415(client, headers):
    answer = client.post(PATH, content=json.dumps(ASK), headers=headers)
    assert answer.status_code == 415 and "content-" in answer.json()["error"]["message"]


@pytest.mark.parametrize("media", ["application/json; charset=utf-8", "Application/JSON", "application/json;"])
def test_json_by_its_other_names_is_taken(client, media):
    assert client.post(PATH, content=json.dumps(ASK), headers={"content-type": media}).status_code == 200


@pytest.mark.parametrize(
    "path", [f"{PATH}/", f"/{PATH}", "/v1/Completions", "/v1/%63ompletions/x", "/%F0%9F%98%80", "/%ff"]
)
def test_another_path_is_404_and_nobody_is_sent_elsewhere(client, path):
    answer = client.post(path, json=ASK)
    assert answer.status_code == 404 and "location" not in answer.headers
    assert answer.json()["error"]["code"] == "not_found"


# -- who writes in all of Unicode ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\x7f",
        "\u2028\u2029",
        "a\u0301\u0300",
        "\u202eabc\u202c",
        "\ufeffx",
        "\U0001f469\u200d\U0001f680",
        "日本語",
        "\ufffd",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_comes_back_as_it_was(client, text, stream):
    body = {**ASK, "prompt": text, "echo": True, "stream": stream, "stop": [text * 2]}
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        assert answer.json()["choices"][0]["text"].startswith(text)
        return
    lines = [line for line in answer.content.decode().split("\n") if line]  # events end at LF alone
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    parts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(parts).startswith(text) and len(parts) == 2


@pytest.mark.parametrize("name", ["x-slo-class", "x-slo-ttft-ms", "x-request-id", "x-neustream-session", "traceparent"])
def test_a_header_of_any_bytes_is_no_fault_of_ours(url, name):
    content = json.dumps(ASK).encode()
    lines = [f"POST {PATH} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close"]
    start = "\r\n".join([*lines, f"content-length: {len(content)}", f"{name}: "]).encode()
    with socket.create_connection(address(url)) as connection:
        connection.sendall(start + "é日\u202e".encode() + b"\xff\r\n\r\n" + content)
        found = heard(connection)
    assert found.startswith(b"HTTP/1.1 200 ")
    assert found.partition(b"\r\n\r\n")[0].isascii()
