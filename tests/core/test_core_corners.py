"""Corner cases of the core that once went wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hand import Hand

from neustream import (
    FCFS,
    SLO,
    Clockwork,
    Decision,
    Engine,
    Graph,
    GraphError,
    LinearProfile,
    Member,
    PolicyError,
    Pool,
    ProfiledExecutor,
    ProfileError,
    Request,
    Scheduler,
    Serial,
    Stage,
    Static,
    SumProfile,
    TableProfile,
    VirtualClock,
    loop,
    seq,
    switch,
)

ONE = LinearProfile("x", base=1.0, max_batch=8)


def scheduler(policy, *stages, workers=1, sticky=False, **profiles):
    return Scheduler([Pool("gpu", stages, workers, sticky)], policy, {name: profiles.get(name, ONE) for name in stages})


@pytest.mark.parametrize("policy", [Serial(), Static(), Clockwork()])
def test_whole_request_policies_serve_on_two_workers(policy):
    graph = Graph("g", loop(Stage("unet"), times=lambda job: job.params["steps"]))
    some = scheduler(policy, "unet", workers=2)
    requests = [Request(f"r{n}", graph, params={"steps": n}) for n in (1, 3)]
    report = Engine(Member(some, {"gpu": ProfiledExecutor()}), VirtualClock()).run(requests)
    assert report.counts["on_time"] == 2


def test_a_size_that_follows_the_state_is_no_partial_step():
    decode = Stage("decode", size=lambda job: job.state.get("context", 10))
    some = scheduler(FCFS(), "decode")
    job = some.submit(Request("r1", Graph("g", loop(decode, times=3))), 0.0)
    for now in range(3):
        batch = some.next_batch("gpu", float(now))
        assert batch.sizes == (10 + now,)
        some.finish(batch, [{"context": 11 + now}], now + 1.0)
    assert job.status == "done"


def test_a_size_that_fails_in_the_middle_of_a_loop_fails_that_job_alone():
    decode = Stage("decode", max_batch=4, emits=True, size=lambda job: job.params["sizes"][job.outputs])
    some = scheduler(FCFS(), "decode")
    graph = Graph("g", loop(decode, times=3))
    bad, good = (
        some.submit(Request(str(i), graph, params={"sizes": sizes}), 0.0) for i, sizes in enumerate(([1], [1] * 9))
    )
    some.finish(some.next_batch("gpu", 0.0), [{}, {}], 1.0)
    assert (bad.status, good.status) == ("failed", "waiting")


def test_a_refused_graph_leaves_nothing_behind():
    some = scheduler(FCFS(), "text", "vae")
    with pytest.raises(GraphError, match="'upscale' is in no pool"):
        some.submit(Request("r1", Graph("g", seq(Stage("text"), Stage("upscale")))), 0.0)
    assert some.submit(Request("r1", Graph("g", seq(Stage("text"), Stage("vae")))), 0.0).status == "waiting"


@pytest.mark.parametrize("route", [["x"], {}, np.zeros(2)])
def test_an_unhashable_case_fails_that_job_alone(route):
    a, b = Stage("a", max_batch=4), Stage("b")
    some = scheduler(FCFS(), "a", "b")
    graph = Graph("g", seq(a, switch(lambda job: job.state["route"], {"x": b}, likely="x")))
    bad, good = (some.submit(Request(f"r{i}", graph), 0.0) for i in range(2))
    some.finish(some.next_batch("gpu", 0.0), [{"route": route}, {"route": "x"}], 1.0)
    assert (bad.status, good.status) == ("failed", "waiting")
    assert bad.reason.startswith("request 'r0': switch chose")


def test_an_until_without_a_truth_value_fails_that_job_alone():
    some = scheduler(FCFS(), "a")
    graph = Graph("g", loop(Stage("a", max_batch=4), until=lambda job: job.state["eos"], expect=3))
    bad, good = (some.submit(Request(f"r{i}", graph), 0.0) for i in range(2))
    some.finish(some.next_batch("gpu", 0.0), [{"eos": np.array([True, False])}, {"eos": True}], 1.0)
    assert (bad.status, good.status) == ("failed", "done")


@pytest.mark.parametrize("size", [None, "12", float("nan"), -1])
def test_a_size_that_is_no_number_refuses_the_request(size):
    some = scheduler(FCFS(), "prefill")
    with pytest.raises(GraphError, match="request 'r1': size of stage 'prefill' must be a number >= 0, got"):
        some.submit(Request("r1", Graph("g", Stage("prefill", size=lambda job: size))), 0.0)
    assert some.jobs == {}


def test_clockwork_batches_one_graph():
    a, b, c = (Stage(name, max_batch=4) for name in "abc")
    short, other = Graph("short", seq(a, b)), Graph("other", seq(a, switch(lambda job: 1, {0: b, 1: c}, likely=0)))
    some = scheduler(Clockwork(), "a", "b", "c")
    for i, graph in enumerate((short, other)):
        some.submit(Request(f"r{i}", graph, slo=SLO(100.0)), 0.0)
    now = 0.0
    while some.jobs:
        batch = some.next_batch("gpu", now)
        assert len({job.request.graph for job in batch.jobs}) == 1
        now += batch.expected
        some.finish(batch, [{}] * len(batch), now)


def test_a_job_of_another_scheduler_cannot_be_chosen():
    unet = Graph("g", Stage("unet"))
    stranger = scheduler(FCFS(), "unet").submit(Request("r1", unet), 0.0)
    some = scheduler(Hand(lambda view: Decision([stranger])), "unet")
    some.submit(Request("r2", unet), 0.0)
    with pytest.raises(PolicyError, match="not runnable"):
        some.next_batch("gpu", 0.0)


def test_a_policy_may_not_exceed_the_profile():
    some = scheduler(Hand(lambda view: Decision(view.jobs)), "unet", unet=TableProfile("unet", [1, 2], [1.0, 1.0]))
    graph = Graph("g", Stage("unet", max_batch=8))
    jobs = [some.submit(Request(f"r{i}", graph), 0.0) for i in range(3)]
    with pytest.raises(PolicyError, match=r"chose 3 jobs for a step of 'unet' \(max_batch 2\)"):
        some.next_batch("gpu", 0.0)
    assert {job.status for job in jobs} == {"waiting"}


def test_a_sum_needs_parts():
    with pytest.raises(ProfileError, match="no parts"):
        SumProfile("vae", [])


def test_requests_of_the_same_instant_share_the_first_step():
    some = scheduler(FCFS(), "unet")
    graph = Graph("g", Stage("unet", max_batch=8))
    report = Engine(Member(some, {"gpu": ProfiledExecutor()}), VirtualClock()).run(
        Request(f"r{i}", graph) for i in range(8)
    )
    assert report.batch_size["unet"].mean == 8


def test_a_chunk_shortens_this_step_and_not_the_rounds_to_come():
    read = Stage("read", size=lambda job: 10)
    some = scheduler(
        Hand(lambda view: Decision(view.jobs, sizes=dict.fromkeys(view.jobs, 9))),
        "read",
        read=LinearProfile("read", base=1.0, per_size=1.0, max_batch=4),
    )
    job = some.submit(Request("r1", Graph("g", loop(read, times=3))), 0.0)
    assert job.remaining_s == 33.0
    some.finish(some.next_batch("gpu", 0.0), [{}], 1.0)
    assert job.remaining_s == 2.0 + 11.0 + 11.0
