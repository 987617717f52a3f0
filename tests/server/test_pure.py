"""The parts of the server that only think."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from neustream import SLO, BackendError, RequestDropped, RequestError, RequestFailed
from neustream.server.bodies import ChatBody, CompletionBody, ImageBody, unsupported
from neustream.server.config import PromiseConfig
from neustream.server.errors import HTTPError, of_request, of_validation, retry_after
from neustream.server.openapi import document
from neustream.server.promises import promised
from neustream.server.stops import Stops

LETTERS = st.text(alphabet="abc", max_size=30)


# -- stop strings -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4), st.lists(LETTERS, max_size=12))
def test_text_ends_before_the_first_stop_string_wherever_pieces_end(strings, pieces):
    stops, told = Stops(strings), ""
    for piece in pieces:
        told += stops.add(piece)
        if stops.met:
            break
    else:
        told += stops.rest()
    whole = "".join(pieces)
    ends = [whole.find(string) for string in strings if string in whole]
    if not ends:
        assert told == whole and not stops.met
        return
    assert stops.met and not any(string in told for string in strings)
    assert whole.startswith(told)
    # the earliest that was complete when it was seen
    assert len(told) <= max(ends)


def test_no_more_is_held_back_than_may_be_a_stop_string():
    stops = Stops(["END", "stop"])
    assert [stops.add(piece) for piece in ("a", "E", "N", "x", "st", "o")] == ["a", "", "", "ENx", "", ""]
    assert stops.rest() == "sto" and not stops.met
    stops = Stops(["END"])
    assert [stops.add("xEN"), stops.add("DE")] == ["x", ""] and stops.met


# -- promises -----------------------------------------------------------------------------------------


def asked(headers=None, config=None, defaults=None, kind=CompletionBody, **body):
    whole = {"prompt": "x", **body}
    settings = PromiseConfig.model_validate(config or {})
    return promised(headers or {}, kind.model_validate_json(json.dumps(whole)), settings, defaults or SLO())


def test_the_smallest_that_anybody_names_counts_and_replaces_defaults():
    defaults = SLO(total=9.0, first=1.0, step=0.1)
    assert asked(defaults=defaults).slo == defaults
    one = asked({"x-slo-ttft-ms": "2000"}, defaults=defaults).slo
    assert (one.first, one.step, one.total) == (2.0, 0.1, 9.0)  # more than the default, as it was asked
    two = asked({"x-slo-ttft-ms": "2000", "x-slo-tpot-ms": "50"}, slo={"ttft_ms": 500, "tpot_ms": 80.0}).slo
    assert (two.first, two.step) == (0.5, 0.05)
    old = asked({"x-llm-d-slo-ttft-ms": "300"}).slo
    assert old.first == 0.3
    assert asked({"x-slo-ttft-ms": "200", "x-llm-d-slo-ttft-ms": "100"}).slo.first == 0.2
    assert asked(slo_ms=1500, vllm_xargs={"slo_total_ms": 700}).slo.total == 0.7


def test_timeouts_are_promises_and_limits():
    found = asked({"request-timeout-ms": "1500", "grpc-timeout": "2S"})
    assert found.timeout_s == 1.5 == found.slo.total
    assert asked({"grpc-timeout": "250m"}).timeout_s == 0.25
    assert asked().timeout_s == math.inf


def test_a_pace_alone_gets_a_first_token():
    found = asked({"x-slo-tpot-ms": "40"}, {"fallback_ttft_ms": 5000})
    assert (found.slo.first, found.slo.step) == (5.0, 0.04)


def test_classes_floors_and_weights_are_the_operators():
    config = {
        "classes": {"chat": {"ttft_ms": 300, "tpot_ms": 50, "weight": 2.0, "floor": {"ttft_ms": 100}}},
        "max_weight": 3.0,
    }
    found = asked({"x-slo-class": "chat"}, config)
    assert found.slo == SLO(first=0.3, step=0.05, weight=2.0, name="chat")
    tight = asked({"x-slo-class": "chat", "x-slo-ttft-ms": "1", "x-slo-weight": "50"}, config)
    assert (tight.slo.first, tight.slo.weight) == (0.1, 3.0) and "floor of 100" in tight.warnings[0]
    assert tight.warnings[1] == "weight 50 is above the most, 3"
    assert tight.header == "ttft=100;tpot=50;e2e=inf;class=chat"
    with pytest.raises(HTTPError, match=r"slo\.class: no class 'chats'; classes: chat"):
        asked(config=config, slo={"class": "chats"})
    assert asked({"x-slo-class": "nope"}, config).warnings == ["x-slo-class: no such class"]


@pytest.mark.parametrize("value", ["", "0", "-5", "nan", "inf", "1e3", "5 s", "9" * 20, "٣", "86400001"])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-e2e-ms", "request-timeout-ms", "x-slo-weight"])
def test_a_wrong_header_is_told_and_changes_nothing(name, value):
    found = asked({name: value})
    assert found.slo == SLO() and len(found.warnings) == 1 and found.warnings[0].startswith(name)


@pytest.mark.parametrize(
    "body",
    [
        {"slo": {"ttft_ms": 0}},
        {"slo": {"ttft_ms": -1}},
        {"slo": {"ttft_ms": "5"}},
        {"slo": {"ttft_ms": True}},
        {"slo": {"e2e_ms": 86_400_001}},
        {"slo": {"ttft": 5}},
        {"slo": 5},
        {"slo_ms": 0},
    ],
)
def test_a_wrong_promise_in_a_body_is_refused(body):
    with pytest.raises(ValidationError):
        asked(**body)


def test_an_image_has_no_tokens():
    assert asked({"x-slo-ttft-ms": "5", "x-slo-e2e-ms": "900"}, kind=ImageBody).slo == SLO(total=0.9)
    assert asked({"x-slo-ttft-ms": "5"}, kind=ImageBody).warnings == ["x-slo-ttft-ms: an image has no tokens"]
    with pytest.raises(HTTPError, match="an image has no tokens"):
        asked(kind=ImageBody, slo={"tpot_ms": 5})


# -- bodies and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("{", "body"),
        ("[]", "body"),
        ("[" * 100_000, "body"),
        ('{"prompt": "x", "n": ' + "9" * 6000 + "}", "body"),
        ('{"prompt": "\\ud800"}', "body"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x", "temperature": Infinity}', "temperature"),
        ('{"prompt": "x", "stream": 0}', "stream"),
        ('{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
        ('{"prompt": "x", "n": 17}', "n"),
        ('{"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}', "stop"),
        ('{"prompt": "x", "stop": ""}', "stop"),
        ('{"prompt": [1, "a"]}', "prompt.ids.1"),
        ('{"prompt": [[1], []]}', "prompt.many.1"),
        ('{"prompt": [-1]}', "prompt.ids.0"),
        ('{"prompt": null}', "prompt.text"),
        ("{}", "prompt"),
    ],
)
def test_what_is_no_body_names_the_field(text, param):
    with pytest.raises(ValidationError) as raised:
        CompletionBody.model_validate_json(text.encode())
    error = of_validation(raised.value)
    assert error.status == 400 and error.param == param and len(error.message) < 3000
    json.dumps(error.body, allow_nan=False)


def test_prompts_have_four_forms():
    def prompts(value):
        return CompletionBody.model_validate_json(json.dumps({"prompt": value})).prompts

    assert prompts("a") == ["a"] and prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]] and prompts([[1], [2, 3]]) == [[1], [2, 3]]


def test_parts_of_a_message_are_one_text():
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert ChatBody.model_validate_json(json.dumps(body)).messages[0].text == "ab"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"logprobs": None, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "best_of": 1}, None),
        ({"response_format": {"type": "text"}, "repetition_penalty": 1.0, "echo": False}, None),
        ({"anything": 5}, None),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_values_that_mean_nothing_are_taken_and_others_named(more, name):
    body = CompletionBody.model_validate_json(json.dumps({"prompt": "x", **more}))
    assert unsupported(body) == name


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (RequestError("bad"), 400, None),
        (RequestError("many", code="too_many", retry_after_s=2.2), 429, ("retry-after", "3")),
        (RequestError("closed", code="closed"), 503, ("retry-after", "1")),
        (
            RequestDropped("r was dropped: no", reason="no", code="crowded", retry_after_s=500),
            429,
            ("retry-after", "60"),
        ),
        (RequestDropped("r", reason="no", code="unattainable"), 400, None),
        (RequestDropped("r", reason="no", code="late"), 504, ("x-should-retry", "false")),
        (RequestFailed("r", reason="boom"), 500, ("x-should-retry", "false")),
        (BackendError("x"), 400, None),
        (ValueError("height has to be divisible by 8"), 400, None),
        (ZeroDivisionError("secret"), 500, ("x-should-retry", "false")),
    ],
)
def test_each_error_has_a_status(error, status, header):
    found = of_request(error)
    assert found.status == status and "secret" not in found.message
    assert header is None or found.all_headers[header[0]] == header[1]


@settings(deadline=None)
@given(st.one_of(st.none(), st.floats()))
def test_clients_are_told_whole_seconds_that_they_obey(seconds):
    assert 1 <= retry_after(seconds) <= 60


def test_the_document_has_all_routes_and_no_loose_ends():
    text = json.dumps(document())
    from neustream.server.app import ROUTES

    found = document()
    assert {route.path for route in ROUTES if not route.path.startswith("/ui")} == set(found["paths"])
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in found["components"]["schemas"]


@pytest.mark.parametrize("name", ["stream", "echo", "ignore_eos", "return_tokens_as_token_ids"])
def test_a_switch_that_is_null_is_off_and_a_word_is_none(name):
    assert getattr(CompletionBody.model_validate({"prompt": "a", name: None}), name) is False
    assert getattr(CompletionBody.model_validate({"prompt": "a", name: True}), name) is True
    with pytest.raises(ValidationError):
        CompletionBody.model_validate_json(json.dumps({"prompt": "a", name: "perhaps"}))
