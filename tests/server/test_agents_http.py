"""Agents over real HTTP: a run with its calls, tools, promises, and faults by field."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable

import pytest
from PIL import Image
from pydantic import BaseModel, Field

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import serving, stock  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import BackendError, Graph, par, seq, serve, tool  # noqa: E402
from neustream.backends.copies import twin  # noqa: E402
from neustream.backends.demo import TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.backends.transformers import TextMount  # noqa: E402
from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402
from neustream.server.models import AgentModel, TextModel  # noqa: E402
from neustream.server.openapi import document  # noqa: E402
from neustream.server.plain import plain_state  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LIKE = {"prompt": "x" * 8, "max_tokens": 6, "ignore_eos": True}


class Question(BaseModel):
    question: str = Field(min_length=1)


class Odder(BaseModel):
    """Has no JSON schema."""

    ask: Callable[[], None]


class Gate:
    """A tool that waits for whoever closed it."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def draw(self, given):
        self.reached.set()
        self.open.wait(30)
        bars = [len(given.state["plan"].token_ids), float("nan")]
        return {"chart": {"bars": bars, "picture": Image.new("RGB", (2, 2))}, "raw": object()}


def build(gate, models):
    """A plan, a drawing, two texts at the same time, and what becomes of them."""

    def ask(name, most):
        return models["tiny"].call(
            name, lambda job: {**LIKE, "prompt": job.params["question"], "max_tokens": most}, like=LIKE
        )

    def join(given):
        return {"texts": [given.state[name][name].text for name in ("left", "right")]}

    branches = par(left=ask("left", 3), right=ask("right", 3))
    return Graph("agent", seq(ask("plan", 6), tool("draw", gate.draw), branches, tool("join", join)))


@pytest.fixture(scope="module")
def front():
    """A client, the gate of the agent's tool, and the service behind the server."""
    gate, services = Gate(), []

    def opened(metrics):
        chat = TextMount(twin(stock()), byte_tokenizer(), profile=Flat(), slots=4)
        service = serve({"tiny": chat, "agent": lambda models: build(gate, models)}, observers=[metrics])
        services.append(service)
        tiny = TextModel("tiny", chat.tokenizer, chat.model.max_len, chat.model.vocabulary)
        return Loaded(service, [tiny, AgentModel("agent", Question)])

    with serving(opened, promises={"classes": {"slow": {"e2e_ms": 60_000}}}) as (url, said, _):
        assert said.get(timeout=120) == "ready: tiny, agent"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, gate, services[0]


def run(client, name="agent", headers=None, **body):
    return client.post(f"/v1/agents/{name}", json={"params": {"question": "why"}, **body}, headers=headers)


def error_of(answer):
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"], error["message"]


def until(is_so):
    """Whether it is so at some time soon."""
    for _ in range(4000):
        if is_so():
            return True
        threading.Event().wait(0.005)
    return False


def events_of(text):
    """The events of a whole stream: name and data."""
    parts = [block.split("\n") for block in text.strip().split("\n\n")]
    assert parts.pop() == ["data: [DONE]"]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def test_a_run_ends_with_its_state(front):
    client, _, _ = front
    answer = run(client, slo={"e2e_ms": 60_000, "report": True})
    found = answer.json()
    state = found["state"]
    assert answer.status_code == 200 and (found["object"], found["model"]) == ("agent.run", "agent")
    assert len(state["plan"]["token_ids"]) == 6 and isinstance(state["plan"]["text"], str)
    plan = state["plan"]
    assert plan["on_time"] and len(plan["at_s"]) == 6
    assert 0 <= plan["waited_s"] <= plan["at_s"][0] <= plan["at_s"][-1] <= plan["latency_s"]
    assert plan["latency_s"] * 1e3 < found["neustream"]["e2e_ms"]
    assert state["texts"] == [state[name][name]["text"] for name in ("left", "right")]
    assert state["chart"]["bars"] == [6, None]  # JSON has no nan
    assert state["chart"]["picture"]["b64_json"].startswith("iVBOR")
    assert set(state) == {"plan", "chart", "left", "right", "texts"} and found["left_out"] == ["raw"]
    assert found["neustream"]["on_time"] and 0 <= found["neustream"]["queue_ms"] < found["neustream"]["e2e_ms"]
    assert answer.headers["x-neustream-outcome"] == "on_time"
    assert answer.headers["x-neustream-slo"] == "ttft=inf;tpot=inf;e2e=60000"


