"""When the loop plans the step after the one under way, and what decisions cost on a virtual clock."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import draw_and_decode, ends, engine, request, table

from neustream import (
    FCFS,
    POLICIES,
    SLO,
    Decision,
    EventLog,
    Graph,
    LinearProfile,
    ProfiledExecutor,
    Request,
    RequestError,
    Stage,
    ThreadExecutor,
    VirtualClock,
    WallClock,
    loop,
)
from neustream.core.events import Ended
from neustream.engine.decision_time import DecisionTime
from neustream.engine.events import Decided, Done, Finished

PROFILES = {"draw": table("draw", 1.0, 1.25), "decode": table("decode", 0.5)}


class Told(list):
    """An observer that keeps all records."""

    __call__ = list.append

    def of(self, kind):
        return [record for record in self if isinstance(record, kind)]


def run(*requests, decision_s=0.25, policy=None, executor=None, profiles=PROFILES, graph=None):
    """What observers were told of requests for draws and a decode, and when each of them ended."""
    told, log = Told(), EventLog()
    clock = VirtualClock(DecisionTime(decision_s))
    tested = engine(graph or draw_and_decode(), profiles, policy, clock=clock, observers=[told, log], executor=executor)
    tested.run(requests)
    return told, ends(log)


GRAPH = draw_and_decode()


def ask(id, arrival=0.0, steps=1, total=1000.0):
    return request(id, GRAPH, arrival, steps, total)


# -- what decisions cost ---------------------------------------------------------------------------


def test_a_decision_beside_a_step_takes_no_time_of_the_device():
    told, ended = run(ask("a", steps=3), graph=GRAPH)
    assert ended == {"a": 0.25 + 3 * 1.0 + 0.5}  # the first step alone waits for a decision
    assert [record.step.planned for record in told.of(Finished)] == [False, True, True, True]
    assert [record.seconds for record in told.of(Decided)] == [0.25] * 4


def test_where_deciding_takes_no_time_nothing_is_planned():
    told, ended = run(ask("a", steps=3), decision_s=0.0, graph=GRAPH)
    assert ended == {"a": 3.5}
    assert not any(record.step.planned for record in told.of(Finished))
    assert len(told.of(Decided)) == 4


def test_a_step_that_is_shorter_than_a_decision_does_not_hide_it():
    profiles = {"draw": table("draw", 0.0625), "decode": table("decode", 0.0625)}
    _, ended = run(ask("a", steps=2), profiles=profiles, graph=draw_and_decode(1) and GRAPH)
    assert ended["a"] > 3 * 0.25


SHORT = {"draw": table("draw", 2**-8, 2**-8), "decode": table("decode", 2**-8)}


def test_a_short_step_of_a_lone_request_is_planned_when_it_has_ended():
    told, ended = run(ask("a", steps=3), decision_s=2**-10, profiles=SHORT, graph=GRAPH)
    assert not any(record.step.planned for record in told.of(Finished))
    assert [record.seconds for record in told.of(Decided)] == [2**-10] * 4
    assert ended == {"a": 4 * (2**-8 + 2**-10)}


def test_a_short_step_is_planned_ahead_where_a_decision_takes_as_long():
    told, _ = run(ask("a", steps=8), ask("b", steps=8), decision_s=2**-8, profiles=SHORT, graph=GRAPH)
    assert any(record.step.planned for record in told.of(Finished))


@pytest.mark.parametrize("decision_s", [2**-12, 2**-10, 2**-9])
def test_a_short_step_is_not_planned_beside_itself_where_a_decision_takes_less(decision_s):
    """Both would take turns at Python's lock, and each take longer than one after the other."""
    told, ended = run(ask("a", steps=8), ask("b", steps=8), decision_s=decision_s, profiles=SHORT, graph=GRAPH)
    assert len(ended) == 2 and not any(record.step.planned for record in told.of(Finished))


@pytest.mark.parametrize(("alone_s", "ahead"), [(0.0, True), (0.5, True), (1.0, True), (2.0, False)])
def test_steps_that_have_python_to_themselves_are_decided_one_after_the_other(alone_s, ahead):
    executor = ProfiledExecutor(alone_s=alone_s)
    told, ended = run(ask("a", steps=8), ask("b", steps=8), decision_s=0.125, executor=executor, graph=GRAPH)
    assert [record.step.planned for record in told.of(Finished)][1:-1] == [ahead] * 8
    assert ended["a"] == 0.125 + 8 * 1.25 + 0.5 + (0 if ahead else 8 * 0.125)


def test_a_handover_comes_between_all_steps():
    _, ended = run(ask("a", steps=3), executor=ProfiledExecutor(handover_s=0.125), graph=GRAPH)
    assert ended == {"a": 0.25 + 3 * 1.125 + 0.625}


