"""Graphs of several model calls: each has a promise of its own, and what one saves the others have."""

from __future__ import annotations

import math

import pytest
from hand import Hand, seen

from neustream import (
    FCFS,
    SLO,
    Engine,
    Graph,
    GraphError,
    LinearProfile,
    Member,
    Pool,
    Priced,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Stage,
    VirtualClock,
    call,
    loop,
    par,
    seq,
    switch,
)
from neustream.core.events import LegEnded
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

PREFILL = LinearProfile("p", base=0.25, max_batch=8)
STEPS = StepProfile("llm", PREFILL, LinearProfile("d", base=0.03125, max_batch=8))
TOOL = Stage("tool")
PARAMS = {"prompt_tokens": 10, "max_tokens": 5}
CALL_S = 0.25 + 4 * 0.03125
PACE = SLO(first=0.5, step=0.05)


def scheduler_of(graph, policy=None, tool_s=3.0):
    profiles = {"tool": LinearProfile("tool", base=tool_s, max_batch=1)}
    models = sorted({stage.model for stage in graph.stages.values()} - {""})
    for model in models:
        profiles |= llm_profiles(model, STEPS, 8)
    pools = [Pool("gpu", tuple(name for name in graph.stages if name != "tool"))]
    if "tool" in graph.stages:
        pools.append(Pool("tools", ("tool",), concurrency=8))
    rules = {"gpu": policy or Hand()}
    return Scheduler(pools, rules, profiles)


def run(graph, requests, policy=None, tool_s=3.0):
    """What came of requests in virtual time: the report and the legs that ended."""
    legs = []
    scheduler = scheduler_of(graph, policy or Priced(), tool_s)
    executors = {name: ProfiledExecutor() for name in scheduler.pools}
    observers = [lambda record: legs.append(record) if isinstance(record, LegEnded) else None]
    engine = Engine(Member(scheduler, executors), VirtualClock(), observers)
    return engine.run(requests), legs


def test_ttft_and_tpot_count_from_the_start_of_each_call():
    graph = Graph("agent", seq(llm("a"), TOOL, llm("b")))
    report, legs = run(graph, [Request(f"r{i}", graph, i * 5.0, PACE, PARAMS) for i in range(4)])
    assert report.counts["on_time"] == 4
    assert [(leg.leg, leg.late) for leg in legs[:3]] == [("a", False), ("tool", False), ("b", False)]
    last = legs[2]
    assert last.began == pytest.approx(CALL_S + 3.0)
    assert last.first_at == pytest.approx(CALL_S + 3.25)
    assert last.outputs == 5


def test_a_call_that_is_late_is_told_and_makes_its_request_late():
    graph = Graph("agent", seq(llm("a"), TOOL, llm("b", slo=SLO(first=0.1, finish=True))))
    report, legs = run(graph, [Request("r", graph, slo=SLO(first=0.5, finish=True), params=PARAMS)], FCFS(False))
    assert report.counts["late"] == 1
    assert [leg.late for leg in legs] == [False, False, True]


def test_a_call_has_its_own_slo_and_a_total_from_its_start():
    graph = Graph("agent", seq(TOOL, llm("b", slo=SLO(total=0.3))))
    report, _ = run(graph, [Request("r", graph, params=PARAMS)], FCFS(False))
    assert report.counts["late"] == 1, "0.375 s of its own"
    graph = Graph("agent", seq(TOOL, llm("b", slo=SLO(total=0.4))))
    report, _ = run(graph, [Request("r", graph, params=PARAMS)], FCFS(False))
    assert report.counts["on_time"] == 1


def test_one_call_is_promised_as_before_from_arrival():
    graph = Graph("one", seq(Stage("encode"), llm("a")))
    assert not graph.legs
    assert call(graph, "again").call.whole
    assert Graph("two", seq(llm("a"), llm("b"))).legs == {"a": True, "b": True}
    assert Graph("many", loop(llm("a"), times=2)).legs == {"a": True}
    ways = switch(lambda job: 0, {0: llm("a"), 1: llm("b")})
    assert not Graph("either", ways).legs


def test_the_same_stages_may_be_called_twice_with_params_of_their_own():
    chat = llm("chat")
    write = call(chat, "write", params=lambda job: {"prompt_tokens": job.params["prompt_tokens"] + 90, "max_tokens": 3})
    graph = Graph("agent", seq(call(chat, "plan"), TOOL, write))
    assert set(graph.stages) == {"chat.prefill", "chat.decode", "tool"}
    _, legs = run(graph, [Request("r", graph, params=PARAMS)])
    assert [(leg.leg, leg.outputs) for leg in legs] == [("plan", 5), ("tool", 0), ("write", 3)]


