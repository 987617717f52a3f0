"""What /metrics tells of a real server: requests over HTTP, beside the engine's own log."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service  # noqa: E402
from test_metrics import Told  # noqa: E402

from neustream import EventLog  # noqa: E402
from neustream.server.metrics import RENDER_S  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def running():
    pytest.importorskip("torch", reason="needs the extra 'llm'")
    log, model = EventLog(), stock()
    loaded = []

    def load(metrics):
        loaded.append(text_service(model, metrics, observers=[metrics, log]))
        return loaded[0]

    with serving(load) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        yield url, loaded[0].service, log


def cut(url, body, read=0):
    """Ask, read so many events, and go away."""
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(data)}", "", ""])
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + data)
        seen = b""
        while seen.count(b"data: ") < read:
            seen += connection.recv(65_536)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_what_http_counts_adds_up_with_the_event_log(running):
    url, service, log = running
    with httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post("/v1/completions", json={**ASK, "max_tokens": 60}).json()["choices"][0]["text"]
        stop = next(whole[at : at + 2] for at in range(4, len(whole)) if whole.find(whole[at : at + 2]) == at)
        codes = [
            client.post("/v1/completions", json=body, headers=headers).status_code
            for body, headers in [
                ({**ASK, "n": 3, "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}}, {}),
                ({**ASK, "stream": True, "odd": 1, "stranger": 2}, {"x-slo-ttft-ms": "junk"}),
                ({**ASK, "max_tokens": 200, "stop": [stop]}, {}),
                ({**ASK, "max_tokens": 0}, {}),
                ({**ASK, "model": "tony"}, {}),
                ({**ASK, "prompt": [999]}, {}),
                ({**ASK, "slo": {"e2e_ms": 0.001}}, {}),
            ]
        ]
        assert codes == [200, 200, 200, 400, 404, 400, 400]
        cut(url, {**ASK, "max_tokens": 240, "stream": True}, read=2)
        assert until(lambda: not service.snapshot().open)
        assert until(lambda: Told(client.get("/metrics").text)("disconnects_total", when="streaming") == 1)
        assert settled(service)
        time.sleep(RENDER_S)
        page = client.get("/metrics").text
    told = Told(page)
    assert told("refused_total", reason="invalid") == told("requests_total", outcome="refused") == 3
    engine = {name: told("requests_total", outcome=name) for name in ("on_time", "late", "dropped", "cancelled")}
    assert sum(engine.values()) == len(log.requests) == service.report.submitted
    assert engine["dropped"] == service.report.counts["dropped"] == told("dropped_total", code="unattainable") == 1
    # a text that a stop string ended is whole for its client; for the engine it was cancelled
    assert engine["cancelled"] == service.report.counts["cancelled"] - 1
    assert told("request_success_total", finished_reason="stop", model="tiny") == 1
    outputs = sum(len(request.get("outputs", [])) for request in log.requests.values())
    assert told("generation_tokens_total", model="tiny") == outputs
    begun = sum("outputs" in request for request in log.requests.values())
    assert told("prompt_tokens_total") == begun * len("Once upon")
    assert told("slo_attained_total") == 3 and told("slo_missed_total", what="dropped") == 1
    assert told("unknown_fields_total") == 2 and told("slo_header_invalid_total") == 1
    assert told("request_params_n_count") == 7 and told("request_params_n_sum") == 9
    assert told("http_requests_total", route="/v1/completions", code="400") == 3
    assert told("http_streams") == 0 and told("http_connections") >= 1 and told("kv_slots_used") == 0
    assert told("build_info", backend="text", policy="Priced") == 1 == told("ready")
    assert told("http_request_body_bytes_count") == 9 and told("step_batch_size_count") == len(log.steps)


def test_refusals_for_want_of_a_key_or_while_it_loads_are_counted():
    pytest.importorskip("torch", reason="needs the extra 'llm'")
    go, model = threading.Event(), stock()

    def load(metrics):
        assert go.wait(60)
        return text_service(model, metrics)

    with serving(load, keys=["secret"]) as (url, said, _), httpx.Client(base_url=url, timeout=60) as client:
        key = {"authorization": "Bearer secret"}
        assert client.post("/v1/completions", json=ASK, headers=key).status_code == 503
        assert client.post("/v1/completions", json=ASK).status_code == 401
        told = Told(client.get("/metrics", headers=key).text)
        assert told("refused_total", reason="loading") == told("refused_total", reason="auth") == 1
        assert told("ready") == 0
        go.set()
        assert said.get(timeout=60) == "ready: tiny"