@pytest.mark.parametrize("name", DecisionTime._fields)
@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_decision_takes_a_time(name, seconds):
    with pytest.raises(RequestError, match=f"{name} must be a time >= 0, got"):
        VirtualClock(DecisionTime(**{name: seconds}))


def test_a_decision_takes_longer_the_more_it_is_about():
    """The first is about two that have not run, the second about one that has: of two draws, one at a time."""
    told, clock = Told(), VirtualClock(DecisionTime(0.25, 0.5, 2.0))
    tested = engine(draw_and_decode(), PROFILES, FCFS(), clock=clock, observers=[told], executor=ProfiledExecutor())
    tested.run([ask("a"), ask("b")])
    seen = [(one.requests, one.new, one.seconds) for one in told.of(Decided)]
    assert seen[0] == (2, 2, 0.25 + 2 * 0.5 + 2 * 2.0)
    assert seen[1:] == [(count, new, 0.25 + count * 0.5 + new * 2.0) for count, new, _ in seen[1:]]


# -- what a plan knows of --------------------------------------------------------------------------


def test_who_comes_before_the_plan_is_made_is_in_it():
    told, _ = run(ask("a", steps=3), ask("b", 0.5), decision_s=1e-3, graph=GRAPH)
    steps = [(record.step.ids, record.step.planned) for record in told.of(Finished)]
    assert steps[1] == (("a", "b"), True)


def test_who_comes_after_it_runs_a_step_later():
    told, _ = run(ask("a", steps=3), ask("b", 0.975), decision_s=1e-3, graph=GRAPH)
    steps = [(record.step.ids, record.step.planned) for record in told.of(Finished)]
    assert steps[1:3] == [(("a",), True), (("a", "b"), True)]


def test_who_would_lose_its_promise_by_that_runs_at_once():
    told, ended = run(ask("a", steps=3), ask("b", 0.975, total=2.25), decision_s=1e-3, graph=GRAPH)
    steps = [(record.step.ids, record.step.planned) for record in told.of(Finished)]
    assert steps[1] == (("a", "b"), False)
    assert ended["b"] < 0.975 + 2.25


# -- who is without hope hears of it ---------------------------------------------------------------

LONG = {"draw": table("draw", 10.0, 10.0), "decode": table("decode", 0.5)}


def test_a_request_without_hope_behind_a_long_step_hears_of_it_at_once():
    told, _ = run(ask("a"), ask("b", 1.0, total=5.0), decision_s=1e-3, profiles=LONG, graph=GRAPH)
    (dropped,) = [record for record in told.of(Ended) if record.status == "dropped"]
    assert dropped.id == "b"
    assert dropped.at < 1.1


def test_a_request_that_loses_hope_while_a_step_overruns_hears_of_it_before_its_end():
    slow = ProfiledExecutor(stretch=lambda batch: 40.0)
    told, _ = run(ask("a"), ask("b", 0.5, total=9.0), decision_s=1e-3, executor=slow, graph=GRAPH)
    (dropped,) = [record for record in told.of(Ended) if record.status == "dropped"]
    assert dropped.id == "b"
    assert 8.0 <= dropped.at < 20.0  # its own 1.5 s do not fit any more; the step goes on to 40


def test_a_request_behind_a_short_step_that_overruns_hears_of_it_before_its_end():
    slow = ProfiledExecutor(stretch=lambda batch: 2.0**12)
    told, _ = run(ask("a"), ask("b", 0.5, total=2.0), decision_s=1e-3, profiles=SHORT, executor=slow, graph=GRAPH)
    (dropped,) = [record for record in told.of(Ended) if record.status == "dropped"]
    assert dropped.id == "b"
    assert dropped.at < 5.0  # the step goes on to 16


# -- faults ----------------------------------------------------------------------------------------


class RaisesWhenPlanning:
    """Decides as FCFS does, but for views in which somebody has run."""

    def decide(self, view):
        if any(job.started_at is not None for job in view.jobs):
            raise ValueError("not now")
        return FCFS().decide(view)


def test_a_policy_that_raises_while_planning_ends_a_replay():
    with pytest.raises(ValueError, match="not now"):
        run(ask("a", steps=3), policy=RaisesWhenPlanning(), graph=GRAPH)


class Sleeps:
    """A step of 0.15 s."""

    def load(self, device):
        pass

    def step(self, inputs):
        time.sleep(0.15)
        return [{} for _ in inputs]


ONE = Graph("one", loop(Stage("nap", 4), times=lambda job: job.params["steps"]))


def serving(policy, told):
    profiles = {"nap": table("nap", 0.1, 0.1, 0.1, 0.1)}
    executor = ThreadExecutor({"nap": Sleeps()})
    return engine(ONE, profiles, policy, executor=executor, clock=WallClock(), observers=[told])


