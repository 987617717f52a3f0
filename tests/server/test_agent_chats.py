"""Agents that end in a text, as models of the chat route: whole, streamed, by the OpenAI SDK, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, Field

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import serving, until  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import Graph, call, loop, par, seq, switch, tool  # noqa: E402
from neustream.backends.demo import TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402
from neustream.server.errors import HTTPError  # noqa: E402
from neustream.server.text import _tokens  # noqa: E402
from neustream.service.agents import last_calls  # noqa: E402
from neustream.service.answer import Answer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HERE = "test_agent_chats"
LIKE = {"prompt": "x" * 8, "max_tokens": 6, "ignore_eos": True, "temperature": 0.0}
CHAT = {
    "name": "chat",
    "kind": "text",
    "tokenizer": "bytes",
    "backend": {**TEXT, "config": {**TEXT["config"], "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32}},
    "options": {"profile": Flat(), "slots": 4},
}
GATE, REACHED = threading.Event(), threading.Event()
GATE.set()


class Talk(BaseModel):
    messages: list[dict[str, str]] = Field(min_length=1)
    max_tokens: int = Field(default=4, le=8)


def said(job):
    return job.params["messages"][-1]["content"]


def look(given):
    REACHED.set()
    assert GATE.wait(60)
    if said(given) == "break":
        raise ValueError("no luck")
    return {"found": f"{given.state['plan'].text}!", "short": said(given) == "short"}


def answering(models):
    """A plan, a tool, and one of two answers."""

    def ask(name, prompt, most):
        return models["chat"].call(
            name, lambda job: {**LIKE, "prompt": prompt(job), "max_tokens": most(job)}, like=LIKE
        )

    plan = ask("plan", said, lambda job: 6)
    answers = {
        True: ask("brief", lambda job: job.state["found"], lambda job: 2),
        False: ask("full", lambda job: job.state["found"] + "?", lambda job: job.params["max_tokens"]),
    }
    return Graph("answering", seq(plan, tool("look", look), switch(lambda job: job.state["short"], answers)))


def drawing(models):
    """It ends in a tool."""
    plan = models["chat"].call("say", lambda job: {**LIKE, "prompt": said(job)}, like=LIKE)
    return Graph("drawing", seq(plan, tool("draw", lambda given: {"drawn": True})))


def agent(name, **more):
    return {"name": name, "kind": "agent", "graph": f"{HERE}:{name}", **more}


@pytest.fixture(scope="module")
def front():
    """A client, its URL, and the service behind the server."""
    models, services = [CHAT, agent("answering", params=f"{HERE}:Talk"), agent("drawing")], []

    def opened(metrics):
        loaded = load(ServerConfig(models=models), metrics)
        services.append(loaded.service)
        return loaded

    with serving(opened) as (url, told, _):
        assert told.get(timeout=120) == "ready: chat, answering, drawing"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, f"{url}/v1", services[0]


def ask(client, content="why", headers=None, model="answering", **body):
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages, **body}, headers=headers)


def state_of(client, content="why", **params):
    params = {"messages": [{"role": "user", "content": content}], **params}
    return client.post("/v1/agents/answering", json={"params": params}).json()["state"]


def chunks_of(text):
    parts = text.strip().split("\n\n")
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize(("content", "name", "tokens"), [("why", "full", 4), ("short", "brief", 2)])
def test_its_last_call_is_the_answer(front, content, name, tokens):
    client, _, _ = front
    found = ask(client, content, slo={"e2e_ms": 60_000, "report": True})
    made = state_of(client, content)[name]
    whole = found.json()
    [choice] = whole["choices"]
    assert (whole["object"], whole["model"]) == ("chat.completion", "answering")
    assert choice["message"] == {"role": "assistant", "content": made["text"]} and choice["finish_reason"] == "length"
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (made["prompt_tokens"], tokens)
    kept = usage["neustream"]
    assert kept["on_time"] and 0 < kept["ttft_ms"] <= kept["e2e_ms"]
    assert found.headers["x-neustream-outcome"] == "on_time"


def test_it_streams_the_tokens_of_that_call_alone(front):
    client, _, _ = front
    chunks = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}).text)
    usage = chunks.pop()["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    made = state_of(client)["full"]
    assert "".join(choice["delta"]["content"] for choice in choices) == made["text"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (made["prompt_tokens"], 4)


def test_by_the_openai_sdk_with_a_field_that_the_agent_takes(front):
    openai = pytest.importorskip("openai", reason="needs the extra 'dev'")
    client, url, _ = front
    budget = {"x-slo-e2e-ms": "60000", "x-neustream-session": "s", "x-neustream-session-e2e-ms": "50000"}
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, default_headers=budget) as sdk:
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why"}]
        whole = sdk.chat.completions.create(model="answering", messages=messages, max_tokens=3)
        with sdk.chat.completions.create(model="answering", messages=messages, max_tokens=3, stream=True) as stream:
            text = "".join(chunk.choices[0].delta.content for chunk in stream)
    assert whole.choices[0].message.content == text == state_of(client, max_tokens=3)["full"]["text"]


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"temperature": 0.5}, (400, "unsupported", "temperature")),
        ({"n": 2}, (400, "unsupported", "n")),
        ({"logprobs": True}, (400, "unsupported", "logprobs")),
        ({"stop": "a"}, (400, "unsupported", "stop")),
        ({"tools": [{"type": "function"}]}, (400, "unsupported", "tools")),
        ({"max_tokens": 9}, (400, "invalid", "max_tokens")),
        ({"model": "drawing"}, (404, "model_not_found", "model")),
        ({"slo": {"e2e_ms": 0.001}}, (400, "unattainable", None)),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            (400, "unsupported", "messages"),
        ),
    ],
    ids=str,
)
def test_what_is_refused_is_named(front, body, wanted):
    messages = [{"role": "user", "content": "why"}]
    found = front[0].post("/v1/chat/completions", json={"model": "answering", "messages": messages, **body})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == wanted, error


def test_fields_that_ask_for_nothing_are_taken(front):
    assert ask(front[0], n=1, logprobs=False, temperature=None, user="me", tools=[]).status_code == 200


def test_a_chat_without_a_model_is_the_language_models(front):
    messages = [{"role": "user", "content": "why"}]
    found = front[0].post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert found.status_code == 200 and found.json()["model"] == "chat"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_fails_is_told_before_the_first_token(front, stream):
    found = ask(front[0], "break", stream=stream)
    assert found.status_code == 500 and "no luck" in found.json()["error"]["message"]


def test_a_run_that_ends_while_nobody_looks_is_told_though_no_token_was_its_own():
    """Outputs of other calls, and what it came to, are there at one look: nothing rings behind it."""
    run = Answer("run", "answering", lambda answer: None, lambda: lambda output: None)
    run.push(None)
    run.refuse(ValueError("no luck"))
    gateway = SimpleNamespace(patience=lambda *about: SimpleNamespace(end=lambda: None))
    context = SimpleNamespace(gateway=gateway, config=None)
    reply = SimpleNamespace(
        choices=[SimpleNamespace(answer=run)],
        promise=SimpleNamespace(timeout_s=math.inf, slo=None),
        outlet=SimpleNamespace(blocked=False),
    )

    async def first():
        return await asyncio.wait_for(anext(_tokens(context, None, reply)), 30)

    with pytest.raises(HTTPError, match="no luck"):
        asyncio.run(first())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_the_run(front, stream):
    client, _, service = front
    before = service.report.counts["cancelled"]
    GATE.clear()
    REACHED.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/v1/chat/completions",
                json={"model": "answering", "messages": [{"role": "user", "content": "x"}], "stream": stream},
                timeout=httpx.Timeout(60, read=1.0),
            )
        assert REACHED.wait(60)
        (answer,) = service.answers.values()
        until(answer.cancelled)
    finally:
        GATE.set()
    until(lambda: service.report.counts["cancelled"] > before and not service.snapshot().open)
    until(lambda: not service.models["chat"].used)
    assert ask(client).status_code == 200


# -- which graphs end in a text -----------------------------------------------------------------------

TOOL = tool("t", lambda given: {})
ONE, TWO = (call(TOOL, name, result=lambda job, came: came) for name in ("one", "two"))


@pytest.mark.parametrize(
    ("root", "ends"),
    [
        (ONE, {"one"}),
        (seq(TOOL, seq(TWO, ONE)), {"one"}),
        (seq(TOOL, switch(lambda job: 1, {1: ONE, 2: seq(TOOL, TWO)})), {"one", "two"}),
        (call(seq(TOOL, ONE), "around"), {"one"}),
        (seq(ONE, TOOL), set()),
        (seq(ONE, ONE), set()),
        (seq(loop(ONE, times=2), ONE), set()),
        (seq(TWO, loop(ONE, times=2)), set()),
        (seq(TWO, par(ONE)), set()),
        (seq(TWO, switch(lambda job: 1, {1: ONE, 2: TOOL})), set()),
        (seq(TWO, switch(lambda job: 1, {1: ONE, 2: seq()})), set()),
        (seq(TOOL, call(TOOL, "mute", result=lambda job, came: came)), set()),
    ],
)
def test_a_graph_ends_in_a_text_if_each_way_does_by_a_call_of_its_own(root, ends):
    assert last_calls(Graph("g", root), frozenset({"one", "two"})) == ends
