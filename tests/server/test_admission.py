"""Who is not taken in, and when to come again; clients that read slowly."""

from __future__ import annotations

import copy
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from concurrent.futures import Future, ThreadPoolExecutor  # noqa: E402
from types import SimpleNamespace  # noqa: E402

from serving import serving, settled, stock, text_service, until  # noqa: E402

from neustream import FCFS, Decision  # noqa: E402
from neustream.server import lifecycle  # noqa: E402
from neustream.server.admission import Admission  # noqa: E402
from neustream.server.config import LimitConfig  # noqa: E402
from neustream.server.errors import HTTPError  # noqa: E402
from neustream.server.gateway import Gateway  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return stock()


class Gate:
    """FCFS, but while it is shut nobody runs."""

    def __init__(self):
        self.open = threading.Event()
        self._rule = FCFS(drop_hopeless=False)

    def decide(self, view):
        if self.open.is_set():
            return self._rule.decide(view)
        return Decision([], wake_at=view.now + 0.01)


@pytest.mark.parametrize(("loading_s", "told"), [(0.0, "1"), (7.2, "8"), (300.0, "60")])
def test_while_models_load_clients_come_again_after_as_long_again(monkeypatch, loading_s, told):
    now = 100.0
    monkeypatch.setattr("neustream.server.gateway.stopwatch", lambda: now)
    gateway = Gateway()
    now += loading_s
    with pytest.raises(HTTPError) as raised:
        gateway.check()
    assert (raised.value.code, raised.value.all_headers["retry-after"]) == ("loading", told)


# -- the rule -----------------------------------------------------------------------------------------


def admission(jobs=None, wait_s=lambda count: 0.5 * count, now=lambda: 0.0, **limits):
    return Admission(LimitConfig(**limits), wait_s, lambda: [jobs or {}], now)


def came(rule, *ids, model="a", promised=True):
    answers = [Future() for _ in ids]
    for id, answer in zip(ids, answers, strict=True):
        rule.came(id, model, answer, promised)
    return answers


def refused(rule, model="a", batch=1, promised=True):
    with pytest.raises(HTTPError) as raised:
        rule.check(model, batch, promised)
    return raised.value.status, raised.value.code, raised.value.all_headers["retry-after"]


def test_a_queue_has_room_for_four_steps_of_its_own_model():
    jobs = {"0": SimpleNamespace(started_at=1.0)}
    rule = admission(jobs)
    came(rule, *map(str, range(8)))
    rule.check("a", 2, True)  # seven wait, and eight may
    (last,) = came(rule, "8")
    assert refused(rule, batch=2) == (429, "queue_full", "1")
    rule.check("b", 1, True)  # another model's queue is its own
    jobs["1"] = SimpleNamespace(started_at=2.0)
    rule.check("a", 2, True)
    came(rule, "9")
    last.set_result(None)
    rule.check("a", 2, True)


def test_the_time_to_come_again_is_that_until_there_is_room():
    rule = admission(max_queued=2)
    came(rule, *map(str, range(9)))
    assert refused(rule) == (429, "queue_full", "4")  # eight have to go on, half a second each
    slow = admission(max_queued=1, wait_s=lambda count: 1e6)
    came(slow, "x")
    assert refused(slow)[2] == "60"
    unknown = admission(max_queued=1, wait_s=lambda count: None)
    came(unknown, "x")
    assert refused(unknown)[2] == "1"


def test_who_would_wait_too_long_is_refused():
    rule = admission(max_queued=99, max_wait_s=2.0)
    came(rule, *"abcd")
    rule.check("a", 1, True)
    came(rule, "e", "f", "g")
    assert refused(rule) == (429, "wait", "2")  # 3.5 s are 1.5 too many
    unknown = admission(max_wait_s=0.001, wait_s=lambda count: None)
    came(unknown, "x")
    unknown.check("a", 1, True)


def test_more_are_open_than_may_be():
    rule = admission(max_open=2, max_queued=9)
    first, _ = came(rule, "x", "y", model="b")
    assert refused(rule) == (429, "too_many", "1")
    first.cancel()
    rule.check("a", 1, True)


