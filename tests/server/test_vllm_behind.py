"""A vLLM engine behind the routes. The engine here is a stand-in; `tests/vllm/test_front.py` has a real one."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, stock, text_service, until  # noqa: E402

from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.backends.vllm.served import VLLMEngine  # noqa: E402
from neustream.engine.clock import WallClock  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402
from neustream.server.models import TextModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"model": "theirs", "prompt": "ab", "max_tokens": 4, "temperature": 0}


def probability(logprob, rank):
    return SimpleNamespace(logprob=logprob, rank=rank)


class Stand:
    """As `AsyncLLM`: says the prompt's letters again; `ends` says after how many tokens, and why."""

    def __init__(self):
        self.errored = False
        self.asked = {}
        self.aborted = []
        self.ends = {}
        self.hold = threading.Event()
        self.hold.set()
        self.closed = False

    async def generate(self, prompt, params, id):
        self.asked[id] = prompt, params
        try:
            ids = prompt["prompt_token_ids"]
            for at in range(params["max_tokens"]):
                while not self.hold.is_set():
                    await asyncio.sleep(0.005)
                if self.errored:
                    raise RuntimeError("the engine core died")
                if at in self.ends:
                    yield self.output([], "", "abort", self.ends[at])
                    return
                last = at + 1 == params["max_tokens"]
                token = ids[at % len(ids)]
                told = {token: probability(-0.5, 2), 65: probability(-0.25, 1)}
                yield self.output([token], chr(token), "length" if last else None, None, ids, [told])
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(id)
            raise

    def output(self, tokens, text, finish, stop, ids=(), logprobs=None):
        best = SimpleNamespace(token_ids=tokens, text=text, finish_reason=finish, stop_reason=stop, logprobs=logprobs)
        scores = [None, *[{id: probability(-1.5, 1)} for id in ids[1:]]]
        return SimpleNamespace(outputs=[best], prompt_logprobs=scores)

    def shutdown(self):
        self.closed = True


def behind(stand, model, metrics):
    """A service of ours, and theirs beside it."""
    ours = text_service(model, metrics)
    engine = stand.engine = VLLMEngine(
        stand, "theirs", dict, vocabulary=257, max_len=64, clock=WallClock(), observer=metrics
    )
    return Loaded(ours.service, [*ours.models, TextModel("theirs", byte_tokenizer(), 64, 257, own=engine)])


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture
def running(model):
    stand = Stand()
    with serving(partial(behind, stand, model)) as (url, said, stop):
        assert said.get(timeout=60) == "ready: tiny, theirs"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield stand, client, stop