def test_outputs_stream_by_call_and_branch_with_their_text(front):
    client, _, _ = front
    whole = run(client).json()["state"]
    events = events_of(run(client, stream=True).text)
    assert [name for name, _ in events if name != "node"] == ["output"] * 12 + ["done"]
    told = [data for name, data in events if name == "output"]
    assert {(one["call"], one["branch"]) for one in told} == {("plan", ""), ("left", "left"), ("right", "right")}
    for call in ("plan", "left", "right"):
        outputs = [one["output"] for one in told if one["call"] == call]
        assert [one["index"] for one in outputs] == list(range(len(outputs)))
        assert outputs[-1]["finish_reason"] == "length" and outputs[0]["finish_reason"] is None
        result = whole["plan"] if call == "plan" else whole[call][call]
        assert "".join(one["text"] for one in outputs) == result["text"]
    assert events[-1][1]["state"]["texts"] == whole["texts"]


def test_a_stream_tells_of_each_node_that_a_run_is_through(front):
    """Tools too, which have no outputs: each behind its own outputs, and in front of what follows it."""
    events = events_of(run(front[0], stream=True, slo={"e2e_ms": 60_000}).text)
    order = [(name, data.get("call")) for name, data in events]
    assert order[:9] == [*[("output", "plan")] * 6, ("node", "plan"), ("node", "draw"), ("output", order[8][1])]
    assert order[-2:] == [("node", "join"), ("done", None)]
    nodes = {(data["call"], data["branch"]): data for name, data in events if name == "node"}
    assert set(nodes) == {("plan", ""), ("draw", ""), ("left", "left"), ("right", "right"), ("join", "")}
    for (call, branch), node in nodes.items():
        last = max(at for at, one in enumerate(order) if one[1] == call)
        assert order[last] == ("node", call) and (node["status"], node["on_time"]) == ("done", True)
        assert node["outputs"] == sum(one == ("output", call) for one in order)
        assert 0 <= (node["ttft_ms"] or 0) <= node["e2e_ms"] and 0 < node["slack_ms"] < 60_000, branch
    assert nodes["draw", ""]["ttft_ms"] is None


def test_promises_by_headers_class_and_body(front):
    client, _, _ = front
    headers = {"x-slo-ttft-ms": "50000", "x-slo-tpot-ms": "40000", "x-slo-e2e-ms": "soon"}
    answer = run(client, headers=headers)
    assert answer.headers["x-neustream-slo"] == "ttft=50000;tpot=40000;e2e=inf"
    assert "x-slo-e2e-ms" in answer.headers["x-neustream-warning"]
    assert run(client, headers={"x-slo-class": "slow"}).headers["x-neustream-slo"].endswith("e2e=60000;class=slow")
    assert error_of(run(client, slo={"e2e_ms": 0.01}))[:2] == (400, "unattainable")
    session = {"x-neustream-session": "a", "x-neustream-session-e2e-ms": "50000"}
    assert float(run(client, headers=session).headers["x-neustream-session-left-ms"]) < 50_000


@pytest.mark.parametrize(
    ("name", "body", "wanted"),
    [
        ("agent", {"params": {}}, (400, "invalid", "params.question", "params.question: Field required")),
        ("agent", {"params": {"question": ""}}, (400, "invalid", "params.question", None)),
        ("agent", {"params": 3}, (400, "invalid", "params", None)),
        ("agent", {"slo": {"e2e_ms": -1}}, (400, "invalid", "slo.e2e_ms", None)),
        ("agent", {"model": "tiny"}, (400, "invalid", "model", "model: the path names 'agent'")),
        (
            "agant",
            {},
            (404, "model_not_found", "model", "no model 'agant' for agents; did you mean 'agent'? allowed: agent"),
        ),
        ("tiny", {}, (404, "model_not_found", "model", None)),
    ],
)
def test_what_is_wrong_is_named_by_field(front, name, body, wanted):
    found = error_of(run(front[0], name, **body))
    assert found[:3] == wanted[:3] and wanted[3] in (None, found[3])