def test_who_is_promised_nothing_takes_nobodys_place():
    rule = admission(max_queued=2)
    came(rule, "u", "v", promised=False)
    assert refused(rule, promised=False)[1] == "queue_full"
    rule.check("a", 1, True)
    came(rule, "p", "q")
    assert refused(rule)[1] == "queue_full"


def test_each_kind_has_a_pace_of_its_own():
    at = [0.0]
    rule = admission(max_queued=1, now=lambda: at[0])
    for number in range(3):
        (fast,) = came(rule, f"p{number}")
        at[0] += 0.25
        fast.set_result(None)
    for number in range(3):
        (slow,) = came(rule, f"u{number}", promised=False)
        at[0] += 20.0
        slow.set_result(None)
    (gone,) = came(rule, "gone")
    gone.cancel()
    assert rule.wait_s("a", True, 8) == 2.0 and rule.wait_s("a", False, 2) == 40.0
    assert rule.wait_s("b", True, 8) == 4.0  # the engine's, as long as nothing is known
    came(rule, "last", promised=False)
    assert refused(rule, promised=False) == (429, "queue_full", "20")


# -- over HTTP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "code", "message"),
    [
        ({"max_queued": 2}, "queue_full", "2 requests without a promise wait for 'tiny', and max_queued is 2"),
        ({"max_open": 2}, "too_many", "2 requests are open, and max_open is 2"),
        ({"max_wait_s": 1e-9}, "wait", "max_wait_s is 1e-09"),
    ],
)
def test_what_is_too_much_is_429_with_when_to_come_again(model, limits, code, message):
    gate, loaded = Gate(), []
    gate.open.set()

    def load(metrics):
        loaded.append(text_service(model, metrics, policy=gate))
        return loaded[0]

    with serving(load, limits=limits) as (url, said, _), ThreadPoolExecutor(4) as pool:
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(3):  # the pace is known from now on
                assert client.post("/v1/completions", json=ASK).status_code == 200
            gate.open.clear()
            count = 1 if code == "wait" else 2
            sent = [pool.submit(client.post, "/v1/completions", json=ASK) for _ in range(count)]
            until(lambda: loaded[0].service.snapshot().open == count)
            for stream in (False, True):
                answer = client.post("/v1/completions", json={**ASK, "stream": stream})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (429, code) and message in error["message"]
                assert error["type"] == "rate_limit_error" and 1 <= int(answer.headers["retry-after"]) <= 60
            assert client.post("/inference", json={"prompt": "x", "num_tokens": 1}).status_code == 429
            assert client.post("/v1/completions", json={"max_tokens": 1}).status_code == 400  # it is wrong anyway
            gate.open.set()
            assert [each.result(60).status_code for each in sent] == [200] * count


@pytest.mark.parametrize(
    ("undelivered", "write_timeout_s"), [(50, 600.0), (100_000, 0.5)], ids=["too many events", "too long"]
)
def test_a_client_that_does_not_read_is_cut_and_counted(model, monkeypatch, undelivered, write_timeout_s):
    listening, loaded = lifecycle.listening, []

    def small(http):
        sock = listening(http)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the kernel would take megabytes
        return sock

    monkeypatch.setattr(lifecycle, "listening", small)

    slow = copy.deepcopy(model)  # it would be at the end before anybody is cut
    slow.register_forward_pre_hook(lambda *_: time.sleep(0.015))

    def load(metrics):
        loaded.append(text_service(slow, metrics, slots=8))
        return loaded[0]

    limits, http = {"undelivered": undelivered}, {"write_timeout_s": write_timeout_s}
    with serving(load, http=http, limits=limits) as (url, said, _):
        said.get(timeout=60)
        body = json.dumps({**ASK, "max_tokens": 240, "n": 8, "logprobs": 20, "stream": True}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            connection.sendall(head.encode() + body)
            assert connection.recv(12) == b"HTTP/1.1 200"  # and no more is read
            until(lambda: metric(url, "slow_readers_total") == 1)
            assert settled(loaded[0].service)
            assert loaded[0].service.report.counts["cancelled"] >= 1
        assert httpx.post(f"{url}/v1/completions", json=ASK, timeout=60).status_code == 200


def metric(url, name):
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"neustream:{name}")).rpartition(" ")[2])
