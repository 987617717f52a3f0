"""Any request whatever gets an answer that the served document names, and none is a fault of ours."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
schemathesis = pytest.importorskip("schemathesis", reason="needs the extra 'dev'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from PIL import Image  # noqa: E402
from serving import serving, stock, text_service  # noqa: E402

from neustream.server.gateway import Loaded  # noqa: E402
from neustream.server.models import ImageModel  # noqa: E402
from neustream.server.openapi import document  # noqa: E402
from neustream.service.answer import Answer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CASES = int(os.environ.get("NEUSTREAM_FUZZ_CASES", "60"))
"""A route; `make fuzz` tries 2,000."""
SCHEMA = schemathesis.openapi.from_dict(document())


class Painter:
    """Makes one picture of everything, at once."""

    fault = ""
    jobs = {}  # noqa: RUF012

    def submit(self, *, id, slo):
        answer = Answer(id, "paint", lambda answer: None)
        answer.set_running_or_notify_cancel()
        answer.set_result(SimpleNamespace(images=[Image.new("RGB", (8, 8))]))
        return answer

    async def close(self):
        pass


def load(metrics):
    texts = text_service(stock(), metrics)
    kinds = {"edits": True, "masks": True}
    paint = ImageModel("paint", ["8x8"], lambda body, number, pictures: {}, own=Painter(), **kinds)
    return Loaded(texts.service, [*texts.models, paint])


@pytest.fixture(scope="module")
def url():
    with serving(load) as (url, said, _):
        said.get(timeout=60)
        yield url


@pytest.mark.parametrize("path", list(document()["paths"]))
def test_cases_of_the_schema(url, path):
    operation = next(iter(document()["paths"][path]))
    strategy = SCHEMA[path][operation.upper()].as_strategy()
    known = {int(status) for status in document()["paths"][path][operation]["responses"]}

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(case):
        answer = case.call(base_url=url, timeout=60)
        assert answer.status_code in known and answer.status_code < 500, (case.body, answer.content)

    check()


@settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode())))
def test_raw_bytes_as_a_body(url, data):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=data, headers=headers, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=200))
def test_raw_bytes_as_a_request(url, data):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(30)
        answer = connection.recv(1000)
    assert answer == b"" or not answer.startswith(b"HTTP/1.1 5")
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
