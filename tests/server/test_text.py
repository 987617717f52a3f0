"""Text over HTTP, on a real socket and a tiny real model: what clients get, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import socket
import time
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service  # noqa: E402

from neustream import SLO, Decision  # noqa: E402
from neustream.backends.copies import twin  # noqa: E402
from neustream.backends.loading.texts import text_model  # noqa: E402
from neustream.server.config import ModelConfig  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture(scope="module")
def running(model):
    loaded = []

    def load(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with serving(load) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        yield url, loaded[0].service


@pytest.fixture
def url(running):
    return running[0]


@pytest.fixture
def stock_client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


# -- what clients get ---------------------------------------------------------------------------------


def test_completions_by_the_openai_client(stock_client, running):
    whole = stock_client.completions.create(model="tiny", extra_body={"ignore_eos": True}, **trimmed())
    chunks = list(
        stock_client.completions.create(
            model="tiny",
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            **trimmed(),
        )
    )
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens == 9
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 11 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    alone = running[1]("Once upon", max_tokens=12, ignore_eos=True)
    assert whole.choices[0].text == alone.text


def trimmed():
    return {name: value for name, value in ASK.items() if name != "ignore_eos"}


SAMPLED = {"temperature": 0.9, "top_p": 0.8, "seed": 4, "presence_penalty": 0.5, "frequency_penalty": -0.3}
OF_VLLM = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3, "ignore_eos": True}


def test_what_clients_want_of_tokens_is_what_the_service_gives(stock_client, running):
    whole = stock_client.completions.create(
        model="tiny", prompt="Once", max_tokens=12, logit_bias={"70": 5.5}, extra_body=OF_VLLM, **SAMPLED
    )
    done = running[1]("Once", max_tokens=12, logit_bias={70: 5.5}, **SAMPLED, **OF_VLLM)
    assert whole.choices[0].text == done.text and len(done.token_ids) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5),
        ("frequency_penalty", "much"),
        ("repetition_penalty", 0),
        ("min_p", -0.1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"100000": 1}),
    ],
)
def test_wrong_wishes_are_named(client, field, value):
    answer = client.post("/v1/completions", json={**ASK, field: value})
    assert answer.status_code == 400 and field in answer.json()["error"]["message"]


def test_chats_by_the_openai_client(stock_client, running):
    messages = [{"role": "user", "content": "hello"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = stock_client.chat.completions.create(**options)
    chunks = list(stock_client.chat.completions.create(stream=True, **options))
    assert whole.choices[0].message.role == "assistant" and whole.object == "chat.completion"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert text == running[1]("user: hello\nassistant: ", max_tokens=8).text


def test_the_asynchronous_client_and_many_at_once(url):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

            async def one(number):
                stream = await client.completions.create(model="tiny", prompt=f"n{number}", stream=True, max_tokens=10)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(24)))

    assert len(asyncio.run(main())) == 24


def test_several_choices_and_prompts(client, running):
    done = client.post(
        "/v1/completions", json={**ASK, "prompt": ["a", "b"], "n": 2, "temperature": 1, "seed": 3}
    ).json()
    assert [choice["index"] for choice in done["choices"]] == [0, 1, 2, 3]
    assert done["usage"]["completion_tokens"] == 48 and done["usage"]["prompt_tokens"] == 2
    again = client.post("/v1/completions", json={**ASK, "prompt": "a", "temperature": 1, "seed": 3}).json()
    assert again["choices"][0]["text"] == done["choices"][0]["text"]
    own = [running[1](prompt, n=2, temperature=1, seed=3, max_tokens=12, ignore_eos=True) for prompt in ("a", "b")]
    assert [choice["text"] for choice in done["choices"]] == [one.text for many in own for one in many]
    assert "prompt_tokens_details" not in done["usage"]  # nothing was computed for an earlier request


def test_the_usage_says_what_of_a_prompt_was_there(client):
    first, again = (client.post("/v1/completions", json={**ASK, "prompt": "q" * 40}).json() for _ in range(2))
    assert "prompt_tokens_details" not in first["usage"]
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    assert again["choices"] == first["choices"]


def test_a_stop_string_ends_the_text_and_the_work(client, running):
    whole = client.post("/v1/completions", json={**ASK, "max_tokens": 60}).json()["choices"][0]["text"]
    stop = next(whole[at : at + 2] for at in range(4, len(whole)) if whole.find(whole[at : at + 2]) == at)
    for stream in (False, True):
        body = {**ASK, "max_tokens": 200, "stop": [stop], "stream": stream, "slo": {"e2e_ms": 60_000, "report": True}}
        answer = client.post("/v1/completions", json=body)
        assert '"on_time": true' in answer.text.replace('":true', '": true')
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            chunks = [chunk for chunk in chunks if chunk["choices"]]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = answer.json()["choices"]
            text, reason = choice["text"], choice["finish_reason"]
        assert text == whole[: whole.find(stop)] and reason == "stop"
    assert settled(running[1])


def test_promises_are_told_back_and_kept(client):
    headers = {"x-slo-ttft-ms": "20000", "x-slo-tpot-ms": "5000", "x-slo-e2e-ms": "junk", "x-request-id": "mine?!"}
    answer = client.post("/v1/completions", json={**ASK, "slo": {"report": True}, "odd": 5}, headers=headers)
    assert answer.headers["x-neustream-slo"] == "ttft=20000;tpot=5000;e2e=inf"
    assert answer.headers["x-neustream-outcome"] == "on_time"
    assert answer.headers["x-request-id"].startswith("mine-")
    assert "unknown fields: odd" in answer.headers["x-neustream-warning"]
    assert "x-slo-e2e-ms" in answer.headers["x-neustream-warning"]
    kept = answer.json()["usage"]["neustream"]
    assert kept["on_time"] and 0 < kept["ttft_ms"] <= kept["e2e_ms"] and kept["slack_ms"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a" * 300}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 9000}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 200, "max_tokens": 100}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 9000}]}, "messages"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 900}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": 900}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)
def test_what_does_not_fit_is_named(client, path, body, param):
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_chat_that_does_not_say_how_long_is_as_long_as_the_model_says(model):
    """What the front knows of it can leave the process: a cluster's head asks an instance."""
    said = twin(model)
    said.generation_config.max_new_tokens = 5
    config = ModelConfig(name="tiny", kind="text", backend={})

    def load(metrics):
        loaded = text_service(said, metrics)
        known = text_model(config, loaded.service.models[""], SLO())
        return Loaded(loaded.service, [pickle.loads(pickle.dumps(known))])

    with serving(load) as (url, ready, _), httpx.Client(base_url=url, timeout=60) as client:
        ready.get(timeout=60)
        asked = {"messages": HELLO, "ignore_eos": True}
        for more, length in (({}, 5), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 3}, 3)):
            done = client.post("/v1/chat/completions", json={**asked, **more}).json()
            assert done["usage"]["completion_tokens"] == length


