"""Clients of odd kinds: behind proxies, with forms made by hand, with secrets in prompts. Each has its answer."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from PIL import Image  # noqa: E402
from serving import serving, until  # noqa: E402
from toys import Flat  # noqa: E402

from neustream.backends.demo import IMAGE, TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.app import build_app  # noqa: E402
from neustream.server.backing import OfService  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402
from neustream.server.gateway import Gateway  # noqa: E402
from neustream.server.metrics import Metrics  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXTS, EDITS = "/v1/completions", "/v1/images/edits"
ASK = {"model": "chat", "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
BODY = json.dumps(ASK).encode()
KEPT = io.BytesIO()
Image.new("RGB", (8, 8)).save(KEPT, "PNG")
PNG = KEPT.getvalue()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    images = {"measure_s": 0.0, "cache": str(tmp_path_factory.mktemp("cache")), "max_batch": 2}
    edits = {**IMAGE, "pipeline": "StableDiffusionImg2ImgPipeline"}
    texts = {"backend": TEXT, "tokenizer": "bytes", "options": {"profile": Flat(), "slots": 4}}
    models = [
        {"name": "sd", "kind": "image", "backend": IMAGE, "options": images},
        {"name": "edit", "kind": "image", "backend": edits, "options": images},
        {"name": "chat", "kind": "text", **texts},
    ]
    config, loaded = ServerConfig.model_validate({"models": models}), []

    def loading(metrics):
        loaded.append(load(config, metrics))
        return loaded[0]

    with serving(loading) as (url, said, _):
        assert said.get(timeout=600) == "ready: sd, edit, chat"
        yield url, loaded[0].service


@pytest.fixture
def url(running):
    return running[0]


def asked(url, *lines, path=TEXTS, body=BODY, host="localhost", media="application/json"):
    """All that is answered to a request on a connection of its own; `lines`: more of its head."""
    if not any(line.startswith("transfer-encoding") for line in lines):
        lines = (*lines, f"content-length: {len(body)}")
    start = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-type: {media}", "connection: close", *lines, "", ""]
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall("\r\n".join(start).encode() + body)
        connection.settimeout(60)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


# -- who names its target, its host or its promise in another way ----------------------------------------


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("http://localhost/v1/completions", "localhost", 200),
        ("HTTP://LocalHost:80/v1/completions?a=b", "evil.example", 200),
        ("http://evil.example/v1/completions", "localhost", 403),
        ("http://localhost@evil.example/v1/completions", "localhost", 403),
        ("http://localhost", "localhost", 404),
        (TEXTS, "LOCALHOST:8000", 200),
        (TEXTS, "localhost.evil.example", 403),
    ],
)
def test_a_target_with_a_host_is_taken_and_that_host_counts(url, path, host, status):
    """As RFC 9112 has it (3.2.2): clients that are told of a proxy send it."""
    assert asked(url, path=path, host=host).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("host", [b"x/health?", b"x/ui#", b"[/ready", b"x\\health", b"user@/metrics?"])
@pytest.mark.parametrize("path", ["/v1/models", "/ui/events", "/metrics"])
def test_no_host_makes_a_route_need_no_key(host, path):
    """Who builds an address of a request and reads the path out of it would read this Host."""
    config = ServerConfig.model_validate(
        {"models": [{"name": "a", "kind": "text", "backend": {}}], "http": {"host": "0.0.0.0"}}
    )
    app, sent = build_app(Gateway(), config, Metrics(["a"]), ["secret"]), []
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80), "headers": [(b"host", host)]}

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["x-slo-ttft-ms: 5000", "x-slo-ttft-ms: 7000"], b"x-neustream-warning: x-slo-ttft-ms: not a number"),
        (["x-slo-e2e-ms: -0"], b"x-neustream-warning: x-slo-e2e-ms: not a number"),
        (["x-slo-e2e-ms: 5000ms"], b"x-neustream-warning: x-slo-e2e-ms: not a number"),
        (["grpc-timeout: 5 S"], b"x-neustream-warning: grpc-timeout: not a number"),
        (["x-slo-class: a", "x-slo-class: a"], b"x-neustream-warning: x-slo-class: no such class"),
        (
            ["grpc-timeout: 99999999H", "x-slo-ttft-ms: 86400000"],
            b"x-neustream-slo: ttft=8.64e+07;tpot=inf;e2e=3.6e+14",
        ),
        (
            ["x-neustream-session: a", "x-neustream-session: b", "x-neustream-session-e2e-ms: 50000"],
            b"x-neustream-warning: x-neustream-session: not 1 to 128 letters",
        ),
    ],
)
def test_promises_in_odd_headers_are_told_back_or_told_of(url, lines, told):
    found = asked(url, *lines)
    assert found.startswith(b"HTTP/1.1 200 ") and told in found


@pytest.mark.parametrize(
    "body",
    [
        b"%x;name=value\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"%x\r\n%b\r\n0\r\ncontent-length: 5\r\nhost: evil.example\r\nx-slo-e2e-ms: 0.01\r\n\r\n" % (len(BODY), BODY),
        b"".join([b"1\r\n%c\r\n" % byte for byte in BODY]) + b"0\r\n\r\n",
    ],
    ids=["extensions", "trailers that are no headers", "a byte a chunk"],
)
def test_chunks_of_all_kinds_make_a_body(url, body):
    found = asked(url, "transfer-encoding: chunked", body=body)
    assert found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1") == 1 and b"x-neustream-slo" not in found


@pytest.mark.parametrize("to", ["h2c", "websocket"])
def test_who_wants_another_protocol_is_answered_in_this_one_and_no_log_tells_of_it(url, to, caplog):
    found = asked(url, "connection: upgrade", f"upgrade: {to}", "sec-websocket-version: 13")
    assert found.startswith(b"HTTP/1.1 200 ") and not caplog.records


# -- who makes forms by hand ------------------------------------------------------------------------------


def field(name, value, *more):
    lines = [b"--x", b'Content-Disposition: form-data; name="%b"' % name, *more, b"", value, b""]
    return b"\r\n".join(lines)


FIELDS = field(b"prompt", b"a boat") + field(b"model", b"edit") + field(b"num_inference_steps", b"2")
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../a"\r\n\r\n' + PNG + b"\r\n"
END = b"--x--\r\n"


@pytest.mark.parametrize(
    ("body", "lines", "status"),
    [
        (FIELDS + FILE + END, [], 200),
        (FIELDS + FILE + END + END, [], 200),
        (FIELDS + FILE + END + b"more" * 99, [], 200),
        (field(b"prompt", b"\xff\xfe") + FIELDS + FILE + END, [], 200),
        (field(b"prompt", b"x", b"Content-Type: text/plain; charset=utf-77") + FIELDS + FILE + END, [], 200),
        (b"more\r\n" + FIELDS + FILE + END, [], 400),
        (FIELDS + FILE, [], 400),
        (FIELDS + FILE.replace(b"filename", b"x"), [], 400),
        (FIELDS + field(b"image", b"hello") + END, [], 400),
        (FIELDS + FILE + FILE + END, [], 400),
        (FIELDS + field(b"stream", b"True") + FILE + END, [], 400),
        (FIELDS + field(b"slo", b"[" * 50_000) + FILE + END, [], 400),
        (FIELDS + FILE.replace(b'form-data; name="image"', b"attachment") + END, [], 400),
        (FIELDS + FILE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1) + END, [], 200),
        (FIELDS + field(b"negative_prompt", b"x", b"a: b\r\n" * 9999) + FILE + END, [], 400),
        (FIELDS + FILE + END, ["content-encoding: gzip"], 415),
    ],
)
def test_forms_of_all_kinds(url, body, lines, status, caplog):
    found = asked(url, *lines, path=EDITS, body=body, media="multipart/form-data; boundary=x")
    assert found.startswith(f"HTTP/1.1 {status} ".encode()), found[:500]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# -- who has secrets, and who leaves ----------------------------------------------------------------------


class Kept(logging.Handler):
    """What a library has logged, as text."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


