"""The event log, and the Chrome trace that is made of it."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future

import pytest
from toys import batches, draw_and_decode, engine, one_stage, request, table

from neustream import FCFS, SLO, Engine, EventLog, Job, Member, Pool, ProfiledExecutor, Request, Scheduler, VirtualClock
from neustream.core.events import submitted
from neustream.engine.events import Cancel

TOY = {"draw": table("draw", 0.10, 0.15), "decode": table("decode", 0.05)}


@pytest.fixture
def log():
    """Five requests: two on time, one late, one dropped, one cancelled."""
    graph, log = draw_and_decode(), EventLog()
    tested = engine(graph, TOY, FCFS(), observers=[log], executor=ProfiledExecutor(handover_s=0.01))
    tested.clock.post(Cancel("cancelled", Future()), 0.05)
    tested.run(
        [
            request("first", graph, 0.0, steps=2),
            request("second", graph, 0.02, total=math.inf),
            request("dropped", graph, 0.03, total=0.01),
            request("cancelled", graph, 0.04),
            request("late", graph, 10.0, steps=1, total=0.165),
        ]
    )
    return log


def of_kind(trace, kind):
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def test_the_log_keeps_steps_and_requests(log):
    assert batches(log)[:2] == [("draw", ["first"]), ("draw", ["first", "second"])]
    step = log.steps[1]
    assert (step["pool"], step["worker"], step["error"]) == ("gpu", 0, "")
    assert (step["start"], step["end"], step["expected_s"]) == pytest.approx((0.11, 0.27, 0.15))
    assert {id: entry["status"] for id, entry in log.requests.items()} == {
        "first": "done",
        "second": "done",
        "dropped": "dropped",
        "cancelled": "cancelled",
        "late": "done",
    }
    assert log.requests["dropped"]["reason"].startswith("hopeless")
    assert not log.requests["late"]["on_time"]
    assert log.requests["second"]["outputs"] == [log.requests["second"]["end"]]


def test_the_log_holds_no_tensors(log):
    text = json.dumps([log.steps, log.requests, log.waiting], allow_nan=False)
    assert "Job(" not in text


def test_there_is_one_slice_a_step(log):
    slices = of_kind(log.chrome(), "X")
    assert len(slices) == len(log.steps)
    for event, step in zip(slices, log.steps, strict=True):
        assert event["name"] == f"{step['stage']} x{len(step['jobs'])}"
        assert event["ts"] == pytest.approx(step["start"] * 1e6)
        assert event["dur"] == pytest.approx((step["end"] - step["start"]) * 1e6)
        assert event["args"]["jobs"] == step["jobs"]
        assert event["args"]["expected_ms"] == pytest.approx(step["expected_s"] * 1e3)
        assert event["tid"] == step["worker"]


def test_there_is_a_pair_of_events_a_request(log):
    trace = log.chrome()
    begin = {event["id"]: event for event in of_kind(trace, "b")}
    end = {event["id"]: event for event in of_kind(trace, "e")}
    assert begin.keys() == end.keys() == log.requests.keys()
    assert len(of_kind(trace, "b")) == len(of_kind(trace, "e")) == 5
    for id, entry in log.requests.items():
        assert begin[id]["ts"] == pytest.approx(entry["arrival"] * 1e6)
        assert end[id]["ts"] == pytest.approx(entry["end"] * 1e6)
        assert [begin[id][key] for key in ("cat", "name", "pid")] == [end[id][key] for key in ("cat", "name", "pid")]
    assert {id: event["name"] for id, event in begin.items()} == {
        "first": "first: on time",
        "second": "second: on time",
        "dropped": "dropped: dropped",
        "cancelled": "cancelled: cancelled",
        "late": "late: done",
    }


def test_the_counter_follows_the_live_requests(log):
    counts = [(event["ts"], event["args"]["n"]) for event in of_kind(log.chrome(), "C")]
    assert len(counts) == 10
    assert counts == sorted(counts, key=lambda count: count[0])
    assert counts[-1][1] == 0
    assert max(n for _, n in counts) == 4
    assert min(n for _, n in counts) == 0


def test_pools_and_workers_are_named(log):
    graph = draw_and_decode()
    scheduler = Scheduler([Pool("second", ("decode",)), Pool("first", ("draw",), workers=2)], FCFS(), TOY)
    both = EventLog()
    executors = {name: ProfiledExecutor() for name in ("first", "second")}
    tested = Engine(Member(scheduler, executors), VirtualClock(), [both])
    tested.run(request(f"r{at}", graph, at / 50) for at in range(6))
    trace = both.chrome()
    names = [(event["name"], event["pid"], event.get("tid"), event["args"]["name"]) for event in of_kind(trace, "M")]
    assert names == [
        ("process_name", 0, 0, "requests"),
        ("process_name", 1, 0, "pool first"),
        ("process_name", 2, 0, "pool second"),
        ("thread_name", 1, 0, "worker 0"),
        ("thread_name", 1, 1, "worker 1"),
        ("thread_name", 2, 0, "worker 0"),
    ]
    places = {(event["cat"], event["pid"], event["tid"]) for event in of_kind(trace, "X")}
    assert places == {("draw", 1, 0), ("draw", 1, 1), ("decode", 2, 0)}


def test_no_promise_is_null(log):
    trace = log.chrome()
    due = {event["id"]: event["args"]["due"] for event in of_kind(trace, "b")}
    assert due["second"] is None
    assert due["dropped"] == pytest.approx(0.04)
    json.dumps(trace, allow_nan=False)


def test_a_request_that_is_still_open_has_no_end():
    log = EventLog()
    log(submitted(Job(Request("a", one_stage(), 1.0, SLO(2.0))), 1.0))
    trace = log.chrome()
    [begin] = of_kind(trace, "b")
    assert begin["name"] == "a: open"
    assert of_kind(trace, "e") == []
    json.dumps(trace, allow_nan=False)


def test_a_failed_step_says_so():
    graph, log = one_stage(), EventLog()
    engine(graph, {"s": table("s", 1.0)}, observers=[log], executor=ProfiledExecutor(outcome=lambda batch: [])).run(
        [request("a", graph)]
    )
    [step] = of_kind(log.chrome(), "X")
    assert step["args"]["error"] == "0 results for 1 jobs"
    assert log.requests["a"]["status"] == "failed"


def test_an_empty_log_is_a_trace():
    trace = EventLog().chrome()
    assert [event["args"]["name"] for event in trace["traceEvents"]] == ["requests"]


def test_a_saved_trace_is_the_trace(log, tmp_path):
    log.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == json.loads(json.dumps(log.chrome()))
