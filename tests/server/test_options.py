"""What the operator may choose: keys, sockets, origins, how streams begin, how long anybody waits."""

from __future__ import annotations

import json
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service  # noqa: E402

from neustream import FCFS, SLO, BackendError, Decision  # noqa: E402
from neustream.server.config import HttpConfig  # noqa: E402
from neustream.server.errors import HTTPError  # noqa: E402
from neustream.server.gateway import Gateway  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402
from neustream.server.protocol import listening  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
PAGE = {"origin": "https://page.example"}


@pytest.fixture(scope="module")
def model():
    return stock()


class Gate:
    """FCFS, but only for jobs with fewer outputs than `most`; None: for all."""

    def __init__(self, most=0):
        self.most = most
        self._rule = FCFS(drop_hopeless=False)

    def decide(self, view):
        if self.most is None or any(job.outputs < self.most for job in view.jobs):
            return replace(self._rule.decide(view), until=-math.inf)  # this one is asked each time
        return Decision([], wake_at=view.now + 0.005)


class Refuse:
    """Gives up everybody who is promised something."""

    def decide(self, view):
        drop = {job: "no room today" for job in view.jobs if job.promised}
        return Decision([job for job in view.jobs if job not in drop][:1], drop=drop)


# -- who may come -------------------------------------------------------------------------------------


def test_keys_and_what_needs_none(model):
    http = {"open_metrics": True}
    with serving(partial(text_service, model), keys=("one", "two"), http=http) as (url, said, _):
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            for key in ("one", "two"):
                headers = {"authorization": f"Bearer {key}"}
                assert client.post("/v1/completions", json=ASK, headers=headers).status_code == 200
            for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                refused = client.post("/v1/completions", json=ASK, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
            assert [client.get(path).status_code for path in ("/stats", "/version", "/v1/models")] == [401] * 3


def test_pages_of_named_origins_may_ask(model):
    http = {"cors_origins": [PAGE["origin"]]}
    with serving(partial(text_service, model), keys=("one",), http=http) as (url, said, _):
        said.get(timeout=60)
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-slo-ttft-ms",
        }
        with httpx.Client(base_url=url, timeout=60) as client:
            allowed = client.options("/v1/completions", headers={**PAGE, **asks})
            assert allowed.status_code == 200 and "x-slo-ttft-ms" in allowed.headers["access-control-allow-headers"]
            other = client.options("/v1/completions", headers={"origin": "https://other.example", **asks})
            assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
            keyed = {**PAGE, "authorization": "Bearer one"}
            done = client.post("/v1/completions", json=ASK, headers=keyed)
            assert done.headers["access-control-allow-origin"] == PAGE["origin"]
            assert "x-neustream-outcome" in done.headers["access-control-expose-headers"]
            refused = client.post("/v1/completions", json=ASK, headers=PAGE)  # a page may read why
            assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_no_page_may_ask_by_default(model):
    with serving(partial(text_service, model)) as (url, said, _):
        said.get(timeout=60)
        assert httpx.options(f"{url}/v1/completions", headers=PAGE, timeout=60).status_code == 405
        done = httpx.post(f"{url}/v1/completions", json=ASK, headers=PAGE, timeout=60)
        assert "access-control-allow-origin" not in done.headers


def test_a_socket_of_this_machine(model, tmp_path):
    path = tmp_path / "front.sock"
    for _ in range(2):
        with serving(partial(text_service, model), http={"uds": path}) as (url, said, stop):
            assert url == f"unix:{path}" and said.get(timeout=60) == "ready: tiny"
            assert path.stat().st_mode & 0o777 == 0o660
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name") as client:
                assert client.post("/v1/completions", json=ASK, timeout=60).status_code == 200
            with pytest.raises(BackendError, match="somebody does already"):
                listening(HttpConfig(uds=path))
            assert stop() == 0 and not path.exists()


