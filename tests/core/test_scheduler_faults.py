"""A scheduler when things go wrong: decisions that break the contract, steps and callbacks that fail."""

from __future__ import annotations

import math
import types

import pytest
from hand import Hand, facts, ids, set_policy
from scheduled import (
    CHAT,
    PATIENT,
    PROFILES,
    TEXT,
    UNET,
    choosing,
    image,
    run,
    scheduler,
)

from neustream import (
    Decision,
    Graph,
    GraphError,
    Job,
    PolicyError,
    Pool,
    Request,
    Scheduler,
    Stage,
    StageFailed,
    loop,
    seq,
    switch,
)

# -- policies that break the contract ---------------------------------------------------------------


def refused(choose, *requests, now=0.0, worker=0, some=None):
    """The message of the PolicyError that `choose` brings about."""
    some = some or scheduler()
    set_policy(some, Hand(choose))
    for request in requests:
        some.submit(request, 0.0)
    with pytest.raises(PolicyError) as caught:
        some.next_batch("gpu", now, worker)
    assert str(caught.value).startswith("policy 'Hand' ")
    return str(caught.value)


def test_a_policy_may_not_choose_a_job_that_is_not_served():
    stranger = Job(image("stranger"))
    assert "chose Job('stranger', waiting, None), which is not runnable in pool 'gpu'" in refused(
        lambda view: Decision([stranger]), image()
    )


def test_a_policy_may_not_choose_a_job_that_is_over():
    some = scheduler()
    over = some.submit(image("over"), 0.0)
    some.cancel("over", 0.0)
    assert "chose Job('over', cancelled, None), which is not" in refused(
        lambda view: Decision([over]), image(), some=some
    )


def test_a_policy_may_not_choose_a_job_twice():
    assert "chose a job twice" in refused(lambda view: Decision(view.jobs * 2), image())


def test_a_policy_may_not_choose_a_running_job():
    some = scheduler(workers=2)
    running = some.submit(image("r1"), 0.0)
    some.next_batch("gpu", 0.0)
    assert "chose Job('r1', running, Stage('text'))" in refused(
        lambda view: Decision([running]), image("r2"), some=some, worker=1
    )


def test_a_policy_may_not_choose_a_job_of_another_pool():
    some = Scheduler([Pool("gpu", ("text", "vae")), Pool("big", ("unet",))], Hand(), PROFILES)
    elsewhere = some.submit(Request("r1", Graph("one", UNET)), 0.0)
    assert "is not runnable in pool 'gpu'" in refused(lambda view: Decision([elsewhere]), image("r2"), some=some)


def test_a_policy_may_not_exceed_the_stage():
    assert "chose 5 jobs for a step of 'text' (max_batch 4)" in refused(
        lambda view: Decision(view.jobs), *[image(f"r{i}") for i in range(5)]
    )


@pytest.mark.parametrize("at", [3.0, 2.0, math.nan, math.inf])
def test_a_policy_asks_to_be_woken_later(at):
    assert f"asked to be woken at {at}, which is not after 3.0" in refused(
        lambda view: Decision(wake_at=at), image(), now=3.0
    )


def test_a_policy_may_not_let_jobs_wait_for_ever():
    assert "left 2 job(s) of pool 'gpu' waiting for ever" in refused(lambda view: Decision(), image("r1"), image("r2"))
    first = {"r1": "no room"}
    drops = refused(
        lambda view: Decision(drop={job: first[job.id] for job in view.jobs if job.id in first}),
        image("r1"),
        image("r2"),
    )
    assert "left 1 job(s)" in drops


def test_a_policy_may_stay_idle_while_something_runs_or_after_dropping_all():
    some = scheduler(workers=2)
    some.submit(image("r1"), 0.0)
    some.next_batch("gpu", 0.0)
    some.submit(image("r2"), 0.0)
    set_policy(some, Hand(lambda view: Decision()))
    assert some.next_batch("gpu", 0.0, worker=1) is None
    assert some.wake_at("gpu") is None
    some = scheduler(Hand(lambda view: Decision(drop=dict.fromkeys(view.jobs, "no room"))))
    job = some.submit(image(), 0.0)
    assert some.next_batch("gpu", 0.0) is None
    assert (job.status, job.reason) == ("dropped", "no room")


def test_a_policy_may_not_drop_a_running_job():
    some = scheduler(workers=2)
    some.submit(image("r1"), 0.0)
    some.next_batch("gpu", 0.0)
    assert "dropped Job('r1', running, Stage('text')), which is not waiting" in refused(
        lambda view: Decision(drop={view.running[0].jobs[0]: "no"}), image("r2"), some=some, worker=1
    )


def test_a_policy_may_not_run_what_it_drops():
    assert "which is not runnable" in refused(
        lambda view: Decision(view.jobs, drop=dict.fromkeys(view.jobs, "no")), image()
    )


# -- failures ---------------------------------------------------------------------------------------


def failures(jobs):
    return {job.id: job.reason for job in jobs if job.status == "failed"}


@pytest.mark.parametrize("updates", [[], [{}], [{}, {}, {}]])
def test_a_wrong_number_of_results_fails_the_whole_step(updates):
    some = scheduler()
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(2)]
    some.finish(some.next_batch("gpu", 0.0), updates, 1.0)
    reason = f"stage 'text' returned {len(updates)} results for 2 jobs"
    assert failures(jobs) == {"r0": reason, "r1": reason}
    assert some.jobs == {}
    assert facts(some.pop_events()) == [("r0", "failed", reason, 1.0), ("r1", "failed", reason, 1.0)]


