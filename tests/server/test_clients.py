"""Clients that leave while their call is looked at, come again when told to, share an id, or come behind others."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import gc
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

import anyio  # noqa: E402
import openai._base_client as their_client  # noqa: E402
from serving import serving, stock, text_service, until  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import FCFS, Decision  # noqa: E402
from neustream.backends.demo import IMAGE, TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402
from neustream.server.context import Context  # noqa: E402
from neustream.service.answer import Answer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IMAGES = {"prompt": "a lighthouse", "num_inference_steps": 2, "seed": 5, "n": 4}
TEXTS = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A server of images and texts: its address, and its service."""
    images = {"measure_s": 0.0, "cache": str(tmp_path_factory.mktemp("cache")), "max_batch": 4}
    models = [
        {"name": "sd", "kind": "image", "backend": IMAGE, "sizes": ["64x64"], "options": images},
        {
            "name": "chat",
            "kind": "text",
            "backend": TEXT,
            "tokenizer": "bytes",
            "options": {"profile": Flat(), "slots": 4},
        },
    ]
    config, loaded = ServerConfig.model_validate({"models": models}), []

    def loading(metrics):
        loaded.append(load(config, metrics))
        return loaded[0]

    with serving(loading) as (url, said, _):
        assert said.get(timeout=120) == "ready: sd, chat"
        yield url, loaded[0].service


def sent(url, path, body):
    """A connection on which a request was sent."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.sendall("\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content)
    return connection


def left(url):
    """How many clients went away so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("neustream:disconnects_total{"))


# -- who leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_the_call_is_looked_at_is_forgotten(both, monkeypatch, stream):
    """The look is a thread's work, which nobody can end; what it asks for is given up."""
    url, service = both
    mount, body = service.models["sd"], {**IMAGES, "stream": stream}
    looks, go, look = [], threading.Event(), mount.request

    def held(*args, **kwargs):
        looks.append(1)
        assert go.wait(60)
        return look(*args, **kwargs)

    before, gone = (service.report.submitted, service.report.counts["cancelled"]), left(url)
    monkeypatch.setattr(mount, "request", held)
    with httpx.Client(base_url=url, timeout=60) as client, sent(url, "/v1/images/generations", body):
        until(lambda: looks)
        open_now = client.get("/health").json()
    until(lambda: left(url) > gone)
    assert open_now["status"] == "ok"  # nobody waits for a look
    go.set()
    until(lambda: service.report.submitted > before[0])
    until(lambda: not service.answers)
    assert len(looks) == 1  # of four images
    assert service.report.counts["cancelled"] == before[1] + 1
    monkeypatch.undo()
    assert httpx.post(f"{url}/v1/images/generations", json={**body, "n": 1}, timeout=60).status_code == 200


# -- who comes again ----------------------------------------------------------------------------------


class Gate:
    """Nobody gets a second output while it is shut."""

    def __init__(self):
        self.open = threading.Event()
        self._rule = FCFS(drop_hopeless=False)

    def decide(self, view):
        if self.open.is_set():
            return self._rule.decide(view)
        return Decision([job for job in view.jobs if not job.outputs][:1], wake_at=view.now + 0.01)


REFUSALS = 6
"""Before there is room."""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_client_that_is_told_to_come_again_does_so_until_it_is_served(monkeypatch, asynchronous):
    """The openai client waits as long as it is told, which takes no time here; there is room from the sixth time on."""
    gate, loaded, waits, model = Gate(), [], [], stock()

    def loading(metrics):
        loaded.append(text_service(model, metrics, policy=gate))
        return loaded[0]

    def waited(seconds):
        waits.append(seconds)
        if len(waits) >= REFUSALS:
            gate.open.set()
            time.sleep(0.02)  # until the front has heard that there is room

    async def awaited(seconds):
        waited(seconds)

    with serving(loading, limits={"max_open": 1}) as (url, said, _):
        said.get(timeout=60)
        with sent(url, "/v1/completions", TEXTS):
            until(lambda: loaded[0].service.answers)
            given = {"base_url": f"{url}/v1", "api_key": "x", "max_retries": 1000}
            ask = {**TEXTS, "model": "tiny", "extra_body": {"ignore_eos": True}}
            del ask["ignore_eos"]
            if asynchronous:
                monkeypatch.setattr(their_client, "anyio", SimpleNamespace(**{**vars(anyio), "sleep": awaited}))
                done = asyncio.run(asked_for(openai.AsyncOpenAI(**given), ask))
            else:
                monkeypatch.setattr(their_client, "time", SimpleNamespace(**{**vars(time), "sleep": waited}))
                with openai.OpenAI(**given) as client:
                    done = client.completions.create(**ask)
    assert done.usage.completion_tokens == 12
    assert len(waits) >= REFUSALS and all(wait == int(wait) and 1 <= wait <= 60 for wait in waits)


