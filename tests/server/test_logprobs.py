"""Log-probabilities and echoed prompts over HTTP: OpenAI's forms, the stock model's numbers."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
torch = pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from serving import serving, stock, text_service  # noqa: E402

from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.backends.transformers.likelihoods import Likelihood  # noqa: E402
from neustream.server.likelihoods import Names, Place, of_chat, of_completion  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture(scope="module")
def url(model):
    with serving(partial(text_service, model)) as (url, said, _):
        said.get(timeout=60)
        yield url


@pytest.fixture
def theirs(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@torch.inference_mode()
def logs_of(model, ids):
    """Log-probabilities [tokens, vocabulary] behind each token, of one stock call."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_completions_tell_what_the_stock_model_thinks(theirs, model):
    done = theirs.completions.create(
        model="tiny", prompt="Once", max_tokens=6, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    (choice,) = done.choices
    told = choice.logprobs
    prompt = list(b"Once")
    ids = [*prompt, *map(_id, told.tokens)]
    logs = logs_of(model, ids)
    for at, (token, logprob) in enumerate(zip(told.tokens, told.token_logprobs, strict=True)):
        row = logs[len(prompt) - 1 + at]
        assert logprob == pytest.approx(float(row[_id(token)]), abs=2e-4) == told.top_logprobs[at][token]
        assert 3 <= len(told.top_logprobs[at]) <= 4
        assert max(told.top_logprobs[at].values()) == pytest.approx(float(row.max()), abs=2e-4)
    assert told.text_offset[0] == 0 and sorted(told.text_offset) == told.text_offset


def _id(name):
    """The byte that the tokenizer without files makes a token of."""
    return int(name[8:], 16) if name.startswith("bytes:") else ord(name)


def test_chats_tell_bytes_and_tops(theirs):
    done = theirs.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    for one in content:
        assert len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob
        assert len(one.bytes) == 1 or not one.bytes
    without = theirs.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0, logprobs=True
    )
    assert [one.top_logprobs for one in without.choices[0].logprobs.content] == [[]] * len(content)
    assert without.choices[0].message.content == done.choices[0].message.content


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_tell_the_same(client, path):
    body = {**ASK, "logprobs": 2, "echo": True}
    if "chat" in path:
        chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
        body = {**{name: ASK[name] for name in ("max_tokens", "temperature", "ignore_eos")}, **chat}
    whole = client.post(path, json=body).json()["choices"][0]["logprobs"]
    lines = client.post(path, json={**body, "stream": True}).text.splitlines()
    parts = [json.loads(line[6:])["choices"][0]["logprobs"] for line in lines if line.startswith("data: {")]
    joined = {name: [one for part in parts for one in part[name] or ()] for name in whole if name != "refusal"}
    for name, values in joined.items():
        assert values == whole[name]


def test_an_echo_comes_before_the_text_and_its_tokens_are_told_of(client, model):
    plain = client.post("/v1/completions", json=ASK).json()["choices"][0]
    echoed = client.post("/v1/completions", json={**ASK, "echo": True}).json()["choices"][0]
    assert echoed["text"] == "Once" + plain["text"] and echoed["logprobs"] is None
    told = client.post("/v1/completions", json={**ASK, "echo": True, "logprobs": 1}).json()["choices"][0]
    logs = told["logprobs"]
    assert logs["tokens"][:4] == list("Once") and logs["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
    rows = logs_of(model, list(b"Once"))
    for at, token in enumerate(b"nce"):
        assert logs["token_logprobs"][at + 1] == pytest.approx(float(rows[at][token]), abs=2e-4)


def test_an_echo_alone_is_no_generation(client, model):
    body = {"prompt": [[79, 110], [99]], "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    done = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in done["choices"]] == ["On", "c"]
    assert done["usage"]["completion_tokens"] == 0 and done["choices"][0]["finish_reason"] == "length"
    first, second = (choice["logprobs"]["token_logprobs"] for choice in done["choices"])
    assert first[0] is None and second == [None]
    assert first[1] == pytest.approx(float(logs_of(model, [79])[0][110]), abs=2e-4)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("/v1/completions", {"logprobs": 21}, "less than or equal to 20"),
        ("/v1/completions", {"logprobs": -1}, "greater than or equal to 0"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "needs logprobs: true"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 1000}, "less than or equal to 20"),
        ("/v1/chat/completions", {"logprobs": 2}, "logprobs"),
    ],
)
def test_what_cannot_be_told_is_named(client, path, more, message):
    body = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    answer = client.post(path, json={**body, **more})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


# -- forms --------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer of three tokens: a letter, and two halves of one."""

    def decode(self, ids):
        return {0: "a", 1: "\ufffd", 2: "\ufffd"}[ids[0]]

    def convert_ids_to_tokens(self, id):
        return {0: "a", 1: "<0xC3>", 2: "\u00c3\u0142"}[id]


def test_parts_of_characters_are_called_by_their_bytes():
    names = Names(Pieces())
    assert [names.text(id) for id in range(3)] == ["a", "bytes:\\xc3", "bytes:\\xc3\\xa0"]
    assert [names.raw(id) for id in range(3)] == [[97], [0xC3], [0xC3, 0xA0]]
    assert Names(Pieces(), as_ids=True).text(1) == "token_id:1"
    assert Names(None).text(7) == "token_id:7" and Names(None).raw(7) is None
    assert Names(byte_tokenizer()).text(200) == "bytes:\\xc8"


def test_no_chance_at_all_is_a_number_too():
    names = Names(Pieces())
    places = [Place(0, 0, None), Place(1, 1, Likelihood(1, -math.inf, ((0, -0.5), (2, -math.inf))))]
    found = of_completion(names, places)
    assert found["token_logprobs"] == [None, -9999.0]
    assert list(found["top_logprobs"][1]) == ["a", "bytes:\\xc3\\xa0", "bytes:\\xc3"]
    json.dumps(found, allow_nan=False)
    (one,) = of_chat(names, places)["content"]
    assert one["logprob"] == -9999.0 and [top["token"] for top in one["top_logprobs"]] == ["a", "bytes:\\xc3\\xa0"]