def test_an_error_in_place_of_an_update_fails_that_job_alone():
    some = scheduler()
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(3)]
    some.finish(some.next_batch("gpu", 0.0), [{}, StageFailed("NaN in latent"), {}], 1.0)
    assert failures(jobs) == {"r1": "NaN in latent"}
    assert ids(some.next_batch("gpu", 1.0).jobs) == ["r0", "r2"]


def test_a_profile_that_raises_leaves_its_jobs_waiting():
    class Alone:
        name, device, max_batch = "text", "", 4

        def latency(self, batch, total=0.0, square=0.0):
            return {1: 0.5}[batch]

    some = Scheduler([Pool("gpu", tuple(PROFILES))], PATIENT, {**PROFILES, "text": Alone()})
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(2)]
    with pytest.raises(KeyError):
        some.next_batch("gpu", 0.0)
    assert [(job.status, job.skipped, job.ran_last) for job in jobs] == [("waiting", 0, False)] * 2
    set_policy(some, choosing("r1"))
    assert ids(some.next_batch("gpu", 0.0).jobs) == ["r1"]


@pytest.mark.parametrize("update", [None, 1, "text", [("a", 1)], {"a"}, object()])
def test_an_update_that_is_no_mapping_fails_that_job_alone(update):
    some = scheduler()
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(3)]
    some.finish(some.next_batch("gpu", 0.0), [{"a": 1}, update, {"a": 2}], 1.0)
    assert failures(jobs) == {"r1": f"stage 'text' must return one dict per job, got {type(update).__name__}"}
    assert [job.state for job in jobs] == [{"a": 1}, {}, {"a": 2}]


def test_an_update_may_be_any_mapping():
    some = scheduler()
    job = some.submit(image(), 0.0)
    some.finish(some.next_batch("gpu", 0.0), [types.MappingProxyType({"a": 1})], 1.0)
    assert (job.state, job.stage) == ({"a": 1}, UNET)


SIZED = Stage("decode", max_batch=8, size=lambda job: job.state["context"])


@pytest.mark.parametrize(
    "node, what, key, at",
    [
        (loop(UNET, until=lambda job: job.state["over"], expect=2), "a loop's until", "over", "unet"),
        (seq(UNET, loop(TEXT, times=lambda job: job.state["turns"], expect=1)), "a loop's times", "turns", "unet"),
        (seq(UNET, switch(lambda job: job.state["route"], {1: TEXT}, likely=1)), "a switch", "route", "unet"),
        (
            seq(UNET, switch(lambda job: job.params.get("more", 0), {0: SIZED, 1: TEXT}, likely=1)),
            "size of stage 'decode'",
            "context",
            "decode",
        ),
    ],
)
def test_an_update_that_lacks_what_the_graph_asks_is_told_with_stage_and_key(node, what, key, at):
    some = scheduler()
    job = some.submit(Request("r1", Graph("g", node)), 0.0)
    run(some, 0.0, [{"other": 1}])
    said = f"request 'r1': {what} raised KeyError: '{key}'; it is no parameter, and no step returned it so far"
    assert failures([job]) == {"r1": f"{said} (at stage '{at}')"}


def test_a_failed_step_fails_all_of_its_jobs_and_no_other():
    some = scheduler()
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(5)]
    some.fail(some.next_batch("gpu", 0.0), ValueError("CUDA error"), 1.0)
    assert failures(jobs) == {f"r{i}": "ValueError: CUDA error" for i in range(4)}
    assert ids(some.next_batch("gpu", 1.0).jobs) == ["r4"]


@pytest.mark.parametrize(
    "node, what",
    [
        (loop(UNET, until=lambda job: job.params["stop"] / 1, expect=2), "a loop's until raised TypeError"),
        (
            seq(UNET, loop(TEXT, times=lambda job: job.params["stop"], expect=1)),
            "a loop's times must be a whole number",
        ),
        (seq(UNET, switch(lambda job: job.params["stop"], {1: TEXT}, likely=1)), "switch chose 'x'"),
    ],
)
def test_control_flow_that_fails_ends_that_job_alone(node, what):
    some, graph = scheduler(), Graph("g", node)
    jobs = [some.submit(Request(f"r{i}", graph, params={"stop": stop}), 0.0) for i, stop in enumerate([1, "x", 1])]
    run(some, 0.0)
    assert [job.status == "failed" for job in jobs] == [False, True, False]
    assert jobs[1].reason.startswith(f"request 'r1': {what}")
    assert "r1" not in some.jobs


def test_control_flow_that_fails_at_the_first_stage_refuses_the_request():
    some = scheduler()
    with pytest.raises(GraphError, match="request 'r1': a loop's times must be a whole number"):
        some.submit(Request("r1", Graph("g", loop(UNET, times=-1))), 0.0)
    with pytest.raises(GraphError, match="request 'r2': size of stage 'prefill' raised KeyError: 'prompt'"):
        some.submit(Request("r2", CHAT, params={"about": 3}), 0.0)
    assert some.jobs == {}
    assert some.pop_events() == []
    assert some.next_batch("gpu", 0.0) is None


def test_a_step_ends_once():
    some = scheduler()
    some.submit(image(), 0.0)
    batch, now = run(some, 0.0)
    for end in (lambda: some.finish(batch, [{}], now), lambda: some.fail(batch, ValueError(), now)):
        with pytest.raises(PolicyError, match="batch 1 of pool 'gpu' is not running"):
            end()
