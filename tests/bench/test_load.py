"""Load on a server that misbehaves: each way of it is a failure of its own kind, or none."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("httptools", reason="needs the extra 'bench'")
from stub import ANSWERS, TOKENS, Stub

from neustream.bench import Plan, Record, Target
from neustream.bench.load import Load, Options, split
from neustream.errors import BackendError, ConfigError
from neustream.workload.asks import Ask, ImageAsk, Limits


@pytest.fixture(scope="module")
def stub():
    with Stub() as running:
        yield running


def play(stub, *asks, options=None, target=None, **plan) -> list[Record]:
    target = target or Target(stub.url, ignore_eos=True, timeout_s=60.0)
    return Load(Plan(list(asks), **plan), target, options).run().records


def one(stub, model, *, at=0.0, api="completions", image=None, params={}, **target) -> Record:
    ask = Ask("a", at, "hi", output_tokens=None if image else TOKENS, model=model, image=image, params=params)
    (record,) = play(stub, ask, target=Target(stub.url, api, **{"timeout_s": 60.0, "ignore_eos": True, **target}))
    return record


FINE = [
    "good",
    "no_done",
    "no_usage",
    "no_finish_reason",
    "crlf",
    "cr",
    "comments",
    "no_space",
    "many_lines",
    "named_events",
    "byte_by_byte",
    "one_piece",
    "double_done",
    "error_after_done",
    "until_close",
    "http10",
    "continue",
    "empty_last_token",
    "empty_token",
    "choices_in_turn",
    "usage_on_each",
    "early_hints",
    "wild_usage",
]
CHATS = ["chat", "chat_role_apart", "chat_role_on_first", "chat_thoughts", "chat_tool_calls"]
NO_USAGE = {"no_usage", "no_finish_reason", "wild_usage"}
FAILED = {
    "error_then_done": "error_event",
    "error_then_cut": "error_event",
    "error_event_named": "error_event",
    "error_of_no_letters": "error_event",
    "error_in_200": "not_a_stream",
    "gzip": "not_a_stream",
    "cut": "cut",
    "ends_early": "cut",
    "cut_at_once": "cut",
    "nothing": "cut",
    "bad_chunk": "cut",
    "done_only": "no_token",
    "usage_only": "no_token",
    "short": "short",
    "not_json": "invalid_json",
    "not_utf8": "invalid_json",
    "no_object": "invalid_json",
    "deep": "invalid_json",
    "html": "not_a_stream",
    "no_type": "not_a_stream",
    "html_500": "status",
    "redirect": "status",
    "s429": "status",
    "s503": "status",
    "s404": "status",
    "s204": "not_a_stream",
    "no_http": "connect",
    "hang_up": "connect",
}


def test_each_answer_is_tried():
    whole = {name for name in ANSWERS if name.startswith("whole") or "image" in name}
    assert {*FINE, *CHATS, *FAILED} | whole == set(ANSWERS)


@pytest.mark.parametrize("model", FINE)
def test_streams_as_the_standard_allows_them_are_read(stub, model):
    record = one(stub, model)
    assert (record.outcome, record.error) == ("done", "")
    assert record.output_tokens == len(record.token_times_s) == TOKENS
    assert record.counted_by == ("chunks" if model in NO_USAGE else "usage")
    assert json.dumps(record.to_dict(), allow_nan=False)
    assert record.sent_s <= record.token_times_s[0] <= record.token_times_s[-1] <= record.end_s


@pytest.mark.parametrize("model", CHATS)
def test_of_chats_only_tokens_are_timed(stub, model):
    record = one(stub, model, api="chat")
    assert record.outcome == "done" and len(record.token_times_s) == record.output_tokens == TOKENS


@pytest.mark.parametrize(("model", "outcome"), FAILED.items())
def test_failures_are_told_apart(stub, model, outcome):
    record = one(stub, model)
    assert record.outcome == outcome and record.error and not record.met()
    assert "\n" not in record.error and record.end_s is not None


@pytest.mark.parametrize(
    ("model", "status", "code", "error"),
    [
        ("s429", 429, "too_many", "queue full"),
        ("s503", 503, "too_many", "loading"),
        ("s404", 404, "", "Not Found"),
        ("html_500", 500, "", "status 500 Internal Server Error"),
        ("redirect", 307, "", "status 307 Temporary Redirect"),
        ("error_then_cut", 200, "failed", "out of memory"),
        ("error_of_no_letters", 200, "?", "no ??[31m? room"),
        ("gzip", 200, "", "the answer is in gzip, which was not asked for"),
    ],
)
def test_what_the_server_says_of_a_failure_is_kept(stub, model, status, code, error):
    record = one(stub, model)
    assert (record.status, record.code) == (status, code) and error in record.error


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("whole", "done"),
        ("whole_not_json", "invalid_json"),
        ("whole_cut", "cut"),
        ("whole_empty", "no_token"),
        ("whole_message", "done"),
        ("whole_gzip", "not_a_stream"),
    ],
)
def test_an_answer_in_one_piece(stub, model, outcome):
    record = one(stub, model, stream=False)
    assert record.outcome == outcome
    assert record.token_times_s == ([record.end_s] if outcome == "done" else [])


@pytest.mark.parametrize(
    ("model", "streamed", "outcome", "count"),
    [
        ("image", False, "done", 1),
        ("no_image", False, "no_token", 0),
        ("image_stream", True, "done", 1),
        ("image_stream_cut", True, "cut", 0),
        ("s429", False, "status", 0),
    ],
)
def test_images(stub, model, streamed, outcome, count):
    record = one(stub, model, image=ImageAsk(512, 256, 20), params={"stream": True} if streamed else {})
    assert (record.kind, record.outcome, record.images) == ("image", outcome, count)
    asked = stub.log[-1]
    assert asked.path == "/v1/images/generations"
    assert (asked.body["size"], asked.body["num_inference_steps"], asked.body["n"]) == ("512x256", 20, 1)
    assert "max_tokens" not in asked.body


def test_without_ignore_eos_a_short_text_is_done(stub):
    assert one(stub, "short", ignore_eos=False).outcome == "done"


@pytest.mark.parametrize("model", ["stall", "silent"])
def test_who_is_too_slow_has_failed(stub, model):
    record = one(stub, model, timeout_s=0.2)
    assert record.outcome == "timeout" and record.end_s >= 0.2


def test_a_server_that_is_down():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        target = Target(f"http://127.0.0.1:{taken.getsockname()[1]}")
        records = Load(Plan([Ask(str(k), 0.0) for k in range(3)]), target).run().records
    assert Counter(record.outcome for record in records) == {"connect": 3}
    assert all("ConnectionRefusedError" in record.error for record in records)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://[::1"]
)
def test_what_is_no_url_is_named(url):
    with pytest.raises(ConfigError, match="url "):
        Load(Plan([Ask("a", 0.0)]), Target(url)).run()


def test_what_is_sent(stub):
    named = {"slo_class": "chat", "session": "s1", "params": {"top_p": 1}}
    ask = Ask("a", 0.0, (1, 2), output_tokens=4, limits=Limits(0.2, 0.05), **named)
    headers = {"x-slo-ttft-ms": "ttft", "x-slo-e2e-ms": "e2e", "x-slo-class": "class", "x-session": "session"}
    body = {"top_p": 2, "seed": 3}
    target = Target(stub.url + "/base/", model="good", headers={"x-key": "k"}, body=body, told_headers=headers)
    assert play(stub, ask, target=target)[0].done
    asked = stub.log[-1]
    assert asked.path == "/base/v1/completions"
    assert asked.body == {
        "model": "good", "prompt": [1, 2], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "top_p": 1, "seed": 3,
    }  # fmt: skip
    sent = {name: value for name, value in asked.headers.items() if name.startswith("x-")}
    assert sent == {"x-key": "k", "x-slo-ttft-ms": "200", "x-slo-class": "chat", "x-session": "s1"}


def test_connections_are_used_again_unless_their_server_closes_them(stub):
    before = stub.connections
    play(stub, *[Ask(str(k), None, output_tokens=4, model="good") for k in range(5)], concurrency=1)
    assert stub.connections == before + 1
    play(stub, *[Ask(str(k), None, output_tokens=4, model="html") for k in range(5)], concurrency=1)
    assert stub.connections == before + 6


# -- when requests are sent -------------------------------------------------------------------------


def paced(count, gap=0.0, **more):
    arrivals = [None if gap is None else k * gap for k in range(count)]
    return [Ask(str(k), at, "hi", output_tokens=2, model="paced", **more) for k, at in enumerate(arrivals)]


def test_requests_are_sent_when_they_are_due_however_long_others_take(stub):
    stalled = [Ask(f"s{k}", k * 0.05, output_tokens=2, model="silent") for k in range(3)]
    records = play(stub, *stalled, *paced(2, 0.05), target=Target(stub.url, timeout_s=3.0))
    assert [record.scheduled_s for record in records] == [0.0, 0.0, 0.05, 0.05, 0.1]
    assert Counter(record.outcome for record in records) == {"timeout": 3, "done": 2}
    assert all(record.sent_s >= record.scheduled_s for record in records)


def test_a_bound_on_concurrency_makes_requests_late_and_is_no_lag():
    with Stub(first_s=0.1) as slow:
        records = play(slow, *paced(3), concurrency=1)
    assert [record.scheduled_s for record in records] == [0.0] * 3
    late = sorted(record.ttft_s() for record in records)
    assert late[1] > late[0] + 0.1 and late[2] > late[1] + 0.1
    assert max(record.waited_s for record in records) > 0.2
    for record in records:
        assert record.lag_s == pytest.approx(max(0.0, record.sent_s - record.waited_s))


def test_a_closed_loop_counts_from_when_there_was_a_place():
    with Stub(first_s=0.1) as slow:
        records = play(slow, *paced(3, None), concurrency=1)
    assert all(later.scheduled_s >= earlier.end_s for earlier, later in pairwise(records))


def test_a_closed_loop_ends_after_its_duration():
    with Stub(first_s=0.05) as slow:
        records = play(slow, *paced(50, None), concurrency=2, duration_s=0.2)
    assert len(records) < 50 and all(record.done for record in records)


@pytest.mark.parametrize("at", [0.0, None])
def test_turns_of_a_conversation_wait_for_each_other_and_hold_what_was_said(stub, at):
    asks = [Ask(f"{s}.{k}", at, f"q{k}", output_tokens=4, model="good", session=s, follows=f"{s}.{k - 1}" if k else "",
                think_s=0.05 if k else 0.0) for k in range(3) for s in "ab"]  # fmt: skip
    seen = len(stub.log)
    records = play(stub, *asks, concurrency=2 if at is None else None)
    assert all(record.done for record in records)
    for name in "ab":
        turns = [record for record in records if record.session == name]
        for earlier, later in pairwise(turns):
            assert later.scheduled_s >= earlier.end_s + 0.05
    said = " w0 w1 w2 w3"
    assert {served.body["prompt"] for served in stub.log[seen:]} == {"q0", f"q0{said}q1", f"q0{said}q1{said}q2"}


def test_turns_of_a_chat_are_messages(stub):
    first = Ask("a", 0.0, "q0", output_tokens=4, model="chat", session="s")
    play(stub, first, replace(first, id="b", prompt="q1", follows="a"), target=Target(stub.url, "chat"))
    assert [message["role"] for message in stub.log[-1].body["messages"]] == ["user", "assistant", "user"]
    assert stub.log[-1].body["max_completion_tokens"] == 4


def test_behind_a_turn_that_failed_the_others_are_blocked(stub):
    first = Ask("a", 0.0, model="s503", session="s")
    asks = [first, replace(first, id="b", follows="a"), replace(first, id="c", follows="b")]
    outcomes = {record.id: record.outcome for record in play(stub, *asks)}
    assert outcomes == {"a": "status", "b": "blocked", "c": "blocked"}


def test_a_turn_that_follows_nobody_is_named(stub):
    with pytest.raises(ConfigError, match="'a' follows 'x'; expected"):
        play(stub, Ask("a", 0.0, follows="x"))


def test_retries_keep_the_scheduled_arrival(stub):
    seen = len(stub.log)
    (record,) = play(stub, Ask("a", 0.01, model="s503"), target=Target(stub.url, retries=2))
    assert len(stub.log) == seen + 3
    assert (record.outcome, record.retries, record.scheduled_s, record.lag_s) == ("status", 2, 0.01, 0.0)


def test_texts_are_kept_if_asked_for_and_counted_by_a_counter(stub):
    record = one(stub, "no_usage")
    assert record.text == ""
    options = Options(counting=Words, keep=True)
    (record,) = play(stub, Ask("a", 0.0, output_tokens=4, model="no_usage"), options=options)
    assert (record.text, record.output_tokens, record.counted_by) == (" w0 w1 w2 w3", 4, "tokenizer")


class Words:
    def __call__(self, text):
        return len(text.split())


# -- several processes, interruptions ---------------------------------------------------------------


def test_several_processes_play_one_plan(stub):
    run = Load(Plan(paced(12, 0.01)), Target(stub.url, ignore_eos=True), Options(workers=2)).run()
    assert run.client["processes"] == 2 and run.client["events"] == 24
    assert sorted(record.id for record in run.records) == sorted(str(k) for k in range(12))
    assert [record.scheduled_s for record in run.records] == pytest.approx([k * 0.01 for k in range(12)])
    assert all(record.done for record in run.records)


def test_a_plan_is_shared_out_by_conversations():
    asks = [Ask(f"{s}{k}", 0.0, follows=f"{s}{k - 1}" if k else "") for k in range(3) for s in "abc"]
    parts = split(Plan(asks, concurrency=3), 2)
    assert [" ".join(ask.id for ask in part.asks) for part in parts] == ["a0 c0 a1 c1 a2 c2", "b0 b1 b2"]
    assert [part.concurrency for part in parts] == [2, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_there_is_kept_when_it_is_interrupted(stub, workers):
    asks = [*paced(4), *(Ask(f"s{k}", 0.0, output_tokens=2, model="stall") for k in range(4)), Ask("z", 3600.0)]
    ended = threading.Semaphore(0)
    load = Load(Plan(asks), Target(stub.url), Options(workers=workers), lambda record: ended.release())
    runs = []
    thread = threading.Thread(target=lambda: runs.append(load.run()))
    seen = len(stub.log)
    thread.start()
    while sum(served.sent != [] or served.body["model"] == "stall" for served in stub.log[seen:]) < 8:
        thread.join(0.01)
    if workers == 1:
        for _ in range(4):
            ended.acquire()
    load.interrupt()
    thread.join()
    (run,) = runs
    assert run.interrupted and len(run.records) == 8
    assert {record.outcome for record in run.records if record.id.startswith("s")} == {"interrupted"}
    assert all(record.end_s is not None for record in run.records)


def test_interrupted_before_it_began(stub):
    load = Load(Plan([Ask("z", 3600.0)]), Target(stub.url))
    load.interrupt()
    run = load.run()
    assert run.interrupted and run.records == []


def test_a_process_of_the_client_that_dies_is_told(stub):
    with pytest.raises(BackendError, match="a process of the client died"):
        Load(Plan(paced(2)), Target(stub.url), Options(2, counting=Dying)).run()


class Dying:
    def __init__(self):
        raise SystemExit(3)