def test_texts_are_those_of_the_engine(running):
    stand, client, stop = running
    headers = {"x-slo-ttft-ms": "5000", "x-slo-tpot-ms": "500"}
    done = client.post("/v1/completions", json={**ASK, "seed": 3, "top_p": 0.5}, headers=headers)
    assert done.json()["choices"][0]["text"] == "abab" and done.json()["usage"]["completion_tokens"] == 4
    assert done.headers["x-neustream-outcome"] == "on_time"
    prompt, params = next(iter(stand.asked.values()))
    assert prompt == {"prompt_token_ids": [97, 98]}
    assert params["extra_args"] == {"slo_ttft_ms": 5000.0, "slo_tpot_ms": 500.0, "slo_weight": 1.0}
    assert (params["seed"], params["top_p"], params["temperature"]) == (3, 0.5, 0.0)
    lines = client.post("/v1/completions", json={**ASK, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == "abab" and chunks[-1]["finish_reason"] == "length"
    assert client.post("/v1/completions", json={**ASK, "model": "tiny"}).json()["model"] == "tiny"
    kinds = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert kinds["theirs"]["max_model_len"] == 64
    text = client.get("/metrics").text
    counted = [line for line in text.splitlines() if line.startswith("neustream:requests_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == 3  # two of theirs, one of ours
    assert stop() == 0 and stand.closed


def test_likelihoods_and_echo(running):
    _, client, _ = running
    body = {**ASK, "max_tokens": 1, "logprobs": 1, "echo": True}
    told = client.post("/v1/completions", json=body).json()["choices"][0]
    assert told["text"] == "aba" and told["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]
    assert told["logprobs"]["top_logprobs"][2] == {"A": -0.25, "a": -0.5}


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_prompt_are_requests_of_their_own(running, stream):
    stand, client, _ = running
    body = {**ASK, "n": 3, "seed": 2**63 - 1, "temperature": 1, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    if not stream:
        assert [choice["text"] for choice in answer.json()["choices"]] == ["abab"] * 3
    assert sorted(params["seed"] for _, params in stand.asked.values()) == [0, 1, 2**63 - 1]
    assert not stand.engine.jobs


@pytest.mark.parametrize("stream", [False, True])
def test_choices_whose_time_runs_out_are_given_up(running, stream):
    stand, client, _ = running
    stand.hold.clear()
    answer = client.post(
        "/v1/completions", json={**ASK, "n": 3, "stream": stream}, headers={"request-timeout-ms": "200"}
    )
    stand.hold.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "expired")
    until(lambda: not stand.engine.jobs)
    assert sorted(stand.aborted) == sorted(stand.asked) and len(stand.aborted) == 3
    stand.ends = {1: "slo: hopeless: it needs 5 s"}
    answer = client.post("/v1/completions", json={**ASK, "n": 3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "late")
    until(lambda: not stand.engine.jobs)


def test_a_prompt_that_is_refused_leaves_nothing_of_those_before_it(running):
    stand, client, _ = running
    for _ in range(2):
        body = {**ASK, "prompt": [[97], [97] * 62], "n": 2}
        answer = client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 400 and "62 tokens of prompt" in answer.json()["error"]["message"]
    until(lambda: not stand.engine.jobs)
    text = client.get("/metrics").text
    assert [line for line in text.splitlines() if line.startswith("neustream:requests_total") and "cancelled" in line]


@pytest.mark.parametrize(("after", "status", "code"), [(0, 429, "crowded"), (2, 504, "late")])
def test_drops_carry_their_reason(running, after, status, code):
    stand, client, _ = running
    stand.ends = {after: "slo: hopeless: it needs 5 s"}
    answer = client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"] == "hopeless: it needs 5 s"
    if not after:
        assert client.post("/v1/completions", json={**ASK, "stream": True}).status_code == status
        return
    events = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as stream,
    ):
        events += [line for line in stream.iter_lines() if line]


def test_what_could_not_be_kept_even_alone_is_400(running):
    stand, client, _ = running
    stand.ends = {0: "slo: hopeless: it needs 5 s (even alone)"}
    answer = client.post("/v1/completions", json=ASK)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["message"]) == (400, "unattainable", "hopeless: it needs 5 s")


def test_a_least_length_and_what_becomes_of_late_ones_are_the_engines(model):
    stand = Stand()
    classes = {"soft": {"ttft_ms": 5000, "on_miss": "finish"}}
    with serving(partial(behind, stand, model), promises={"classes": classes}) as (url, said, _):
        said.get(timeout=60)
        body = {**ASK, "min_tokens": 3, "slo": {"class": "soft"}}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        _, params = next(iter(stand.asked.values()))
        assert params["min_tokens"] == 3 and params["extra_args"]["slo_finish"] is True


def test_effective_batching_asks_the_likeliest_tokens(model):
    stand = Stand()

    def alone(metrics):
        both = behind(stand, model, metrics)
        both.service.close()
        return Loaded(None, [both.models[1]])

    with serving(alone) as (url, said, stop):
        assert said.get(timeout=60) == "ready: theirs"
        made = httpx.post(f"{url}/inference", json={"prompt": "ab", "num_tokens": 3}, timeout=60)
        assert made.json() == {"completion": "ababa"}
        assert next(iter(stand.asked.values()))[1]["temperature"] == 0.0
        assert httpx.get(f"{url}/ready", timeout=60).status_code == 200
        assert httpx.get(f"{url}/metrics", timeout=60).status_code == 200
        assert httpx.get(f"{url}/stats", timeout=60).status_code == 404  # there is no service to tell of
        assert stop() == 0


def test_what_vllm_ends_without_a_reason_is_a_failure(running):
    stand, client, _ = running
    stand.ends = {0: None}
    answer = client.post("/v1/completions", json=ASK)
    assert answer.status_code == 500 and "did not say why" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": [999]}, "999 is no token"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_tokens": 63}, "at most max_tokens=62"),
    ],
)
def test_what_cannot_be_served_is_named_before_vllm_is_asked(running, more, message):
    stand, client, _ = running
    answer = client.post("/v1/completions", json={**ASK, **more})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"] and not stand.asked


def test_a_client_that_goes_away_and_a_stop_string_end_the_work(running):
    stand, client, _ = running
    done = client.post("/v1/completions", json={**ASK, "max_tokens": 60, "stop": ["ba"]}).json()["choices"][0]
    assert (done["text"], done["finish_reason"]) == ("a", "stop")
    until(lambda: len(stand.aborted) == 1)
    stand.hold.clear()
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=ASK, timeout=0.3)
    until(lambda: len(stand.aborted) == 2)


def test_an_engine_that_dies_leaves_the_others(running):
    stand, client, _ = running
    stand.errored = True
    assert client.post("/v1/completions", json=ASK).status_code == 503
    told = client.get("/ready")
    assert told.status_code == 503 and told.json()["models"] == {"tiny": "ready", "theirs": "vLLM's engine has died"}
    assert client.post("/v1/completions", json={**ASK, "model": "tiny"}).status_code == 200
