"""Plans for the step after the one under way that come to nothing: arrivals, drops, faults."""

from __future__ import annotations

import pytest
from hand import Hand, facts, ids
from planned import asked, over, request, scheduler, start

from neustream import (
    FCFS,
    Decision,
    Graph,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
    Stage,
    View,
    loop,
    seq,
    switch,
)
from neustream.core.events import Ended
from neustream.errors import PolicyError

# -- a plan that does not hold ---------------------------------------------------------------------


def test_a_step_that_took_far_longer_is_followed_by_a_decision():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    assert asked(tested, over(tested, batch, at=2.0 + 1e-6))[1]


def test_a_step_that_took_a_little_longer_is_followed_by_the_plan():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    assert not asked(tested, over(tested, batch, at=1.75))[1]


ENDLESS = Graph("endless", loop(Stage("s", 4), until=lambda job: job.state["done"], expect=2))
FORKED = Graph(
    "forked",
    seq(Stage("s", 4), switch(lambda job: job.state["to"], {"x": Stage("x", 4), "y": Stage("y", 4)}, likely="x")),
)


def flat(*stages: str) -> dict[str, LinearProfile]:
    return {name: LinearProfile(name, base=1.0, max_batch=4) for name in stages}


def test_a_loop_that_goes_on_beyond_what_was_expected_is_a_surprise_once():
    tested = Scheduler([Pool("gpu", ("s",))], FCFS(), flat("s"))
    tested.submit(Request("a", ENDLESS), 0.0)
    surprised, now = [], 0.0
    for _ in range(5):
        batch, by_policy = asked(tested, now)
        surprised.append(by_policy)
        tested.plan(batch, now)
        now = over(tested, batch, done=False)
    assert surprised == [True, False, True, False, False]


def test_a_job_that_took_the_unlikely_branch_is_a_surprise():
    tested = Scheduler([Pool("gpu", ("s", "x", "y"))], FCFS(), flat("s", "x", "y"))
    tested.submit(Request("a", FORKED), 0.0)
    tested.submit(Request("b", FORKED), 0.0)
    batch = tested.next_batch("gpu", 0.0)
    tested.plan(batch, 0.0)
    tested.finish(batch, [{"to": "x"}, {"to": "y"}], 1.0)
    following, by_policy = asked(tested, 1.0)
    assert by_policy
    assert following.stage in ("x", "y")


def test_a_branch_that_leaves_the_pool_is_no_surprise_to_it():
    pools = [Pool("gpu", ("s", "x")), Pool("other", ("y",))]
    tested = Scheduler(pools, FCFS(), flat("s", "x", "y"))
    for name in "ab":
        tested.submit(Request(name, FORKED), 0.0)
    batch = tested.next_batch("gpu", 0.0)
    tested.plan(batch, 0.0)
    tested.finish(batch, [{"to": "x"}, {"to": "y"}], 1.0)
    following, by_policy = asked(tested, 1.0)
    assert (ids(following.jobs), by_policy) == (["a"], False)


def test_another_worker_that_took_a_planned_job_voids_the_plan():
    tested = scheduler(workers=2)
    batch = start(tested, request("a"))
    tested.submit(request("b"), 0.25)
    tested.plan(batch, 0.25)
    assert ids(tested.next_batch("gpu", 0.5, 1).jobs) == ["b"]
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["a"], True)


def test_two_workers_do_not_plan_the_same_job():
    tested = scheduler(workers=2)
    one = start(tested, request("a"))
    tested.submit(request("b"), 0.0)
    two = tested.next_batch("gpu", 0.0, 1)
    tested.submit(request("c"), 0.25)
    tested.plan(one, 0.25)
    tested.plan(two, 0.25)
    now = over(tested, one)
    first, by_policy = asked(tested, now)
    assert (ids(first.jobs), by_policy) == (["a", "c"], False)
    over(tested, two)
    second, by_policy = asked(tested, now, 1)
    assert (ids(second.jobs), by_policy) == (["b"], False)


# -- arrivals --------------------------------------------------------------------------------------


def test_an_arrival_with_time_joins_at_the_step_after_the_planned_one():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    tested.submit(request("b", steps=1, arrival=0.5, total=9.0), 0.5)
    assert not tested.planned(batch)
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["a"], False)


def test_an_arrival_that_the_planned_step_would_cost_its_promise_joins_at_once():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    tested.submit(request("b", steps=1, arrival=0.5, total=2.25), 0.5)  # 1.5 s of work from 1.0 on
    following, by_policy = asked(tested, over(tested, batch))
    assert by_policy
    assert "b" in ids(following.jobs)


def test_an_arrival_that_is_hopeless_anyway_voids_nothing():
    tested = scheduler(FCFS(drop_hopeless=False))
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    tested.submit(request("b", steps=1, arrival=0.5, total=0.5), 0.5)
    assert not asked(tested, over(tested, batch))[1]