@pytest.mark.parametrize("more", [{"max_tokens": 1}, {"n": 4}, {"n": 2, "stop": ["e"]}])
@pytest.mark.parametrize("stream", [True, False])
def test_every_report_says_how_long_a_text_waited(client, more, stream):
    answer = client.post("/v1/completions", json={**ASK, **more, "stream": stream, "slo": {"report": True}})
    told = json.loads(answer.text.splitlines()[-4][6:]) if stream else answer.json()
    kept = told["usage"]["neustream"]
    assert 0 <= kept["queue_ms"] <= kept["ttft_ms"]


def test_tokens_models_and_effective_batching(client):
    told = client.post("/tokenize", json={"prompt": "añ"}).json()
    assert told == {"count": 3, "max_model_len": 256, "tokens": [97, 195, 177]}
    assert client.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "añ"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == model["root"] == "tiny" and model["max_model_len"] == 256
    assert client.get("/v1/models/tiny").json() == model
    made = client.post("/inference", json={"prompt": "x", "num_tokens": 5}).json()["completion"]
    assert made.startswith("x")
    stats = client.get("/stats").json()
    assert set(stats) == {"latency-per-token", "throughput", "total-tokens-handled", "total-elapsed-time"}
    assert stats["throughput"] == pytest.approx(1 / stats["latency-per-token"])
    assert client.get("/health").json()["status"] == "ok" and client.get("/ready").json()["state"] == "ready"


