"""The benchmarks of the HTTP front: what they make of answers, without a server."""

from __future__ import annotations

import asyncio
import importlib
import random
import sys
from collections import Counter

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
NAMES = ("http_load", "soak", "harness")


@pytest.fixture(scope="module")
def modules(root):
    pytest.importorskip("torch", reason="needs the extra 'llm'")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(root / "benchmarks")
        yield [importlib.import_module(name) for name in NAMES]
        for name in NAMES:
            del sys.modules[name]


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "fate"),
    [
        (CHUNKED + b"data: [DONE]\n\n" + END, "done"),
        (CHUNKED + b"data: [DONE]\n\n", "broken"),
        (CHUNKED + b'data: {"error": {}}\n\n', "cut"),
        (CHUNKED + b'data: {"x": 1}\n\n' + END, "broken"),
        (OK + b'content-length: 9\r\n\r\n{"usage":', "done"),
        (OK + b'content-length: 90\r\n\r\n{"usage":', "broken"),
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 2\r\n\r\n{}", "429"),
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 3\r\n\r\n{}", "broken"),
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nInvalid", "400"),
        (b"", "closed"),
    ],
)
def test_what_became_of_a_request(modules, raw, fate):
    load, soak, _ = modules
    assert soak.fate(load.Heard(raw)) == fate
    assert soak.fate(load.Heard(raw, left=True)) == "left" and soak.fate(load.Heard(raw, lost=True)) == "lost"


def tally(soak, ended, hostile=(), memory=(100,) * 20):
    ended, hostile = Counter(ended), Counter(hostile)
    return soak.Tally(ended.total() + hostile.total(), ended, hostile, list(memory))


NOTHING = {"tasks": 3.0, "KV slots": 0.0}


@pytest.mark.parametrize(
    ("ended", "hostile", "memory", "after", "answered", "message"),
    [
        ({"done": 5, "429": 2, "left": 1, "cut": 1}, {"400": 2}, (100,) * 20, {}, 9, None),
        ({"done": 5, "lost": 1}, {}, (100,) * 20, {}, 6, "1 requests lost"),
        ({"done": 5, "broken": 1}, {}, (100,) * 20, {}, 6, "1 requests broken"),
        ({"done": 5, "closed": 1}, {}, (100,) * 20, {}, 6, "got nothing"),
        ({"done": 5, "500": 1}, {}, (100,) * 20, {}, 6, "got 500"),
        ({"done": 5}, {"503": 1}, (100,) * 20, {}, 5, "hostile requests got 503"),
        ({"done": 5}, {}, (100,) * 18 + (103,) * 2, {}, 5, "memory grew by 3.0%"),
        ({"done": 5}, {}, (100,) * 20, {"tasks": 4.0}, 5, "tasks: 3 before, 4 after"),
        ({"done": 5}, {}, (100,) * 20, {"KV slots": 1.0}, 5, "KV slots: 0 before, 1 after"),
        ({"done": 5}, {}, (100,) * 20, {}, 4, "the server counts 4 answers"),
        ({"done": 5}, {}, (100,) * 20, {}, 6, "the server counts 6 answers"),
    ],
)
def test_a_soak_finds_what_should_not_be(modules, ended, hostile, memory, after, answered, message):
    _, soak, _ = modules
    found = soak.faults(tally(soak, ended, hostile, memory), NOTHING, {**NOTHING, **after}, answered)
    assert (found == []) if message is None else (len(found) == 1 and message in found[0])


def test_requests_are_what_they_say(modules):
    load, soak, _ = modules
    rng = random.Random(1)
    for make in soak.HOSTILE:
        assert isinstance(make(rng), bytes)
    request = soak.texts(rng, promised=True)
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head and b"connection: close" in head
    assert load.total({'neustream:x{a="1"}': 2.0, 'neustream:x{a="2"}': 3.0, "neustream:xy": 9.0}, "x", 'a="2"') == 3.0


def test_counts_agree_but_for_a_look_or_two(modules):
    *_, harness = modules
    count = harness.Count
    assert harness.same(count(40, 0, 640), count(41, 0, 656), looks=2)
    assert not harness.same(count(40, 0, 640), count(39, 0, 640), looks=2)
    assert not harness.same(count(40, 0, 640), count(40, 1, 640), looks=2)
    assert not harness.same(count(40, 0, 640), count(40, 0, 641), looks=2)
    assert not harness.same(count(40, 0, 640), count(43, 0, 688), looks=2)


def test_what_is_known_of_a_lost_request_is_told(modules, tmp_path):
    load, soak, _ = modules
    request = soak.named(soak.post("/v1/completions", {"prompt": "x"}, {"x-slo-class": "chat"}), "soak-7")
    assert request.startswith(b"POST /v1/completions HTTP/1.1\r\nx-request-id: soak-7\r\n")
    count = soak.Tally()
    count.count(load.Heard(b"", lost=True, tokens=2, first_s=1.0, last_s=2.5, whole_s=152.5), False, "soak-7", request)
    count.count(load.Heard(b"", lost=True), True)
    assert count.longest == {"text, chat": 152.5} and list(count.lost) == ["soak-7"]
    log = tmp_path / "log"
    log.write_text('{"id": "soak-70-ab"}\n{"id": "soak-7-cd", "status": 200}\n')
    (told,) = soak.told_of(count.lost, log)
    assert told == (
        'soak-7, text, chat: {"prompt": "x"}; 2 tokens, the first after 1.0 s, the last after 2.5 s; '
        'the server: {"id": "soak-7-cd", "status": 200}'
    )
    (told,) = soak.told_of({"soak-8": "text"}, log)
    assert told.endswith("the server: nothing")


def test_a_request_is_lost_after_a_silence_and_not_while_tokens_come(modules):
    load, *_ = modules

    async def main(gaps):
        async def handle(reader, writer):
            try:
                for gap in gaps:
                    await asyncio.sleep(gap)
                    writer.write(b'"choices": [{')
                await asyncio.sleep(30)
            finally:
                writer.close()

        server = await asyncio.start_server(handle, load.HOST, 0)
        heard = await load.ask(server.sockets[0].getsockname()[1], b"GET", patience_s=0.4)
        server.close()
        return heard

    heard = asyncio.run(main([0.15] * 4))
    assert heard.lost and heard.tokens == 4 and heard.whole_s >= heard.last_s >= 0.6 > 0.4
    heard = asyncio.run(main([0.0, 30.0]))
    assert heard.lost and heard.tokens == 1
