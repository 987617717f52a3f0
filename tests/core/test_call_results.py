"""What a call with a `result` is told: its outputs, and its times from its own start."""

from __future__ import annotations

import pickle

import pytest

from neustream import (
    FCFS,
    SLO,
    CallResult,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    VirtualClock,
    call,
    loop,
    par,
    seq,
)
from neustream.core.carry import later
from neustream.core.events import Ended

A, B = Stage("a", emits=True), Stage("b")
SECONDS = {"a": 1.0, "b": 3.0}


def asked(node, **more):
    """A call whose result is all that it is told."""
    return call(node, "ask", result=lambda job, came: came, **more)


def scheduler_of(graph):
    profiles = {name: LinearProfile(name, base=SECONDS[name], max_batch=1) for name in graph.stages}
    return Scheduler([Pool("gpu", tuple(graph.stages))], FCFS(False), profiles)


def told(graph, *slos):
    """The states in the end of requests that came at once, one step at a time on one worker."""
    records = []
    member = Member(scheduler_of(graph), {"gpu": ProfiledExecutor()})
    Engine(member, VirtualClock(), [records.append]).run(
        [Request(f"{at}", graph, 0.0, slo) for at, slo in enumerate(slos)]
    )
    ended = {record.id: record.output for record in records if isinstance(record, Ended)}
    return [ended[f"{at}"] for at in range(len(slos))]


def times(came):
    assert isinstance(came, CallResult)
    return list(came.ages_s), came.seconds, came.waited_s


@pytest.mark.parametrize("more", [[], [call(A, "more")]], ids=["no legs", "legs"])
def test_times_count_from_the_start_of_the_call_and_waiting_until_its_first_step(more):
    graph = Graph("g", seq(B, asked(loop(A, times=2)), *more))
    first, second = told(graph, SLO(), SLO())
    assert times(first["ask"]) == ([4.0, 5.0], 5.0, 3.0), "the other one's b takes 3 s of it"
    ages, seconds, waited = times(second["ask"])
    assert waited == ages[0] - 1.0 and seconds == ages[1] == ages[0] + 1.0


def test_of_a_call_in_a_loop_each_round_has_its_own():
    seen = []
    graph = Graph("g", loop(call(seq(B, A), "ask", result=lambda job, came: seen.append(times(came))), times=3))
    told(graph, SLO())
    assert seen == [([4.0], 4.0, 0.0)] * 3


def test_branches_are_the_calls_own_whose_first_step_ends_its_wait():
    graph = Graph("g", seq(B, asked(par(left=seq(B, A), right=A))))
    [state] = told(graph, SLO())
    assert times(state["ask"]) == ([1.0, 5.0], 5.0, 0.0)


@pytest.mark.parametrize(
    ("slo", "own", "kept"),
    [
        (SLO(), None, True),
        (SLO(total=8.0), None, True),
        (SLO(first=4.0, step=1.0), None, True),
        (SLO(first=3.5, finish=True), None, False),
        (SLO(total=7.5, finish=True), None, False),
        (SLO(), SLO(total=4.5, finish=True), False),
        (SLO(), SLO(total=5.0), True),
    ],
)
def test_whether_what_was_promised_of_it_was_kept(slo, own, kept):
    """The call waits for another one's b from 3 s on, and takes until 8 s."""
    graph = Graph("g", seq(B, asked(loop(A, times=2), slo=own), call(A, "more")))
    finish = SLO(first=slo.first, step=slo.step, total=slo.total, finish=True)
    state, _ = told(graph, finish, SLO())
    assert state["ask"].on_time is kept


def test_a_call_that_moves_goes_on_counting():
    graph = Graph("g", asked(loop(A, times=3)))
    here, there = scheduler_of(graph), scheduler_of(graph)
    here.submit(Request("r", graph, 1.0), 1.0)
    here.finish(here.next_batch("gpu", 2.0), [{"n": 0}], 3.0)
    here.hold("r", 3.0)
    carry = later(pickle.loads(pickle.dumps(here.give("r", 3.0))), 4.0)
    there.take(carry, graph, 100.0)
    for now in (101.0, 102.0):
        there.finish(there.next_batch("gpu", now), [{"n": now}], now + 1.0)
    [ended] = [event for event in there.pop_events() if isinstance(event, Ended)]
    assert times(ended.output["ask"]) == ([2.0, 8.0, 9.0], 9.0, 1.0)


def test_a_call_apart_has_a_state_of_its_own_of_which_the_result_is_left():
    """Names that its stages return are others' too: neither sees the other's, nor does who asks of what is ahead."""
    seen = []
    apart = call(loop(A, times=2), "a", result=lambda job, came: dict(job.state), apart=True)
    more = loop(B, times=lambda job: job.state["n"], expect=lambda job: seen.append(dict(job.state)) or 1)
    graph = Graph("g", loop(seq(B, apart, more), times=2))
    scheduler = scheduler_of(graph)
    scheduler.submit(Request("r", graph), 0.0)
    for update in ({"n": 1, "x": 1}, {"n": 7}, {"n": 8}, {"x": 2}, {"n": 1}, {"m": 3}, {"x": 9}, {}):
        scheduler.finish(scheduler.next_batch("gpu", 0.0), [update], 1.0)
    [ended] = [event for event in scheduler.pop_events() if isinstance(event, Ended)]
    assert ended.output == {"n": 1, "x": 2, "a": {"m": 3, "x": 9}}
    assert {"n": 1, "x": 1} in seen and all(state.get("n", 1) == 1 for state in seen)


def test_a_call_apart_that_moves_comes_back_to_the_state_around_it():
    apart = call(loop(A, times=2), "a", result=lambda job, came: dict(job.state), apart=True)
    graph = Graph("g", seq(B, apart))
    here, there = scheduler_of(graph), scheduler_of(graph)
    here.submit(Request("r", graph), 0.0)
    for update in ({"n": 1}, {"n": 7}):
        here.finish(here.next_batch("gpu", 0.0), [update], 1.0)
    here.hold("r", 1.0)
    there.take(pickle.loads(pickle.dumps(here.give("r", 1.0))), graph, 9.0)
    there.finish(there.next_batch("gpu", 9.0), [{"m": 2}], 10.0)
    [ended] = [event for event in there.pop_events() if isinstance(event, Ended)]
    assert ended.output == {"n": 1, "a": {"n": 7, "m": 2}}