# -- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        ("/v1/completions", {**ASK, "model": "tony"}, 404, "model_not_found", "did you mean 'tiny'"),
        ("/v1/completions", {**ASK, "suffix": "x"}, 400, "unsupported", "suffix is not supported"),
        ("/v1/completions", {**ASK, "max_tokens": 0}, 400, "invalid", "0 is for echo alone"),
        ("/v1/completions", {**ASK, "max_tokens": 500}, 400, "invalid", "at most max_tokens="),
        ("/v1/completions", {**ASK, "prompt": ""}, 400, "invalid", "the prompt is empty"),
        ("/v1/completions", {**ASK, "prompt": [999]}, 400, "invalid", "999 is no token"),
        ("/v1/completions", {**ASK, "prompt": "x" * 10_000}, 400, "invalid", "10000 characters"),
        ("/v1/completions", {**ASK, "prompt": ["a"] * 9, "n": 2}, 400, "invalid", "at most 16 choices"),
        ("/v1/completions", {**ASK, "slo": {"class": "x"}}, 400, "invalid", "no class 'x'"),
        ("/v1/completions", {"max_tokens": 5}, 400, "invalid", "prompt: Field required"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid", "at least 1 item"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "invalid",
            "",
        ),
        ("/v1/images/generations", {"prompt": "x"}, 404, "model_not_found", "for images"),
        ("/detokenize", {"tokens": [999]}, 400, "invalid", "999 is no token"),
        ("/nowhere", {}, 404, "not_found", "no such route"),
    ],
)
def test_bad_requests_name_what_is_wrong(client, running, path, body, status, code, message):
    before = running[1].report.submitted
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and message in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and "x-request-id" in answer.headers
    assert running[1].report.submitted == before


def test_other_methods_media_and_sizes(client, url):
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405 and "POST" in wrong.headers["allow"]
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    text = {"content-type": "text/plain"}
    assert client.post("/v1/completions", content=b"{}", headers=text).status_code == 415
    large = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=b"x" * 2_000_000, headers=large).status_code == 413

    def parts():
        yield from [b"x" * 65_536] * 40

    assert client.post("/v1/completions", content=parts(), headers=large).status_code == 413
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000)
        connection.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 431")
    assert client.get("/health").status_code == 200


def test_a_client_that_goes_away_frees_its_slot(running):
    url, service = running
    host, port = "127.0.0.1", int(url.rpartition(":")[2])
    for stream in (True, False):
        body = json.dumps({**ASK, "max_tokens": 240, "stream": stream}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        before = service.report.counts["cancelled"]
        sockets = []
        for _ in range(4):
            connection = socket.create_connection((host, port))
            connection.sendall(head.encode() + body)
            sockets.append(connection)
        until = time.monotonic() + 20
        while service.snapshot().open < 4 and time.monotonic() < until:
            time.sleep(0.002)
        for connection in sockets:
            connection.close()
        assert settled(service)
        assert service.report.counts["cancelled"] > before


def test_a_timeout_cancels(client, running):
    answer = client.post("/v1/completions", json={**ASK, "max_tokens": 240}, headers={"request-timeout-ms": "40"})
    assert answer.status_code in (400, 429, 504) and answer.json()["error"]["code"] in (
        "expired",
        "late",
        "unattainable",
        "crowded",
    )
    assert settled(running[1])


class Refuse:
    """Drops everything, some of it once it has begun."""

    def __init__(self, after=0):
        self.after = after

    def decide(self, view):
        drop = {job: "no room today" for job in view.jobs if job.outputs >= self.after}
        return Decision([job for job in view.jobs if job not in drop][:1], drop=drop)


def test_a_drop_is_a_status_before_the_first_token_and_a_cut_behind_it(model):
    for after, status in ((0, 429), (3, 504)):
        with serving(partial(text_service, model, policy=Refuse(after))) as (url, said, _):
            said.get(timeout=60)
            with httpx.Client(base_url=url, timeout=60) as client:
                answer = client.post("/v1/completions", json=ASK)
                assert answer.status_code == status and "no room today" in answer.json()["error"]["message"]
                if not after:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert client.post("/v1/completions", json={**ASK, "stream": True}).status_code == 429
                    continue
                events = []
                with (
                    pytest.raises(httpx.RemoteProtocolError),
                    client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as stream,
                ):
                    events += [line for line in stream.iter_lines() if line]
                cut = []
                with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as theirs:
                    more = {"prompt": "x", "max_tokens": 9, "temperature": 0, "extra_body": {"ignore_eos": True}}
                    stream = theirs.completions.create(model="tiny", stream=True, **more)
                    try:
                        for chunk in stream:
                            cut.append(chunk)
                    except openai.APIError as error:
                        cut.append(error)
                assert len(cut) == 4 and "no room today" in str(cut[-1])
