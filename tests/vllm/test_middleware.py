"""Drops as errors on vLLM's own HTTP server, by the answers that it gives."""

from __future__ import annotations

import asyncio
import json

import pytest

from neustream.backends.vllm.middleware import HonestDrops

DROP = {"finish_reason": "abort", "stop_reason": "slo: hopeless: it needs 5 s"}


def chunk(**choice):
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}, separators=(",", ":")).encode() + b"\n\n"


def whole(*choices):
    return json.dumps({"choices": list(choices), "usage": {}}, separators=(",", ":")).encode()


def through(*bodies, path="/v1/completions", status=200):
    """What a client gets of an answer with these bodies: status, headers, all of them, and whether it ended."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": [(b"x", b"y")]})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message):
        sent.append(message)

    asyncio.run(HonestDrops(app)({"type": "http", "path": path}, None, send))
    start, *rest = sent
    assert start["type"] == "http.response.start" and all(each["type"] == "http.response.body" for each in rest)
    ended = not rest[-1].get("more_body")
    return start["status"], dict(start["headers"]), b"".join(each["body"] for each in rest), ended


@pytest.mark.parametrize(
    "bodies",
    [
        [chunk(text="", **DROP), b"data: [DONE]\n\n"],
        [chunk(delta={"role": "assistant", "content": ""}), chunk(delta={}, **DROP), b"data: [DONE]\n\n"],
        [whole({"text": "", **DROP})],
        [whole({"message": {"role": "assistant", "content": ""}, **DROP})],
        [whole({"text": "", "finish_reason": None}, {"text": "", **DROP})],
    ],
)
def test_a_drop_before_the_first_token_is_429(bodies):
    status, headers, body, ended = through(*bodies)
    assert status == 429 and headers[b"retry-after"] == b"1" and ended
    assert json.loads(body)["error"]["message"] == "hopeless: it needs 5 s"
    assert headers[b"content-length"] == b"%d" % len(body)


def test_what_could_not_be_kept_even_alone_is_400():
    drop = {**DROP, "stop_reason": "slo: hopeless: it needs 5 s (even alone)"}
    for bodies in ([chunk(text="", **drop), b"data: [DONE]\n\n"], [whole({"text": "", **drop})]):
        status, headers, body, ended = through(*bodies)
        error = json.loads(body)["error"]
        assert (status, error["code"], error["message"]) == (400, "unattainable", "hopeless: it needs 5 s") and ended
        assert headers[b"x-should-retry"] == b"false"


def test_a_drop_behind_it_is_504_or_an_error_and_a_cut():
    status, headers, body, ended = through(whole({"text": "abc", **DROP}))
    assert status == 504 and headers[b"x-should-retry"] == b"false" and ended
    first = chunk(text="a", finish_reason=None)
    status, headers, body, ended = through(first, chunk(text="", **DROP), b"data: [DONE]\n\n")
    assert status == 200 and headers == {b"x": b"y"} and not ended
    assert body.startswith(first) and b"DONE" not in body
    assert json.loads(body[len(first) :].removeprefix(b"data: "))["error"]["code"] == "late"


@pytest.mark.parametrize(
    "bodies",
    [
        [chunk(text="a", finish_reason=None), chunk(text="b", finish_reason="length"), b"data: [DONE]\n\n"],
        [chunk(delta={"role": "assistant", "content": ""}), chunk(delta={"content": "a"}), b"data: [DONE]\n\n"],
        [whole({"text": 'say "abort"', "finish_reason": "stop", "stop_reason": "slo: no"})],
        [chunk(text="", finish_reason="abort", stop_reason=None), b"data: [DONE]\n\n"],
        [b"data: [DONE]\n\n"],
        [b'no JSON "abort"'],
        [whole()],
        [],
    ],
)
def test_all_else_is_as_it_was(bodies):
    assert through(*bodies) == (200, {b"x": b"y"}, b"".join(bodies), True)
    assert through(*bodies, status=400) == (400, {b"x": b"y"}, b"".join(bodies), True)


def test_other_routes_are_left_alone():
    body = whole({"text": "", **DROP})
    assert through(body, path="/v1/models") == (200, {b"x": b"y"}, body, True)