@pytest.mark.parametrize("wide", [False, True], ids=["a call behind", "behind a join"])
def test_by_when_a_leg_has_to_be_over_counts_later_generations_as_the_shortest_that_were_seen(wide):
    first = par(a=llm("a"), b=llm("b")) if wide else llm("a")
    last = llm("c")
    graph, alone = Graph("agent", seq(first, last)), Graph("alone", last)
    scheduler = scheduler_of(graph, Priced())
    member = Member(scheduler, {"gpu": ProfiledExecutor()})
    params = {"prompt_tokens": 10, "max_tokens": 65}  # each comes to that: the shortest are as long
    Engine(member, VirtualClock()).run([Request(f"r{at}", alone, at * 0.01, params=params) for at in range(20)])
    scheduler.submit(Request("r", graph, 100.0, SLO(total=50.0), {**params, "max_tokens": 200}), 100.0)
    job = scheduler.jobs["r/a" if wide else "r"]
    assert job.leg_latest == pytest.approx(150.0 - 0.25 - 64 * 0.03125)


def test_outputs_left_are_those_of_the_call_that_it_is_in():
    chat = llm("chat")
    graph = Graph("agent", seq(call(chat, "plan"), call(chat, "write")))
    scheduler = scheduler_of(graph)
    job = scheduler.submit(Request("r", graph, params=PARAMS), 0.0)
    assert job.calls_left == {"chat.prefill": 2, "chat.decode": 8}
    assert (job.calls_here("chat.prefill"), job.calls_here("chat.decode")) == (1, 4)


def test_what_is_left_of_the_total_is_split_by_what_is_ahead_and_slack_goes_downstream():
    graph = Graph("agent", seq(llm("a"), TOOL, llm("b")))
    scheduler = scheduler_of(graph)
    whole = 2 * CALL_S + 3.0
    job = scheduler.submit(Request("r", graph, slo=SLO(total=2 * whole), params=PARAMS), 0.0)
    assert job.remaining_s == pytest.approx(whole)
    assert job.leg_due == pytest.approx(2 * CALL_S)
    assert job.leg_latest == pytest.approx(2 * whole - 0.25 - 3.0), "no generation was seen: only a prompt is sure"
    now = 0.0
    for _ in range(5):
        batch = scheduler.next_batch("gpu", now, instead=FCFS())
        now += batch.expected
        scheduler.finish(batch, [{}], now)
    assert job.leg == "tool"
    left = 2 * whole - CALL_S
    assert job.leg_due == pytest.approx(CALL_S + left * 3.0 / (3.0 + CALL_S)), "what `a` saved is shared"


def test_what_legs_really_took_changes_the_split():
    graph = Graph("agent", seq(llm("a"), TOOL, llm("b")))
    scheduler = scheduler_of(graph)
    first = scheduler.submit(Request("r", graph, slo=SLO(total=20.0), params=PARAMS), 0.0).leg_due
    for _ in range(4):
        scheduler.recent.seen.leg(graph.print, "tool").add(10.0)
    second = scheduler.submit(Request("s", graph, slo=SLO(total=20.0), params=PARAMS), 0.0).leg_due
    assert second == pytest.approx(20.0 * CALL_S / (10.0 + 2 * CALL_S))
    assert second < first


def test_a_total_shorter_than_any_way_is_refused_with_the_shortest():
    short = switch(lambda job: job.state["way"], {"tool": TOOL, "none": seq()})
    graph = Graph("agent", seq(llm("a"), short, llm("b")))
    scheduler = scheduler_of(graph)
    shortest = r"total of 0.400 s is shorter than the shortest way .* 'agent', 0.500 s"
    with pytest.raises(RequestError, match=shortest) as told:
        scheduler.submit(Request("r", graph, slo=SLO(total=0.4), params=PARAMS), 0.0)
    assert not scheduler.jobs and told.value.code == "unattainable"
    scheduler.submit(Request("r", graph, slo=SLO(total=0.5), params=PARAMS), 0.0)
    scheduler.submit(Request("late", graph, slo=SLO(total=0.1, finish=True), params=PARAMS), 0.0)


def test_who_cannot_be_in_time_is_given_up_in_front_of_its_tool():
    graph = Graph("agent", seq(llm("a"), TOOL, llm("b")))
    scheduler = scheduler_of(graph)
    scheduler.submit(Request("r", graph, slo=SLO(total=4.0), params=PARAMS), 0.0)
    now = 1.0
    for _ in range(5):
        batch = scheduler.next_batch("gpu", now, instead=FCFS(False))
        scheduler.finish(batch, [{}], now)
    assert scheduler.next_batch("tools", now) is None
    ended = scheduler.pop_events()[-1]
    assert (ended.status, ended.reason) == ("dropped", "hopeless: needs 3.250 s more, due in 3.000 s")


