"""A server of texts from its start to its end: loading, draining, ports, keys, connections."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import urllib.request
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from serving import serving, stock, text_service  # noqa: E402

from neustream.server.config import ModelConfig, ServerConfig  # noqa: E402
from neustream.server.lifecycle import run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return stock()


def test_it_answers_while_it_loads_and_drains_what_is_open(model):
    go = threading.Event()

    def load(metrics):
        assert go.wait(60)
        return text_service(model, metrics)

    with serving(load) as (url, said, stop), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json()["state"] == "loading"
        waiting = client.get("/v1/models")
        assert waiting.status_code == 503 and int(waiting.headers["retry-after"]) >= 1
        assert client.post("/v1/completions", json=ASK).status_code == 503
        go.set()
        assert said.get(timeout=60) == "ready: tiny"
        lines = []

        def read():
            body = {**ASK, "max_tokens": 200, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
                lines.extend(line for line in stream.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        while not lines and reader.is_alive():
            time.sleep(0.005)
        assert stop() == 0
        reader.join(30)
        assert lines[-1] == "data: [DONE]" and len(lines) == 201


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load(metrics):
        from neustream import BackendError

        raise BackendError("model 'tiny': no weights")

    with serving(load) as (_, _, stop):
        assert "no weights" in str(stop())


def test_a_port_that_is_taken_is_told(model):
    from neustream import BackendError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServerConfig(models=[ModelConfig(name="a", kind="text", backend={})], http={"port": port})
        with pytest.raises(BackendError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            asyncio.run(run(config, partial(text_service, model)))


def test_keys(model):
    with serving(partial(text_service, model), keys=["secret", "other"]) as (url, said, _):
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/health").status_code == 200
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                answer = client.get("/v1/models", headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            for key in ("secret", "other"):
                assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_half_a_head_is_not_waited_for(model):
    with serving(partial(text_service, model), http={"head_timeout_s": 0.3}) as (url, said, _):
        said.get(timeout=60)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: local")
            connection.settimeout(20)
            assert connection.recv(1000) == b""
        assert urllib.request.urlopen(f"{url}/health", timeout=20).status == 200