def test_a_served_step_is_planned_while_the_one_before_it_runs():
    told = Told()
    with serving(FCFS(), told) as tested:
        assert tested.submit(ONE, {"steps": 3}).result(20).status == "done"
    assert [record.step.planned for record in told.of(Finished)] == [False, True, True]


def test_a_policy_that_raises_while_planning_is_covered_by_fcfs():
    told = Told()
    with serving(RaisesWhenPlanning(), told) as tested:
        assert tested.submit(ONE, {"steps": 3}).result(20).status == "done"
        assert tested.snapshot().policy_faults >= 2
    assert [record.step.planned for record in told.of(Finished)] == [False, True, True]


def test_a_step_that_comes_back_twice_is_taken_once(caplog):
    class Twice(ProfiledExecutor):
        def start(self, batch, clock):
            super().start(batch, clock)
            clock.post(Done(batch, [{}] * len(batch)), clock.now() + 0.5)

    _, ended = run(ask("a", steps=2), executor=Twice(), decision_s=0.0, graph=GRAPH)
    assert ended == {"a": 1.5}
    assert "came back twice; ignored" in caplog.text


# -- invariants ------------------------------------------------------------------------------------


class Moody:
    """Decides as FCFS does, and sometimes waits."""

    def decide(self, view):
        if int(view.now * 10) % 3 == 2:
            return Decision(wake_at=view.now + 0.15)
        return FCFS().decide(view)


@pytest.mark.parametrize("policy", [*POLICIES, "moody"])
@settings(max_examples=10, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 4), st.floats(1.0, 20.0)), max_size=12),
    decision_s=st.sampled_from([1e-4, 0.05, 0.7]),
    stretch=st.lists(st.sampled_from([0.3, 1.0, 1.0, 1.2, 30.0]), min_size=1),
)
def test_whatever_steps_and_decisions_take_everybody_ends_once(policy, arrivals, decision_s, stretch):
    now, requests = 0.0, []
    for index, (gap, steps, total) in enumerate(arrivals):
        now += gap
        requests.append(Request(f"r{index}", GRAPH, now, SLO(total=total), {"steps": steps}))
    executor = ProfiledExecutor(stretch=lambda batch: stretch[batch.id % len(stretch)])
    rule = Moody() if policy == "moody" else POLICIES[policy]()
    told, ended = run(*requests, decision_s=decision_s, policy=rule, executor=executor, graph=GRAPH)
    assert sorted(record.id for record in told.of(Ended)) == sorted(request.id for request in requests)
    assert all(at is not None for at in ended.values())
    ran = [id for record in told.of(Finished) for id in record.step.ids]
    done = [record for record in told.of(Ended) if record.status == "done"]
    for record in done:
        steps = next(request.params["steps"] for request in requests if request.id == record.id)
        assert ran.count(record.id) == steps + 1


# -- several workers -------------------------------------------------------------------------------

SIZED = Graph("sized", Stage("s", 1, size=lambda job: job.params["s"]))
SECONDS = {"s": LinearProfile("s", base=0.0, per_size=1.0, max_batch=1)}


def on_two_workers(*asked, sticky=False):
    """How requests of some seconds each end: (arrival, seconds, promised total)."""
    told, clock = Told(), VirtualClock(DecisionTime(1e-3))
    tested = engine(
        SIZED, SECONDS, workers=2, clock=clock, observers=[told], executor=ProfiledExecutor(), sticky=sticky
    )
    tested.run(
        Request(f"r{index}", SIZED, arrival, SLO(total=total), {"s": seconds})
        for index, (arrival, seconds, total) in enumerate(asked)
    )
    return {record.id: (record.status, record.at) for record in told.of(Ended)}


@pytest.mark.parametrize("sticky", [False, True])
def test_who_waits_for_the_worker_that_is_free_next_is_not_given_up_for_another_one(sticky):
    ended = on_two_workers((0.0, 100.0, 999.0), (0.0, 1.0, 999.0), (0.5, 1.0, 3.0), sticky=sticky)
    assert ended["r2"][0] == "done"
    assert ended["r2"][1] < 2.1


def test_a_plan_for_later_keeps_nobody_from_the_worker_that_is_free_next():
    asked = [(0.0, 100.0, 999.0), (0.0, 1.0, 999.0), (0.5, 1.0, 999.0), (0.6, 1.0, 999.0)]
    ended = on_two_workers(*asked)
    assert ended["r2"][1] < 2.1
    assert ended["r3"][1] < 3.1


def test_who_has_no_hope_with_any_worker_hears_of_it_at_once():
    ended = on_two_workers((0.0, 100.0, 999.0), (0.0, 50.0, 999.0), (0.5, 1.0, 3.0))
    assert ended["r2"][0] == "dropped"
    assert ended["r2"][1] < 0.7