async def asked_for(client, ask):
    async with client:
        return await client.completions.create(**ask)


# -- who has the id of another ------------------------------------------------------------------------


def test_requests_with_one_id_are_each_served_under_their_own(both):
    url, _ = both
    with httpx.Client(base_url=url, timeout=60) as client, cf.ThreadPoolExecutor(8) as threads:

        def ask(number):
            path, body = ("/v1/completions", TEXTS) if number % 4 else ("/v1/images/generations", {**IMAGES, "n": 1})
            return client.post(path, json=body, headers={"x-request-id": "same"})

        answers = list(threads.map(ask, range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 8 and all(id.startswith("same-") for id in ids)
    assert len({answer.json()["choices"][0]["text"] for answer in answers if "choices" in answer.json()}) == 1


@pytest.mark.parametrize(
    ("given", "kept"), [("x" * 500, "x" * 64 + "-"), ("a/../b\\c", "a..bc-"), ("!", ""), ("", ""), ("<b>", "b-")]
)
def test_ids_of_clients_are_cut_to_what_is_safe_to_print(both, given, kept):
    answer = httpx.post(f"{both[0]}/v1/completions", json={**TEXTS, "max_tokens": 1}, headers={"x-request-id": given})
    id = answer.headers["x-request-id"]
    assert answer.status_code == 200 and id.startswith(kept) and len(id) == (len(kept) + 8 if kept else 32)


# -- who comes behind others --------------------------------------------------------------------------


def test_an_image_behind_texts_that_are_under_way(both):
    """One device: it is made between their tokens, and none of them loses any."""
    url, _ = both
    alone = httpx.post(f"{url}/v1/images/generations", json={**IMAGES, "n": 1}, timeout=60).json()["data"]
    gate, started = threading.Event(), []

    def text(number):
        body = {**TEXTS, "prompt": f"n{number}", "max_tokens": 300, "stream": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/completions", json=body) as stream:
            chunks = 0
            for line in stream.iter_lines():
                chunks += line.startswith("data: {")
                if chunks == 1:
                    started.append(number)
                    assert gate.wait(60)
            return chunks

    with cf.ThreadPoolExecutor(4) as threads:
        texts = [threads.submit(text, number) for number in range(4)]
        until(lambda: len(started) == 4 or any(one.done() for one in texts))
        made = httpx.post(f"{url}/v1/images/generations", json={**IMAGES, "n": 1}, timeout=60)
        gate.set()
        assert made.status_code == 200 and made.json()["data"] == alone
        assert [one.result(60) for one in texts] == [300] * 4


# -- what is left of them -----------------------------------------------------------------------------


CHAT = {"messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 12, "ignore_eos": True}
LEAVES = {
    "texts": ("/v1/completions", {**TEXTS, "n": 2}, {}, {200}),
    "streamed texts": ("/v1/completions", {**TEXTS, "n": 2, "stream": True}, {}, {200}),
    "chats": ("/v1/chat/completions", {**CHAT, "n": 2}, {}, {200}),
    "streamed chats": ("/v1/chat/completions", {**CHAT, "n": 2, "stream": True}, {}, {200}),
    "a text that is refused": ("/v1/completions", {**TEXTS, "n": 100}, {}, {400}),
    "a text that nobody could promise": ("/v1/completions", {**TEXTS, "slo_ms": 0.001}, {}, {400}),
    "a text that expires": ("/v1/completions", {**TEXTS, "max_tokens": 200}, {"request-timeout-ms": "20"}, {400, 504}),
    "a stream that expires": (
        "/v1/completions",
        {**TEXTS, "max_tokens": 200, "stream": True},
        {"request-timeout-ms": "20"},
        {200, 400, 504},
    ),
    "images": ("/v1/images/generations", {**IMAGES, "n": 2}, {}, {200}),
    "streamed images": ("/v1/images/generations", {**IMAGES, "n": 2, "stream": True}, {}, {200}),
    "images under way": ("/v1/images/generations", {**IMAGES, "n": 2, "stream": True, "partial_images": 1}, {}, {200}),
    "an image that nobody could promise": ("/v1/images/generations", {**IMAGES, "slo_ms": 0.001}, {}, {400, 504}),
    "effective-batching": ("/inference", {"prompt": "Once", "num_tokens": 4}, {}, {200}),
}


@pytest.mark.parametrize("name", LEAVES)
def test_what_requests_leave_needs_no_collection_of_garbage(both, name):
    """Full collections stop the event loop: the more there is in rings, the longer."""
    url, service = both
    path, body, headers, expected = LEAVES[name]

    def ask():
        try:
            status = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60).status_code
        except httpx.RemoteProtocolError:
            status = 200  # a stream that was cut
        assert status in expected
        until(lambda: not service.answers)

    ask()
    gc.collect()
    others = requests_there()  # of other services in this process; kept, so that no new one has the id of one of them
    known = {id(one) for one in others}
    gc.disable()
    try:
        ask()
        until(lambda: known.issuperset(map(id, requests_there())))
    finally:
        gc.enable()


def requests_there():
    """Requests that fronts know, whether or not anybody can get at them."""
    return [one for one in gc.get_objects() if type(one) in (Answer, Context)]


# -- what they send of their own ----------------------------------------------------------------------


def test_an_answer_of_the_openai_client_is_a_message_again(both):
    """All that its types put into a message comes back: `refusal`, `annotations`, `tool_calls` of nothing."""
    asked = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    given = {"model": "chat", "max_tokens": 3}
    with openai.OpenAI(base_url=f"{both[0]}/v1", api_key="x", max_retries=0) as client:
        first = client.chat.completions.create(messages=asked, **given).choices[0].message
        again = [*asked, first.model_dump(), {"role": "user", "content": "go on"}]
        done = client.chat.completions.create(messages=again, **given)
        raised = pytest.raises(openai.BadRequestError, match="tools is not supported")
        with raised:
            client.chat.completions.create(
                messages=asked, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], **given
            )
    assert done.choices[0].finish_reason and done.usage.prompt_tokens > 40


async def at_once(chat, prompts):
    try:
        return await chat.abatch(prompts)
    finally:
        await chat.root_async_client.close()


def test_chats_by_langchain(both):
    """Whole, streamed, several at once, with a history and likelihoods; what needs tools is refused by name."""
    theirs = pytest.importorskip("langchain_openai", reason="needs the extra 'dev'")
    given = {"model": "chat", "base_url": f"{both[0]}/v1", "api_key": "x", "max_retries": 0, "max_tokens": 4}
    chat = theirs.ChatOpenAI(**given, extra_body={"ignore_eos": True})
    assert chat.invoke("hi").usage_metadata["output_tokens"] == 4
    chunks = list(chat.stream("hi", stream_usage=True))
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 4
    assert [one.response_metadata["finish_reason"] for one in chat.batch(["a", "b", "c"])] == ["length"] * 3
    assert len(asyncio.run(at_once(chat, ["a", "b"]))) == 2
    history = [("system", "s"), ("human", "h"), ("ai", "a"), ("human", "q")]
    told = chat.bind(logprobs=True, top_logprobs=2).invoke(history).response_metadata["logprobs"]["content"]
    assert len(told) == 4 and all(len(place["top_logprobs"]) >= 2 for place in told)
    schema = {"title": "answer", "type": "object", "properties": {"x": {"type": "integer"}}}
    for method, name in {"function_calling": "tool", "json_schema": "response_format"}.items():
        with pytest.raises(openai.BadRequestError, match=f"{name}.* is not supported by this server"):
            chat.with_structured_output(schema, method=method).invoke("hi")