def test_a_job_in_a_call_moves_with_its_promise():
    chat = llm("chat")
    inner = {"prompt_tokens": 7, "max_tokens": 2}
    graph = Graph("agent", seq(TOOL, call(chat, "plan", params=inner, slo=SLO(first=1.0)), call(chat, "write")))
    here, there = scheduler_of(graph), scheduler_of(graph)
    job = here.submit(Request("r", graph, params=PARAMS), 0.0)
    here.finish(here.next_batch("tools", 0.0), [{}], 3.0)
    assert (job.leg, job.params, job.due_next) == ("plan", inner, 4.0)
    moved = there.take(here.give("r", 3.0), graph, 10.0)
    assert (moved.leg, moved.params, moved.due_next, moved.slo.first) == ("plan", inner, 11.0, 1.0)
    [shown] = seen(there, 10.0).jobs
    assert (shown.size, shown.size_ahead(graph.stages["chat.prefill"])) == (7, 10.0)
    now = 10.0
    for _ in range(3):
        batch = there.next_batch("gpu", now, instead=FCFS())
        there.finish(batch, [{}], now)
    assert (moved.leg, moved.params) == ("write", PARAMS)


def test_params_of_a_call_that_cannot_be_asked_yet_are_expected():
    chat = llm("chat")

    def params(job):
        return {"prompt_tokens": job.state["found"], "max_tokens": 2}

    graph = Graph("agent", seq(TOOL, call(chat, "a", params=params), call(chat, "b")))
    with pytest.raises(GraphError, match=r"request 'r': params of call 'a' raised KeyError"):
        scheduler_of(graph).submit(Request("r", graph, params=PARAMS), 0.0)
    known = call(chat, "a", params=params, expect={"prompt_tokens": 5, "max_tokens": 4})
    graph = Graph("agent", seq(TOOL, known, call(chat, "b")))
    scheduler = scheduler_of(graph)
    job = scheduler.submit(Request("r", graph, params=PARAMS), 0.0)
    assert job.calls_left["chat.decode"] == 3 + 4
    scheduler.finish(scheduler.next_batch("tools", 0.0), [{"found": 40}], 3.0)
    assert job.size == 40


def test_a_lost_state_begins_the_first_leg_anew():
    graph = Graph("agent", seq(TOOL, llm("a"), llm("b")))
    scheduler = scheduler_of(graph)
    job = scheduler.submit(Request("r", graph, slo=PACE, params=PARAMS), 0.0)
    scheduler.finish(scheduler.next_batch("tools", 0.0), [{}], 3.0)
    batch = scheduler.next_batch("gpu", 3.0, instead=FCFS())
    scheduler.requeue(batch, 3.25, lost="state")
    assert (job.leg, job.due_next) == ("tool", math.inf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call(TOOL), "a call needs a name, got None"),
        (lambda: call(TOOL, "t", slo=3), "call 't': slo must be an SLO, got 3"),
        (lambda: call(TOOL, "t", params=3), "call 't': params must be a mapping, got 3"),
        (lambda: call(TOOL, "t", expect={}), "call 't': expect says what params are expected to be; give params"),
    ],
)
def test_malformed_calls_are_errors(make, message):
    with pytest.raises(GraphError, match=message):
        make()


# -- learnt loops and switches -----------------------------------------------------------------------


def test_a_loop_without_expect_learns_its_rounds():
    body = Stage("s")
    graph = Graph("g", loop(body, until=lambda job: job.state["n"] >= job.params["n"]))
    scheduler = Scheduler([Pool("gpu", ("s",))], FCFS(), {"s": LinearProfile("s", base=1.0, max_batch=4)})
    jobs = []
    for index in range(3):
        job = scheduler.submit(Request(f"r{index}", graph, params={"n": 6}), 0.0)
        jobs.append((job.calls_left["s"], job.remaining_s))
        for done in range(1, 7):
            scheduler.finish(scheduler.next_batch("gpu", 0.0), [{"n": done}], 1.0)
    assert jobs == [(1, 1.0), (6, 6.0), (6, 6.0)]
    job = scheduler.submit(Request("long", graph, params={"n": 9}), 0.0)
    for done in range(1, 7):
        scheduler.finish(scheduler.next_batch("gpu", 0.0), [{"n": done}], 1.0)
    assert job.calls_left["s"] == 1, "longer than any before"


def test_a_switch_without_likely_learns_its_case():
    a, b, c = Stage("a"), Stage("b"), Stage("c")
    graph = Graph("g", seq(a, switch(lambda job: job.params["way"], {"b": b, "c": c})))
    profiles = {name: LinearProfile(name, base=1.0, max_batch=4) for name in "abc"}
    scheduler = Scheduler([Pool("gpu", ("a", "b", "c"))], FCFS(), profiles)
    expected = []
    for index, way in enumerate("ccb"):
        job = scheduler.submit(Request(f"r{index}", graph, params={"way": way}), 0.0)
        expected.append(list(job.calls_left))
        for _ in range(2):
            scheduler.finish(scheduler.next_batch("gpu", 0.0), [{}], 1.0)
    assert expected == [["a", "b"], ["a", "c"], ["a", "c"]]