def test_what_is_logged_of_a_prompt_that_is_too_long_is_not_the_prompt(url):
    body, kept = {"model": "sd", "prompt": "secret " * 50, "num_inference_steps": 1}, Kept()
    log = logging.getLogger("diffusers")
    level = log.level
    log.addHandler(kept)
    log.setLevel(logging.WARNING)  # other tests of this process may have made it quiet
    try:
        assert httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).status_code == 200
    finally:
        log.removeHandler(kept)
        log.setLevel(level)
    assert any(line.endswith("truncated because CLIP can only handle sequences up to 77 tokens") for line in kept.lines)
    assert "secret" not in "".join(kept.lines)


def test_a_line_of_a_library_that_cannot_be_put_together_ends_no_call(running, monkeypatch):
    """As logging has it: an exception of a log would fail the request whose step it is of."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger("diffusers.pipelines").warning("made", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_in_the_middle_of_an_images_steps_leaves_nothing(running, stream):
    url, service = running
    body = {"model": "sd", "prompt": "a boat", "num_inference_steps": 200, "n": 3, "stream": stream}
    content, before = json.dumps(body).encode(), service.report.counts["cancelled"]
    lines = ["POST /v1/images/generations HTTP/1.1", "host: localhost", "content-type: application/json"]
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall("\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content)
        until(lambda: len(service.answers) == 3 and denoised(service))
    until(lambda: not service.answers)
    assert service.report.counts["cancelled"] == before + 3
    assert httpx.post(f"{url}{TEXTS}", json=ASK, timeout=60).status_code == 200


def denoised(service):
    """Whether an image has gone through some of its steps."""
    jobs = [job for member in OfService(service).jobs for job in dict(member).values()]
    return any(job.stage is not None and "denoise" in job.stage.name for job in jobs)
