"""Every limit of bodies, heads, connections and values has an answer of its own."""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, stock, text_service  # noqa: E402

from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.server.bodies import NOT_OF_TEMPLATES  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def load(model, metrics):
    """One model as it is, one without a chat template, one whose template raises, one without a tokenizer."""
    loaded = text_service(model, metrics)
    (tiny,) = loaded.models
    broken = byte_tokenizer()
    broken.chat_template = "{{ raise_exception('roles must alternate') }}"
    named = {"plain": byte_tokenizer(), "broken": broken, "ids": None}
    others = [replace(tiny, name=name, tokenizer=tokenizer) for name, tokenizer in named.items()]
    return Loaded(loaded.service, [tiny, *others])


@pytest.fixture(scope="module")
def url():
    http, limits = {"body_timeout_s": 0.4}, {"max_open": 4}
    with serving(partial(load, stock()), http=http, limits=limits) as (url, said, _):
        said.get(timeout=60)
        yield url


def raw(url, text, until=b"\r\n\r\n"):
    """What comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.settimeout(20)
        connection.sendall(text)
        found = b""
        with contextlib.suppress(ConnectionError):
            while until not in found and (part := connection.recv(4096)):
                found += part
        return found


def test_a_body_that_does_not_come_is_408(url):
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*lines, "content-length: 100", "", ""]).encode()
    found = raw(url, head + b'{"prompt": ')
    assert found.startswith(b"HTTP/1.1 408 ")


def test_too_many_headers_are_431(client):
    assert client.get("/health", headers={f"x-{at}": "y" for at in range(80)}).status_code == 200
    answer = client.get("/health", headers={f"x-{at}": "y" for at in range(120)})
    assert answer.status_code == 431 and "at most 100" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000, 431, "too_large"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431, "too_large"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431, "too_large"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid"),  # no host
        (b"\x16\x03\x01 TLS\r\n\r\n", 400, "invalid"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nno colon\r\n\r\n", 400, "invalid"),
    ],
    ids=["endless header", "target", "header", "no host", "no HTTP", "no colon"],
)
def test_what_is_no_head_is_told_in_the_form_of_all_errors(url, head, status, code):
    found = raw(url, head, until=b"}}")
    start, _, body = found.partition(b"\r\n\r\n")
    assert start.startswith(f"HTTP/1.1 {status} ".encode()) and b"x-request-id: " in start
    error = json.loads(body)["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}


def test_what_is_no_head_is_counted(url):
    assert raw(url, b"GET /version HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    assert any(line.startswith('neustream:http_requests_total{code="400",route="none"}') for line in lines)


def test_a_body_that_is_no_http_ends_a_request_that_is_under_way(url, client):
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*lines, "transfer-encoding: chunked", "", ""]).encode()
    assert raw(url, head + b"zz\r\n").startswith(b"HTTP/1.1 400 ")
    assert client.get("/health").status_code == 200


def test_a_text_needs_no_larger_body(client):
    room = 256 * 1024 + 32 * 256
    for size, status in ((room - 2000, 400), (room + 1, 413)):
        body = json.dumps({"model": "tiny", "prompt": "x" * (size - 31)})
        answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert len(body) == size and answer.status_code == status


def test_connections_are_twice_what_may_be_open():
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with serving(partial(load, stock()), limits={"max_open": 2}) as (url, said, _), contextlib.ExitStack() as undo:
        said.get(timeout=60)
        address = "127.0.0.1", int(url.rpartition(":")[2])
        for _ in range(4):  # each has been seen once it answers
            one = undo.enter_context(socket.create_connection(address))
            one.settimeout(20)
            one.sendall(health)
            assert one.recv(12) == b"HTTP/1.1 200"
        assert raw(url, health) == b""


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "plain"}, 400, "no chat template; use /v1/completions"),
        ("/v1/chat/completions", {**CHAT, "model": "broken"}, 400, "roles must alternate"),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "chat_template": "x"}, 400, "chat_template is not"),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "tools": [TOOL]}, 400, "tools is not supported"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [CALLS]}, 400, "messages.0.tool_calls: "),
        *[
            (path, {**CHAT, "model": "tiny", "chat_template_kwargs": {name: value}}, 400, f"{name} is not for")
            for path in ("/v1/chat/completions", "/tokenize")
            for name, value in {"chat_template": "{{ 7 * 7 }}", "tokenize": True, "tools": [TOOL]}.items()
        ],
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "add_generation_prompt": False}, 400, "add_generation_"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "include_stop_str_in_output": True}, 400, "include_stop"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "truncate_prompt_tokens": 4}, 400, "truncate_prompt_"),
        ("/tokenize", {"model": "tiny"}, 400, "either prompt or messages"),
        ("/tokenize", {"model": "tiny", "prompt": "x", "messages": CHAT["messages"]}, 400, "either prompt or messages"),
        ("/tokenize", {"model": "tiny", "messages": CHAT["messages"], "tools": [TOOL]}, 400, "tools is not supported"),
        ("/tokenize", {"model": "tiny", "prompt": "x", "tools": [TOOL]}, 400, "tools is not supported"),
        (
            "/tokenize",
            {"model": "tiny", "messages": CHAT["messages"], "add_special_tokens": True},
            400,
            "add_special_tokens is for prompt",
        ),
        ("/tokenize", {"model": "plain", "messages": CHAT["messages"]}, 400, "no chat template"),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "tool_choice": "required"}, 400, "tool_choice is not"),
        (
            "/v1/chat/completions",
            {**CHAT, "model": "tiny", "response_format": {"type": "json_object"}},
            400,
            "response_",
        ),
        ("/v1/chat/completions", {"model": "tiny", "messages": CHAT["messages"] * 1025}, 400, "1024"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": 5}]}, 400, "content"),
        ("/v1/completions", {"model": "ids", "prompt": "x"}, 400, "has no tokenizer: give token ids"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "n": 17}, 400, "less than or equal to 16"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "n": 0}, 400, "greater than or equal to 1"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "stop": ["y"] * 1000}, 400, "at most 4 stop strings"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "logprobs": 10**9}, 400, "less than or equal to 20"),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "n": 0}, 400, "greater than or equal to 1"),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "stop": ["y"] * 1000}, 400, "at most 4 stop strings"),
        (
            "/v1/chat/completions",
            {**CHAT, "model": "tiny", "logprobs": True, "top_logprobs": 10**9},
            400,
            "less than or equal to 20",
        ),
        ("/v1/completions", {"model": "tiny", "prompt": "x" * 300}, 400, "has 300 tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "x" * 200, "max_tokens": 100}, 400, "at most max_tokens=56"),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "x" * 300}]},
            400,
            "tokens, but",
        ),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "x", "min_tokens": 9, "max_tokens": 4},
            400,
            "min_tokens=9 is more than max_tokens=4",
        ),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "best_of": 2}, 400, "best_of is not supported"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "stop": ["y" * 65]}, 400, "1 to 64 characters"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "stop": list("abcde")}, 400, "at most 4 stop strings"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "slo": {"ttft_ms": 1e-3}}, 400, "hopeless"),
        ("/v1/completions", {"model": "tiny", "prompt": ["x"] * 17}, 400, "at most 16"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "vllm_xargs": {"slo_weight": 0}}, 400, "slo_weight"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "repetition_penalty": 5e-324}, 400, "equal to 0.01"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "temperature": 101}, 400, "less than or equal to 100"),
        ("/v1/images/generations", {"prompt": "x", "num_inference_steps": 201}, 400, "less than or equal to 200"),
        ("/v1/images/edits", {"prompt": "x", "image": "data:image/png;base64,"}, 404, "for edits"),
        ("/tokenize", {"model": "tiny", "prompt": "x" * 9000}, 400, "9000 characters"),
        ("/inference", {"prompt": "x", "num_tokens": 0}, 400, "greater than or equal to 1"),
    ],
)
def test_each_has_an_answer(client, path, body, status, message):
    answer = client.post(path, json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "more",
    [
        {"truncate_prompt_tokens": -1},
        {"chat_template_kwargs": {"add_generation_prompt": True, "tools": None, "chat_template": ""}},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"priority": 3},
        {"logprobs": False},
        {"add_generation_prompt": True, "include_stop_str_in_output": False, "truncate_prompt_tokens": None},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{**CHAT["messages"][0], "tool_calls": [], "function_call": None, "audio": None}]},
    ],
)
def test_what_asks_for_nothing_is_taken(client, more):
    answer = client.post("/v1/chat/completions", json={**CHAT, "model": "tiny", **more})
    assert answer.status_code == 200, answer.text
    known = "unknown fields: priority" if "priority" in more else None
    assert answer.headers.get("x-neustream-warning") == known


def test_what_asks_for_nothing_is_taken_where_a_chat_is_tokenised(client):
    asked = {"model": "tiny", "messages": CHAT["messages"]}
    plain = client.post("/tokenize", json=asked)
    more = {"tools": [], "add_special_tokens": False, "chat_template_kwargs": {"add_generation_prompt": True}}
    answer = client.post("/tokenize", json={**asked, **more})
    assert answer.status_code == 200 and answer.json() == plain.json()
    assert "x-neustream-warning" not in answer.headers


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/inference"])
def test_fields_that_nobody_knows_are_named_on_all_routes(client, path):
    bodies = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}, "/inference": {"num_tokens": 1}}
    answer = client.post(path, json={"model": "tiny", "prompt": "x", **bodies[path], "whatever": 1})
    if path == "/inference":  # it names no model, and here are several
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"
        return
    assert answer.status_code == 200 and "whatever" in answer.headers["x-neustream-warning"]


def test_nothing_that_transformers_takes_beside_a_template_may_come_with_a_request():
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    for kind in (PreTrainedTokenizerBase, ProcessorMixin):
        known = inspect.signature(kind.apply_chat_template).parameters
        assert {*known} - {"self", "kwargs", "documents"} <= NOT_OF_TEMPLATES


def test_tokens_of_a_chat_are_those_that_it_is_served_with(client):
    tokens = client.post("/tokenize", json={"model": "tiny", "messages": CHAT["messages"]}).json()
    usage = client.post("/v1/chat/completions", json={**CHAT, "model": "tiny"}).json()["usage"]
    assert tokens["count"] == len(tokens["tokens"]) == usage["prompt_tokens"] > 1
    assert client.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]}).json()["prompt"]


def test_two_heads_at_once_are_answered_in_order(url):
    one = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    found = raw(url, one + last, until=b"no such route")
    assert found.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 404" in found
