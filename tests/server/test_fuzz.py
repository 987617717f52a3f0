"""Any request whatever gets an answer that the served document names, and none is a fault of ours."""

from __future__ import annotations

import base64
import io
import os
import socket
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
schemathesis = pytest.importorskip("schemathesis", reason="needs the extra 'dev'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

import requests  # noqa: E402  schemathesis' own client
from PIL import Image  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from serving import serving, stock  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import Graph, seq, serve, tool  # noqa: E402
from neustream.backends.copies import twin  # noqa: E402
from neustream.backends.loading.texts import BYTES_TEMPLATE  # noqa: E402
from neustream.backends.transformers import TextMount  # noqa: E402
from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402
from neustream.server.models import AgentModel, ImageModel, TextModel  # noqa: E402
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


LIKE = {"prompt": "x", "max_tokens": 2}
TOKENS = 96
"""Of a text at most, so that one which says nothing of its length is no long one."""


def agent(models):
    """Goes on from whatever its parameters are, and counts."""
    plan = models["tiny"].call("plan", lambda job: {**LIKE, "prompt": repr(dict(job.params))[:20]}, like=LIKE)
    return Graph("agent", seq(plan, tool("count", lambda given: {"tokens": len(given.state["plan"].token_ids)})))


def load(metrics):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BYTES_TEMPLATE
    texts = TextMount(twin(stock()), tokenizer, profile=Flat(), slots=8, max_len=TOKENS)
    service = serve({"tiny": texts, "agent": agent}, observers=[metrics])
    tiny = TextModel("tiny", tokenizer, TOKENS, texts.model.vocabulary, batch=8)
    kinds = {"edits": True, "masks": True}
    paint = ImageModel("paint", ["8x8"], lambda body, number, pictures: {}, own=Painter(), **kinds)
    return Loaded(service, [tiny, paint, AgentModel("agent")])


@pytest.fixture(scope="module")
def url():
    with serving(load) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny, paint, agent"
        yield url


NAMED = {"/v1/agents/{name}": {"name": "agent"}, "/v1/models/{id}": {"id": "tiny"}}
"""By path, what is there."""
MODELS = {"images": "paint", "agents": "agent"}
"""By a part of the path, which of them is asked."""
NEEDED = ("prompt", "messages", "text", "tokens", "image", "mask", "params", "num_tokens")
WHITE = io.BytesIO()
Image.new("RGB", (8, 8), "white").save(WHITE, "PNG")
PNG = WHITE.getvalue()
PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
LETTERS = st.text("abcdefgh ", min_size=1, max_size=20)


def as_whole(value):
    """JSON's 7.0 is a whole number for a schema, and none for this server."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [as_whole(each) for each in value]
    return {name: as_whole(each) for name, each in value.items()} if isinstance(value, dict) else value


@st.composite
def cases(draw, operation):
    """Requests that the schema allows, and ones that it does not.

    Half are likely to be served: of few fields, since each is one more reason to refuse them, with a
    short prompt, for a model that is there.
    """
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    case = draw(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    if operation.path in NAMED and draw(st.booleans()):
        case.path_parameters = dict(NAMED[operation.path])
    if not isinstance(case.body, dict) or draw(st.booleans()):
        return case
    more = sorted(case.body.keys() - set(NEEDED), key=repr)
    kept = {*NEEDED, *(draw(st.sets(st.sampled_from(more), max_size=2)) if more else ())}
    case.body = {name: as_whole(value) for name, value in case.body.items() if name in kept}
    case.body["model"] = next((model for part, model in MODELS.items() if part in operation.path), "tiny")
    if operation.path == "/tokenize" and draw(st.booleans()):  # of one of the two
        case.body.pop("messages", None)
        case.body["prompt"] = ""
    if "prompt" in case.body:
        case.body["prompt"] = draw(LETTERS)
    if operation.path.endswith("edits") and draw(st.booleans()):
        picture = PNG if case.media_type == "multipart/form-data" else PNG_URL
        case.body |= {"image": picture, "mask": picture, "prompt": draw(LETTERS)}
    if "num_tokens" in case.body:
        case.body["num_tokens"] = draw(st.integers(1, 20))
    return case


@pytest.mark.parametrize("path", list(document()["paths"]))
def test_cases_of_the_schema(url, path):
    operation = next(iter(document()["paths"][path]))
    known = {int(status) for status in document()["paths"][path][operation]["responses"]}
    seen, session, began = Counter(), requests.Session(), time.monotonic()

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(SCHEMA[path][operation.upper()]))
    def check(case):
        answer = case.call(base_url=url, session=session, timeout=60)
        seen[answer.status_code] += 1
        assert answer.status_code in known and answer.status_code < 500, (case.body, answer.content)

    with session:
        check()
    took = time.monotonic() - began
    print(f"{operation.upper()} {path}: {seen.total():,} cases in {took:.0f} s, by status {dict(sorted(seen.items()))}")
    answer = 404 if path == "/cluster" else 200  # there is none behind this server
    assert seen[answer], f"no case came to an answer: {seen}"


@settings(max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode())))
def test_raw_bytes_as_a_body(client, data):
    answer = client.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@settings(max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=200))
def test_raw_bytes_as_a_request(url, client, data):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(30)
        answer = connection.recv(1000)
    assert answer == b"" or not answer.startswith(b"HTTP/1.1 5")
    assert client.get("/health").status_code == 200