def test_the_routes_of_texts_do_not_take_an_agent(front):
    answer = front[0].post("/v1/completions", json={"model": "agent", "prompt": "a"})
    assert error_of(answer)[:2] == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_run(front, stream):
    client, gate, service = front
    before = service.report.counts["cancelled"]
    gate.open.clear()
    gate.reached.clear()
    url = client.base_url
    body = json.dumps({"params": {"question": "why"}, "stream": stream}).encode()
    head = f"POST /v1/agents/agent HTTP/1.1\r\nhost: {url.host}\r\ncontent-type: application/json\r\n"
    try:
        with socket.create_connection((url.host, url.port)) as away:
            away.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert gate.reached.wait(60)
            (answer,) = service.answers.values()
        assert until(answer.cancelled)
    finally:
        gate.open.set()
    assert until(lambda: service.report.counts["cancelled"] > before)
    assert until(lambda: not service.snapshot().open and not service.models["tiny"].used)
    assert run(client).status_code == 200


def test_models_and_the_document_tell_of_agents(front):
    kinds = {model["id"]: model["neustream"] for model in front[0].get("/v1/models").json()["data"]}
    assert kinds["agent"]["kind"] == "agent" and "question" in kinds["agent"]["params"]["properties"]
    path = document()["paths"]["/v1/agents/{name}"]["post"]
    assert path["parameters"][0]["name"] == "name"
    assert "AgentBody" in path["requestBody"]["content"]["application/json"]["schema"]["$ref"]


# -- as a config says it --------------------------------------------------------------------------

CHAT = {
    "name": "chat",
    "kind": "text",
    "tokenizer": "bytes",
    "backend": {**TEXT, "config": {**TEXT["config"], "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32}},
    "options": {"profile": Flat(), "slots": 2},
}
HERE = "test_agents_http"


def small(models):
    """An agent that a config names."""
    like = {**LIKE, "max_tokens": 2}
    return Graph("agent", models["chat"].call("say", lambda job: {**like, "prompt": job.params["question"]}, like=like))


def double(models):
    """Its tool has the name of another agent's."""
    return Graph("double", tool("draw", lambda given: {}))


def drawing(models):
    return Graph("drawing", tool("draw", lambda given: {}))


def broken(models):
    return models["nobody"].call("say", lambda job: {}, like={})


def agent(name, graph, **more):
    return {"name": name, "kind": "agent", "graph": f"{HERE}:{graph}", **more}


def test_a_config_names_the_function_that_makes_an_agent():
    models = [CHAT, agent("one", "small", params=f"{HERE}:Question"), agent("two", "broken"), agent("three", "nothing")]
    loaded = load(ServerConfig(models=models), lambda record: None)
    with loaded.service as service:
        assert [(model.name, model.kind) for model in loaded.models] == [("chat", "text"), ("one", "agent")]
        assert "no model 'nobody'" in loaded.failed["two"] and "has no attribute 'nothing'" in loaded.failed["three"]
        assert len(service.submit({"question": "why"}, model="one").result(60)["say"].token_ids) == 2


def test_a_tool_of_another_agents_name_is_told_before_anything_is_served():
    loaded = load(ServerConfig(models=[agent("one", "drawing"), agent("two", "double")]), lambda record: None)
    with loaded.service:
        assert [model.name for model in loaded.models] == ["one"]
    assert loaded.failed == {"two": "tool 'draw' is another model's too; give it another name"}


def test_params_without_a_json_schema_are_told_before_anything_is_served():
    with pytest.raises(BackendError, match=r"params 'test_agents_http:Odder': it has no JSON schema: "):
        load(ServerConfig(models=[agent("one", "drawing", params=f"{HERE}:Odder")]), lambda record: None)


class Odd:
    """A value whose numbers cannot be had."""

    shape = (1,)

    def tolist(self):
        raise RuntimeError("sparse")


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}, [1 << 20_000], Odd(), Image.new("F", (1, 1)), b"a", {1}])
def test_what_json_has_no_form_for_is_left_out(value):
    told, left_out = plain_state({"good": "ü", "odd": value})
    assert json.dumps(told, ensure_ascii=False).encode() and (told, left_out) == ({"good": "ü"}, ["odd"])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"name": "a", "kind": "agent"}, "an agent is made by graph: module:function"),
        (agent("a", "small", path="here"), "of no path and no backend"),
        ({"name": "a", "kind": "text", "path": "here", "graph": "a:b"}, "graph and params are of agents"),
        ({"name": "a", "kind": "agent", "graph": "no function"}, "graph"),
    ],
)
def test_what_is_no_agent_in_a_config(raw, why):
    with pytest.raises(ValueError, match=why):
        ServerConfig(models=[raw])
