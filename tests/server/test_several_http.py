"""Several choices of one prompt over HTTP, while the one that computes the prompt is held up."""

from __future__ import annotations

import json
import socket
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service, until  # noqa: E402

from neustream import FCFS, Decision  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 6, "temperature": 1, "seed": 3, "n": 3, "ignore_eos": True}


class Gate:
    """FCFS, but nobody runs while it is shut: before the first output, or behind it."""

    def __init__(self, outputs):
        self.outputs, self.open = outputs, threading.Event()
        self._rule = FCFS(drop_hopeless=False)

    def decide(self, view):
        ready = [job for job in view.jobs if job.outputs < self.outputs]
        if self.open.is_set():
            return self._rule.decide(view)
        return Decision(ready[:1], wake_at=view.now + 0.01)


@pytest.fixture(scope="module", params=[0, 1], ids=["no output yet", "one output"])
def held(request):
    """A server whose requests come so far and wait then: its address, its service, and what lets them go on."""
    gate, loaded, model = Gate(request.param), [], stock()

    def load(metrics):
        loaded.append(text_service(model, metrics, policy=gate, slots=2))
        return loaded[0]

    with serving(load) as (url, said, _):
        said.get(timeout=60)
        yield url, loaded[0].service, gate


@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_wait_for_the_first_one_end_with_the_time_of_their_request(held, stream):
    url, service, gate = held
    gate.open.clear()
    with httpx.Client(base_url=url, timeout=60) as client:
        body, head = {**ASK, "stream": stream}, {"request-timeout-ms": "300"}
        if stream and gate.outputs:
            with pytest.raises(httpx.RemoteProtocolError):
                client.post("/v1/completions", json=body, headers=head)
        else:
            answer = client.post("/v1/completions", json=body, headers=head)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "expired")
        assert settled(service) and not service.answers
        gate.open.set()
        choices = client.post("/v1/completions", json=ASK).json()["choices"]
        alone = [
            client.post("/v1/completions", json={**ASK, "n": 1, "seed": 3 + at}).json()["choices"][0]["text"]
            for at in range(3)
        ]
        assert [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])] == alone


def test_choices_of_a_client_that_is_gone_are_given_up(held):
    url, service, gate = held
    gate.open.clear()
    body = json.dumps({**ASK, "stream": True}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        connection.sendall(head.encode() + body)
        until(lambda: len(service.answers) == 3)
    until(lambda: not service.answers)
    assert settled(service)