def test_what_a_server_left_behind_is_replaced_and_other_files_are_not(model, tmp_path):
    path = tmp_path / "front.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listening(HttpConfig(uds=path)).close()
    file = tmp_path / "file"
    file.write_text("mine")
    for other in (file, tmp_path / "no" / "folder", tmp_path / ("x" * 200)):
        with pytest.raises(BackendError, match="cannot listen on"):
            listening(HttpConfig(uds=other))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_send_a_token_without_waiting_for_the_one_before_to_be_acknowledged(host):
    """Some clients acknowledge after 40 ms."""
    with listening(HttpConfig(host=host, port=0)) as sock, socket.create_connection(sock.getsockname()[:2]):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- streams ------------------------------------------------------------------------------------------


def test_a_stream_may_begin_before_its_first_token_and_say_that_it_is_there(model):
    gate = Gate()
    load = partial(text_service, model, policy=gate)
    with serving(load, http={"head_after_s": 0.05, "sse_keepalive_s": 0.05}) as (url, said, _):
        said.get(timeout=60)
        body = {**ASK, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            assert stream.status_code == 200
            lines = stream.iter_lines()
            while not next(lines).startswith(": "):
                pass
            gate.most = None
            rest = [line for line in lines if line and not line.startswith(":")]
        assert len(rest) == 7 and rest[-1] == "data: [DONE]"


def test_what_goes_wrong_behind_an_early_head_is_an_event_and_a_cut(model):
    load = partial(text_service, model, policy=Gate())
    with serving(load, http={"head_after_s": 0.05}, limits={"patience_s": 2.0}) as (url, said, _):
        said.get(timeout=60)
        events = []
        with (
            pytest.raises(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{url}/v1/completions", json={**ASK, "stream": True}, timeout=60) as stream,
        ):
            assert stream.status_code == 200
            events += [line for line in stream.iter_lines() if line]
            assert len(events) == 1
    with serving(load, limits={"patience_s": 0.2}) as (url, said, _):
        said.get(timeout=60)
        assert httpx.post(f"{url}/v1/completions", json={**ASK, "stream": True}, timeout=60).status_code == 429


# -- waiting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "patience_s", "status", "code"),
    [(0, 0.2, 429, "crowded"), (2, 2.0, 504, "late")],  # by then the second has begun
)
def test_who_is_promised_nothing_does_not_wait_for_ever(model, outputs, patience_s, status, code):
    loaded = []

    def load(metrics):
        loaded.append(text_service(model, metrics, policy=Gate(outputs)))
        return loaded[0]

    with serving(load, limits={"patience_s": patience_s}) as (url, said, _):
        said.get(timeout=60)
        answer = httpx.post(f"{url}/v1/completions", json=ASK, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert f" {patience_s:g} s" in answer.json()["error"]["message"]
        assert ("retry-after" in answer.headers) == (status == 429)
        if not outputs:
            refused = httpx.post(f"{url}/inference", json={"prompt": "x", "num_tokens": 2}, timeout=60)
            assert refused.status_code == 429
        assert settled(loaded[0].service)


def test_who_is_promised_something_waits_by_that(model):
    gate = Gate()
    load = partial(text_service, model, policy=gate)
    with serving(load, limits={"patience_s": 0.05}) as (url, said, _), ThreadPoolExecutor(1) as pool:
        said.get(timeout=60)
        headers = {"x-slo-e2e-ms": "60000"}
        asked = pool.submit(httpx.post, f"{url}/v1/completions", json=ASK, headers=headers, timeout=60)
        assert httpx.post(f"{url}/v1/completions", json=ASK, timeout=60).status_code == 429  # it came later
        assert not asked.done()
        gate.most = None
        assert asked.result(60).headers["x-neustream-outcome"] == "on_time"


def test_a_class_may_want_its_answers_late(model):
    classes = {"soft": {"e2e_ms": 60_000, "on_miss": "finish"}, "hard": {"e2e_ms": 60_000}}
    load = partial(text_service, model, policy=Refuse())
    with serving(load, promises={"classes": classes}) as (url, said, _):
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            soft = client.post("/v1/completions", json={**ASK, "slo": {"class": "soft", "report": True}})
            assert soft.status_code == 200 and soft.headers["x-neustream-outcome"] == "late"
            kept = soft.json()["usage"]["neustream"]
            assert kept["on_time"] is False and 0 <= kept["queue_ms"] <= kept["e2e_ms"]
            assert client.post("/v1/completions", json={**ASK, "slo": {"class": "hard"}}).status_code == 429
            text = client.get("/metrics").text
        assert 'neustream:requests_total{class="soft",model="tiny",outcome="late"} 1.0' in text


def test_a_server_that_is_to_end_may_take_work_until_balancers_know():
    gateway = Gateway()
    gateway.open(Loaded(None, []))
    gateway.drain(take=True)
    assert gateway.state == "draining"  # which /ready tells
    gateway.check()
    gateway.drain()
    with pytest.raises(HTTPError) as refused:
        gateway.check()
    assert refused.value.status == 503 and refused.value.code == "draining"


def test_who_takes_work_a_little_longer_ends_all_the_same(model):
    with serving(partial(text_service, model), http={"pre_drain_s": 0.2}) as (_, said, stop):
        said.get(timeout=60)
        assert stop() == 0


# -- texts --------------------------------------------------------------------------------------------


def test_texts_have_a_least_length_before_stop_strings_and_tokens(model):
    with serving(partial(text_service, model)) as (url, said, _), httpx.Client(base_url=url, timeout=60) as client:
        said.get(timeout=60)
        whole = client.post("/v1/completions", json=ASK).json()["choices"][0]["text"]
        ends = {"stop": [whole[0]], "max_tokens": 40}
        assert client.post("/v1/completions", json={**ASK, **ends}).json()["usage"]["completion_tokens"] < 6
        least = client.post("/v1/completions", json={**ASK, **ends, "min_tokens": 6}).json()
        assert least["usage"]["completion_tokens"] >= 6 and least["choices"][0]["text"].startswith(whole)
        wrong = client.post("/v1/completions", json={**ASK, "min_tokens": 9})
        assert wrong.status_code == 400 and "min_tokens=9 is more than max_tokens=6" in wrong.text
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "min_tokens": 5}
        assert client.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 5


# -- what is told -------------------------------------------------------------------------------------


def test_each_request_is_a_line_of_the_access_log(model, capsys):
    observe = {"access_log": "json"}
    with serving(partial(text_service, model), observe=observe) as (url, said, stop):
        said.get(timeout=60)
        headers = {"x-slo-e2e-ms": "60000", "x-request-id": "mine"}
        for stream in (False, True):
            answer = httpx.post(f"{url}/v1/completions", json={**ASK, "stream": stream}, headers=headers, timeout=60)
            assert answer.status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "secret", "n": 99}, timeout=60).status_code == 400
        stop()
    told = capsys.readouterr().err
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [(line["route"], line["status"], line["stream"]) for line in lines] == [
        ("/v1/completions", 200, False),
        ("/v1/completions", 200, True),
        ("/v1/completions", 400, False),
    ]
    for line in lines[:2]:
        assert line["model"] == "tiny" and line["completion_tokens"] == 6 and line["on_time"] is True
        assert line["id"].startswith("mine-") and line["ms"] > 0 and line["finish"] == ["length"]
    assert lines[2]["code"] == "invalid" and "secret" not in told and "Once" not in told


def test_models_say_what_they_promise(model):
    def load(metrics):
        loaded = text_service(model, metrics)
        return Loaded(loaded.service, [replace(loaded.models[0], slo=SLO(first=0.5, step=0.25))])

    with serving(load, promises={"classes": {"chat": {"ttft_ms": 300}}}) as (url, said, _):
        said.get(timeout=60)
        (told,) = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert told["neustream"] == {"kind": "text", "slo": {"ttft_ms": 500.0, "tpot_ms": 250.0}, "classes": ["chat"]}