# -- drops -----------------------------------------------------------------------------------------


def test_a_waiting_job_without_hope_hears_of_it_while_the_step_runs():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.submit(request("b", steps=1, arrival=0.25, total=1.75), 0.25)  # 1.5 s after 1.0 is late
    tested.pop_events()
    tested.plan(batch, 0.25)
    (told,) = tested.pop_events()
    assert (told.id, told.status, told.at) == ("b", "dropped", 0.25)
    assert tested.planned(batch)


def test_a_running_job_that_the_plan_drops_ends_with_its_step():
    def decide(view: View) -> Decision:
        drop = {job: "enough" for job in view.jobs if job.id == "a" and job.calls_left["step"] == 1}
        return Decision([job for job in view.jobs if job not in drop], drop)

    tested = scheduler(Hand(decide))
    batch = start(tested, request("a", steps=2), request("b", steps=4))
    tested.plan(batch, 0.0)
    tested.pop_events()
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["b"], False)
    assert facts(tested.pop_events()) == [("a", "dropped", "enough", 1.25)]


# -- faults ----------------------------------------------------------------------------------------


def test_a_policy_that_raises_while_planning_leaves_no_plan():
    hand = Hand(FCFS().decide)
    tested = scheduler(hand)
    batch = start(tested, request("a"))

    def broken(view: View) -> Decision:
        raise ValueError("broken")

    hand.choose = broken
    with pytest.raises(ValueError, match="broken"):
        tested.plan(batch, 0.0)
    tested.plan(batch, 0.0, instead=FCFS())
    assert not asked(tested, over(tested, batch))[1]


def test_a_plan_that_drops_a_stranger_is_a_fault_of_the_policy():
    hand = Hand(FCFS().decide)
    tested = scheduler(hand)
    batch = start(tested, request("a"))
    hand.choose = lambda view: Decision(view.jobs, {batch.jobs[0]: "it runs"})
    with pytest.raises(PolicyError, match="is not waiting"):
        tested.plan(batch, 0.0)


def test_a_planned_step_that_cannot_be_is_a_fault_at_once():
    hand = Hand(FCFS().decide)
    tested = scheduler(hand)
    batch = start(tested, request("a"))
    hand.choose = lambda view: Decision([*view.jobs, *view.jobs])
    with pytest.raises(PolicyError, match="twice"):
        tested.plan(batch, 0.0)
    assert not tested.planned(batch)


def test_a_plan_that_runs_and_drops_a_job_is_a_fault_at_once():
    hand = Hand(FCFS().decide)
    tested = scheduler(hand)
    batch = start(tested, request("a"))
    tested.submit(request("b"), 0.25)
    hand.choose = lambda view: Decision(view.jobs, dict.fromkeys(view.jobs, "no"))
    with pytest.raises(PolicyError, match=r"chose Job.* and dropped it"):
        tested.plan(batch, 0.25)
    assert set(tested.jobs) == {"a", "b"}


def test_a_worker_that_is_free_later_gives_up_nobody_before_its_step_is_over():
    tested = scheduler(FCFS(), workers=2)
    one = start(tested, request("a"), request("b"))  # 1.25 s
    tested.submit(request("c"), 0.0)
    two = tested.next_batch("gpu", 0.0, 1)  # 1.0 s
    tested.submit(request("d", steps=0, total=1.6), 0.5)  # 0.5 s: in time from 1.0 on, not from 1.25
    tested.plan(one, 0.5)
    assert "d" in tested.jobs
    tested.plan(two, 0.5)
    following, by_policy = asked(tested, over(tested, two), 1)
    assert (ids(following.jobs), by_policy) == (["d"], False)


def test_planning_after_a_step_that_is_over_is_a_fault():
    tested = scheduler()
    batch = start(tested, request("a"))
    now = over(tested, batch)
    with pytest.raises(PolicyError, match="is not running"):
        tested.plan(batch, now)


def test_code_of_the_caller_that_raises_in_a_forecast_is_told_by_the_step_itself():
    def size(job: object) -> int:
        if job.outputs:
            raise ValueError("no size")
        return 1

    stage = Stage("s", 4, emits=True, size=size)
    graph = Graph("sized", loop(stage, times=3))
    profiles = {"s": LinearProfile("s", base=1.0, per_size=0.5, max_batch=4)}
    tested = Scheduler([Pool("gpu", ("s",))], FCFS(), profiles)
    tested.submit(Request("a", graph), 0.0)
    batch = tested.next_batch("gpu", 0.0)
    tested.plan(batch, 0.0)
    assert "a" in tested.jobs
    tested.pop_events()
    over(tested, batch)
    ended = [event for event in tested.pop_events() if isinstance(event, Ended)]
    assert [(event.id, event.status) for event in ended] == [("a", "failed")]
