"""The scheduler driven by hand, as any loop may drive it: no engine, no clock."""

from __future__ import annotations

import math
import types

import pytest
from hand import Hand, facts, ids, seen, set_policy
from toys import policy_in

from neustream import (
    EDF,
    FCFS,
    SLO,
    Decision,
    Graph,
    GraphError,
    Job,
    LinearProfile,
    NeustreamError,
    PolicyError,
    Pool,
    ProfileError,
    Request,
    RequestError,
    Scheduler,
    Stage,
    StageFailed,
    TableProfile,
    alone_s,
    loop,
    seq,
    switch,
)
from neustream.core.demand import Calls
from neustream.core.events import Emitted, Ended

TEXT, UNET, VAE = Stage("text", max_batch=4), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)
IMAGE = Graph("image", seq(TEXT, loop(UNET, times=lambda job: job.params["steps"]), VAE))
PREFILL = Stage("prefill", max_batch=4, emits=True, size=lambda job: job.params["prompt"], model="llm")
DECODE = Stage("decode", max_batch=8, emits=True, size=lambda job: job.params["prompt"] + job.outputs, model="llm")
CHAT = Graph(
    "chat", seq(PREFILL, loop(DECODE, until=lambda job: job.state["eos"], expect=lambda job: job.params["about"] - 1))
)
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=4),
    "unet": LinearProfile("unet", base=0.75, per_job=0.25, max_batch=4),
    "vae": LinearProfile("vae", base=0.25, max_batch=4),
    "prefill": LinearProfile("prefill", base=1.0, per_size=0.125, per_square=0.03125, max_batch=4),
    "decode": LinearProfile("decode", base=0.25, max_batch=8),
}
PATIENT = FCFS(drop_hopeless=False)


def scheduler(policy=PATIENT, *, workers=1, sticky=False):
    return Scheduler([Pool("gpu", tuple(PROFILES), workers, sticky)], policy, PROFILES)


def image(id="r1", steps=2, slo=None, arrival=0.0):
    return Request(id, IMAGE, arrival, slo or SLO(), {"steps": steps})


def chat(id="r1", prompt=4, about=3, slo=None):
    return Request(id, CHAT, 0.0, slo or SLO(), {"prompt": prompt, "about": about})


def run(some, now, updates=None, worker=0, pool="gpu"):
    """One step from `now` on; returns its batch and when it ended."""
    batch = some.next_batch(pool, now, worker)
    some.finish(batch, [{}] * len(batch) if updates is None else updates, now + batch.expected)
    return batch, now + batch.expected


# -- a request from its submission to its end -------------------------------------------------------


def test_work_and_calls_left_as_a_job_moves_through_its_graph():
    some = scheduler()
    job = some.submit(image(steps=2), 0.0)
    assert (job.stage, job.status, job.alone_s) == (TEXT, "waiting", 0.5 + 2 * 1.0 + 0.25)
    seen, now = [], 0.0
    while some.jobs:
        seen.append((job.stage.name, dict(job.calls_left), job.remaining_s, job.next_output_s))
        _, now = run(some, now)
    assert seen == [
        ("text", {"text": 1, "unet": 2, "vae": 1}, 2.75, 2.75),
        ("unet", {"unet": 2, "vae": 1}, 2.25, 2.25),
        ("unet", {"unet": 1, "vae": 1}, 1.25, 1.25),
        ("vae", {"vae": 1}, 0.25, 0.25),
    ]
    assert (job.status, now, job.ended_at, job.alone_s) == ("done", 2.75, 2.75, 2.75)


def test_alone_s_is_the_work_of_a_fresh_job():
    some = scheduler()
    assert some.submit(image(steps=7), 0.0).alone_s == alone_s(IMAGE, {"steps": 7}, PROFILES)
    assert some.submit(chat("r2"), 0.0).alone_s == alone_s(CHAT, {"prompt": 4, "about": 3}, PROFILES)
    with pytest.raises(ProfileError, match="stage 'text' of graph 'image' has no profile"):
        alone_s(IMAGE, {"steps": 7}, {})


def test_a_batch_says_what_runs_where_and_for_how_long():
    some = scheduler()
    jobs = [some.submit(image(f"r{i}"), 1.0) for i in range(3)]
    batch = some.next_batch("gpu", 2.0)
    assert (batch.stage, batch.pool, batch.worker, batch.jobs) == ("text", "gpu", 0, tuple(jobs))
    assert (batch.started_at, batch.expected, batch.sizes, len(batch)) == (2.0, 0.5, (0.0, 0.0, 0.0), 3)
    assert {job.status for job in jobs} == {"running"}
    assert some.next_batch("gpu", 2.0) is None  # nobody else waits
    some.finish(batch, [{}, {}, {}], 2.5)
    run(some, 3.0)
    assert {(job.status, job.started_at, job.worker) for job in jobs} == {("waiting", 2.0, 0)}


def test_updates_are_merged_into_the_state_and_the_last_output_is_kept():
    some = scheduler()
    job = some.submit(image(steps=1), 0.0)
    run(some, 0.0, [{"emb": 1}])
    run(some, 1.0, [{"latent": 2, "emb": 3}])
    assert job.state == {"emb": 3, "latent": 2}
    run(some, 2.0, [{"image": 4}])
    assert job.output == {"image": 4}


def test_without_an_emitting_stage_the_state_is_the_output():
    some = scheduler()
    job = some.submit(Request("r1", Graph("plain", seq(TEXT, UNET))), 0.0)
    run(some, 0.0, [{"a": 1}])
    run(some, 1.0, [{"b": 2}])
    assert job.output == {"a": 1, "b": 2}
    assert [type(event) for event in some.pop_events()] == [Ended]


def test_events_tell_outputs_and_ends_in_order_and_once():
    some = scheduler()
    slo = SLO(total=9.0, name="gold")
    some.submit(image("r1", steps=0, slo=slo, arrival=0.25), 0.25)
    some.submit(image("r2", steps=1), 0.25)
    run(some, 0.25)
    run(some, 1.0, [{"image": "x"}])
    assert some.pop_events() == [
        Emitted("r1", 0, {"image": "x"}, at=1.25, age=1.0, late=False),
        Ended("r1", "done", "", {"image": "x"}, on_time=True, arrival=0.25, at=1.25, slo=slo, steps=0, outputs=1),
    ]
    assert some.pop_events() == []
    some.cancel("r2", 3.0)
    (end,) = some.pop_events()
    assert end == Ended("r2", "cancelled", "cancelled by the caller", None, False, 0.0, 3.0, SLO(), steps=1)
    assert end.latency_s == 3.0


def test_a_finished_job_is_forgotten():
    some = scheduler()
    job = some.submit(image(steps=1), 0.0)
    for now in range(3):
        run(some, float(now), [{"big": object()}])
    assert some.jobs == {}
    assert (job.state, job.calls_left, job.stage, job.cursor) == ({}, {}, None, None)
    asked = some.decisions
    assert some.next_batch("gpu", 9.0) is None
    assert some.decisions == asked  # nobody waits, so the policy is not even asked


def test_a_request_of_no_steps_ends_at_once():
    some = scheduler()
    nothing = Graph("nothing", loop(UNET, times=0))
    job = some.submit(Request("r1", nothing), 5.0)
    assert (job.status, job.output, job.ended_at, job.on_time) == ("done", {}, 5.0, True)
    assert some.jobs == {}
    assert some.pop_events() == [Ended("r1", "done", "", {}, True, 0.0, 5.0, SLO(), steps=0, started=False)]
    assert some.next_batch("gpu", 5.0) is None
    some.submit(Request("r1", nothing), 6.0)


def test_a_live_id_is_refused_and_an_ended_one_may_come_again():
    some = scheduler()
    some.submit(image("r1", steps=0), 0.0)
    with pytest.raises(RequestError, match="request id 'r1' is already being served"):
        some.submit(image("r1"), 0.0)
    run(some, 0.0)
    run(some, 1.0)
    assert some.submit(image("r1"), 2.0).status == "waiting"


def test_a_job_is_late_if_it_ends_after_its_deadline():
    some = scheduler()
    punctual = some.submit(image("r1", steps=0, slo=SLO(total=0.75)), 0.0)
    late = some.submit(image("r2", steps=0, slo=SLO(total=0.5)), 0.0)
    _, now = run(some, 0.0)
    _, now = run(some, now)
    assert now == 0.75
    assert (punctual.on_time, late.on_time) == (True, False)
    assert late.status == "done"


def test_the_policy_s_drops_are_answers_with_a_reason():
    some = scheduler(EDF())
    hopeless = some.submit(image("r1", slo=SLO(total=1.0)), 0.0)
    fine = some.submit(image("r2", slo=SLO(total=9.0)), 0.0)
    assert some.next_batch("gpu", 0.0).jobs == (fine,)
    assert (hopeless.status, hopeless.reason) == ("dropped", "hopeless: needs 2.750 s more, due in 1.000 s")
    assert facts(some.pop_events()) == [("r1", "dropped", hopeless.reason, 0.0)]
    assert list(some.jobs) == ["r2"]


def test_a_policy_may_wait_on_purpose():
    some = scheduler(Hand())
    some.submit(image(), 0.0)
    assert some.next_batch("gpu", 3.0) is None
    assert some.wake_at("gpu") == 4.0
    policy_in(some).choose = lambda view: Decision(view.jobs)
    assert some.next_batch("gpu", 4.0) is not None
    assert some.wake_at("gpu") is None


# -- an LLM: many outputs, a deadline each ----------------------------------------------------------


def test_tokens_are_emitted_one_by_one_until_the_end_of_the_sequence():
    some = scheduler()
    job = some.submit(chat(), 0.0)
    assert (job.calls_left, job.next_output_s, job.remaining_s) == ({"prefill": 1, "decode": 2}, 2.0, 2.0 + 2 * 0.25)
    for now, token in enumerate("abc", 1):
        run(some, float(now), [{"token": token, "eos": token == "c"}])
    events = some.pop_events()
    assert [(event.index, event.update["token"], event.at) for event in events[:3]] == [
        (0, "a", 3.0),
        (1, "b", 2.25),
        (2, "c", 3.25),
    ]
    assert facts(events[3:]) == [("r1", "done", "", 3.25)]
    assert (job.status, job.outputs, job.output) == ("done", 3, {"token": "c", "eos": True})


def test_the_work_to_the_next_output_is_one_decode_step():
    some = scheduler()
    job = some.submit(chat(about=100), 0.0)
    run(some, 0.0, [{"eos": False}])
    assert (job.next_output_s, job.remaining_s, job.calls_left) == (0.25, 99 * 0.25, {"decode": 99})
    run(some, 2.0, [{"eos": False}])
    assert (job.next_output_s, job.remaining_s, job.calls_left) == (0.25, 98 * 0.25, {"decode": 98})


def test_the_work_to_the_next_output_of_a_counted_loop_is_one_round():
    some = scheduler()
    job = some.submit(Request("r1", Graph("frames", loop(VAE, times=3))), 0.0)
    assert (job.next_output_s, job.remaining_s) == (0.25, 0.75)
    run(some, 0.0)
    assert (job.next_output_s, job.remaining_s) == (0.25, 0.5)


@pytest.mark.parametrize(
    "instants, late",
    [([2.0, 3.0, 4.0], False), ([0.5, 2.5, 4.0], False), ([2.5, 3.0, 4.0], True), ([1.0, 3.5, 3.6], True)],
)
def test_one_late_token_makes_a_request_late(instants, late):
    some = scheduler()
    job = some.submit(chat(slo=SLO(first=2.0, step=1.0)), 0.0)
    for k, at in enumerate(instants):
        batch = some.next_batch("gpu", 0.0)
        some.finish(batch, [{"eos": k == 2}], at)
    assert (job.status, job.late, job.on_time) == ("done", late, not late)


def test_an_image_keeps_its_first_promise_by_its_only_output():
    for first, late in ((0.75, False), (0.5, True)):
        some = scheduler()
        job = some.submit(image(steps=0, slo=SLO(first=first)), 0.0)
        _, now = run(some, 0.0)
        run(some, now)
        assert job.late is late


def test_what_comes_behind_the_last_output_has_to_be_in_time_too():
    for total, late in ((0.75, False), (0.5, True)):
        some = scheduler()
        job = some.submit(Request("r1", Graph("g", seq(VAE, TEXT)), 0.0, SLO(total=total)), 0.0)
        _, now = run(some, 0.0, [{"image": 1}])
        assert not job.late
        run(some, now)
        assert (job.late, job.output) == (late, {"image": 1})


def test_a_graph_without_outputs_keeps_its_first_promise_by_its_end():
    some = scheduler()
    job = some.submit(Request("r1", Graph("plain", TEXT), 0.0, SLO(first=0.25)), 0.0)
    run(some, 0.0)
    assert job.late


# -- sized steps ------------------------------------------------------------------------------------


def test_a_sized_step_costs_by_its_jobs_sizes():
    some = scheduler()
    some.submit(chat("r1", prompt=4), 0.0)
    some.submit(chat("r2", prompt=8), 0.0)
    batch = some.next_batch("gpu", 0.0)
    assert batch.sizes == (4, 8)
    assert batch.expected == 1.0 + 0.125 * (4 + 8) + 0.03125 * (16 + 64)


def test_a_prefill_in_chunks_moves_on_only_when_it_is_complete():
    some = scheduler(Hand(lambda view: Decision(view.jobs, sizes=dict.fromkeys(view.jobs, 6))))
    job = some.submit(chat(prompt=16), 0.0)
    assert (job.size, job.next_output_s) == (16, 1.0 + 2.0 + 8.0)
    batch, _ = run(some, 0.0, [{"kv": 6}])
    assert (batch.sizes, batch.expected) == ((6,), 1.0 + 0.75 + 1.125)
    assert (job.stage, job.computed, job.size, job.calls_left["prefill"]) == (PREFILL, 6, 10, 1)
    assert job.next_output_s == 1.0 + 1.25 + 3.125  # the 10 tokens that are left
    assert job.state == {"kv": 6}
    run(some, 1.0)
    assert (job.computed, job.size) == (12, 4)
    assert (some.pop_events(), job.outputs) == ([], 0)
    batch, _ = run(some, 2.0, [{"token": "a", "eos": False}])
    assert batch.sizes == (4,)  # never more than what is left
    assert (job.stage, job.computed, job.size) == (DECODE, 0.0, 17)
    assert [event.index for event in some.pop_events()] == [0]


def test_jobs_without_a_share_in_sizes_run_whole():
    some = scheduler(Hand(lambda view: Decision(view.jobs, sizes={view.jobs[0]: 3})))
    some.submit(chat("r1", prompt=16), 0.0)
    some.submit(chat("r2", prompt=8), 0.0)
    assert some.next_batch("gpu", 0.0).sizes == (3, 8)


def test_a_share_of_nothing_is_refused():
    some = scheduler(Hand(lambda view: Decision(view.jobs, sizes=dict.fromkeys(view.jobs, 0))))
    some.submit(chat(), 0.0)
    with pytest.raises(PolicyError, match="policy 'Hand' gave a job of stage 'prefill' a share of 0 of its step"):
        some.next_batch("gpu", 0.0)


def test_fused_stages_share_a_step():
    everyone = Hand(lambda view: Decision(view.jobs))
    some = scheduler(everyone)
    old = some.submit(chat("r1", prompt=4), 0.0)
    run(some, 0.0, [{"eos": False}])
    new = some.submit(chat("r2", prompt=8), 0.0)
    batch = some.next_batch("gpu", 1.0)
    assert (batch.stage, batch.jobs, batch.sizes) == ("llm", (new, old), (8, 5))
    assert batch.expected == (1.0 + 1.0 + 2.0) + 0.25  # the parts of both stages
    some.finish(batch, [{"eos": False}, {"eos": True}], 2.0)
    assert (new.stage, old.status) == (DECODE, "done")


def test_stages_without_a_common_label_cannot_share_a_step():
    some = scheduler(Hand(lambda view: Decision(view.jobs)))
    some.submit(chat("r1"), 0.0)
    some.submit(image("r2"), 0.0)
    with pytest.raises(PolicyError, match=r"mixed stages that cannot share a step: \['text', 'prefill'\]"):
        some.next_batch("gpu", 0.0)


def test_stages_without_any_label_cannot_share_a_step():
    some = scheduler(Hand(lambda view: Decision(view.jobs)))
    some.submit(Request("r1", Graph("one", TEXT)), 0.0)
    some.submit(Request("r2", Graph("two", UNET)), 0.0)
    with pytest.raises(PolicyError, match="cannot share a step"):
        some.next_batch("gpu", 0.0)


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
    assert "left 1 job(s)" in refused(lambda view: Decision(drop={view.jobs[0]: "no room"}), image("r1"), image("r2"))


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


# -- cancelling -------------------------------------------------------------------------------------


def test_cancelling_a_waiting_job_ends_it_at_once():
    some = scheduler()
    job = some.submit(image(), 0.0)
    assert some.cancel("r1", 1.0)
    assert (job.status, job.reason, job.ended_at) == ("cancelled", "cancelled by the caller", 1.0)
    assert some.jobs == {}
    assert some.next_batch("gpu", 1.0) is None


@pytest.mark.parametrize("how", ["finish", "fail", "error", "too few"])
def test_cancelling_a_running_job_ends_it_after_its_step(how):
    some = scheduler()
    job, other = some.submit(image("r1"), 0.0), some.submit(image("r2"), 0.0)
    batch = some.next_batch("gpu", 0.0)
    assert some.cancel("r1", 0.25)
    assert not some.cancel("r1", 0.25)  # that changed nothing more
    assert (job.status, some.pop_events()) == ("running", [])
    if how == "fail":
        some.fail(batch, ValueError("x"), 1.0)
    else:
        updates = {"finish": [{}, {}], "error": [StageFailed("x"), {}], "too few": [{}]}
        some.finish(batch, updates[how], 1.0)
    assert (job.status, job.ended_at) == ("cancelled", 1.0)
    assert other.status == ("waiting" if how in ("finish", "error") else "failed")


def test_cancelling_after_the_end_or_an_unknown_id_changes_nothing():
    some = scheduler()
    job = some.submit(image(steps=0), 0.0)
    run(some, 0.0)
    run(some, 1.0)
    assert not some.cancel("r1", 2.0)
    assert not some.cancel("nobody", 2.0)
    assert job.status == "done"


# -- what policies read: skipped, ran_last, joined_at -----------------------------------------------


def choosing(*names):
    """A policy that runs the named jobs."""
    return Hand(lambda view: Decision([job for job in view.jobs if job.id in names]))


def test_skipped_counts_steps_of_the_stage_that_ran_without_the_job():
    some = scheduler(choosing("r0"))
    graph = Graph("g", loop(UNET, times=9))
    ran, waited = (some.submit(Request(f"r{i}", graph), 0.0) for i in range(2))
    assert (ran.skipped, ran.ran_last, waited.skipped) == (0, False, 0)
    for now in range(3):
        run(some, float(now))
    assert (ran.skipped, ran.ran_last, waited.skipped, waited.ran_last) == (0, True, 3, False)
    late = some.submit(Request("r2", graph), 3.0)
    assert (late.skipped, late.ran_last) == (0, False)
    set_policy(some, choosing("r1"))
    run(some, 3.0)
    assert [job.skipped for job in (ran, waited, late)] == [1, 3, 1]  # running does not pay skips off
    assert [job.ran_last for job in (ran, waited, late)] == [False, True, False]


def test_steps_of_other_stages_skip_nobody():
    some = scheduler(choosing("r0"))
    some.submit(Request("r0", Graph("t", loop(TEXT, times=5))), 0.0)
    other = some.submit(Request("r1", Graph("u", UNET)), 0.0)
    run(some, 0.0)
    assert other.skipped == 0


def test_a_step_on_another_worker_skips_no_running_job():
    some = scheduler(choosing("r0"), workers=2)
    graph = Graph("g", loop(UNET, times=9))
    jobs = [some.submit(Request(f"r{i}", graph), 0.0) for i in range(3)]
    first = some.next_batch("gpu", 0.0, worker=0)
    set_policy(some, choosing("r1"))
    second = some.next_batch("gpu", 0.5, worker=1)
    some.finish(first, [{}], 1.0)
    some.finish(second, [{}], 1.5)
    assert [job.skipped for job in jobs] == [0, 1, 2]  # r1 waited while r0's step began, r0 never did
    assert [job.ran_last for job in jobs] == [False, True, False]  # r1 was in the latest step
    run(some, 2.0, worker=1)
    assert [job.skipped for job in jobs] == [1, 1, 3]


def test_skips_and_waiting_begin_anew_at_another_stage():
    some = scheduler(choosing("r0"))
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(2)]
    run(some, 0.0)
    assert (jobs[0].joined_at, jobs[1].joined_at, jobs[1].skipped) == (0.5, 0.0, 1)
    set_policy(some, choosing("r1"))
    _, now = run(some, 3.0)
    assert (jobs[1].stage, jobs[1].skipped, jobs[1].joined_at) == (UNET, 0, now)
    assert jobs[0].joined_at == 0.5
    run(some, 4.0)
    assert jobs[1].joined_at == now  # another round of the same stage is no new coming


def test_a_view_shows_the_jobs_that_can_run_by_stage_and_what_runs_elsewhere():
    some = scheduler(choosing("r1"), workers=2)
    jobs = [some.submit(image(f"r{i}"), 0.0) for i in range(3)]
    run(some, 0.0)
    batch = some.next_batch("gpu", 1.0)
    assert ids(batch.jobs) == ["r1"]
    set_policy(some, Hand())
    some.next_batch("gpu", 1.5, worker=1)
    view = policy_in(some).view
    assert (view.now, view.worker, view.pool.name) == (1.5, 1, "gpu")
    assert view.queues == {"text": [jobs[0], jobs[2]]}
    assert view.running == (batch,)
    assert view.jobs == [jobs[0], jobs[2]]


def test_jobs_wait_in_the_order_in_which_they_came_to_the_stage():
    some = scheduler(choosing("r2"))
    for i in range(3):
        some.submit(image(f"r{i}"), 0.0)
    run(some, 0.0)
    set_policy(some, choosing("r0", "r1"))
    run(some, 1.0)
    set_policy(some, Hand())
    some.next_batch("gpu", 2.0)
    assert ids(policy_in(some).view.queues["unet"]) == ["r2", "r0", "r1"]


# -- what views tell of the past ---------------------------------------------------------------------


def counts(demand):
    return {stage: calls.count for stage, calls in demand.calls.items()}


def test_a_view_tells_what_the_latest_hundred_requests_asked_for():
    some = scheduler()
    for i in range(130):
        some.submit(image(f"r{i}", steps=1 + i, arrival=float(i)), float(i))
        some.cancel(f"r{i - 1}", float(i))  # over, but not forgotten
        if i in (0, 99, 129):
            recent = seen(some, float(i)).recent
            assert [demand.at for demand in recent] == [float(at) for at in range(max(0, i - 99), i + 1)]
            assert all(counts(demand) == {"text": 1, "unet": 1 + demand.at, "vae": 1} for demand in recent)


def test_what_a_request_asked_for_is_as_it_was_when_it_came():
    some = scheduler()
    for request in (
        image("r1", steps=3, slo=SLO(10.0, weight=5.0), arrival=2.0),
        image("r2", steps=3),
        image("r3", steps=3, slo=SLO(20.0, first=8.0)),
        chat("r4", about=3, slo=SLO(first=4.0, step=1.0)),
    ):
        some.submit(request, 2.0)
    before = seen(some, 2.0).recent
    set_policy(some, PATIENT)
    _, now = run(some, 2.0)
    run(some, now)
    recent = seen(some, 9.0).recent
    assert all(one is other for one, other in zip(recent, before, strict=True))
    assert [(demand.at, demand.weight) for demand in recent] == [(2.0, 5.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)]
    assert [demand.budget for demand in recent[:3]] == [10.0, math.inf, 8.0]
    assert [demand.first for demand in recent] == [math.inf, math.inf, 8.0, 4.0]
    assert recent[0].calls == {"text": Calls(1, False, 4), "unet": Calls(3, True, 4), "vae": Calls(1, False, 2)}
    assert recent[3].calls == {"prefill": Calls(1, False, 4, size=4), "decode": Calls(2, True, 8, size=4)}


def test_a_request_with_a_promise_for_each_output_has_until_the_last_one():
    some = scheduler()
    job = some.submit(chat(about=3, slo=SLO(first=4.0, step=1.0)), 0.0)
    set_policy(some, Hand(lambda view: Decision(view.jobs)))
    deadlines = [job.deadline]
    _, now = run(some, 0.0)
    deadlines.append(job.deadline)
    run(some, now, [{"eos": False}])
    deadlines.append(job.deadline)
    assert deadlines[1:] == [4.0 + 2 * 1.0] * 2
    assert seen(some, now).recent[0].budget == deadlines[0] == 4.0 + 2 * 1.0


def test_a_refused_request_asked_for_nothing():
    some = scheduler()
    some.submit(image("r1"), 0.0)
    with pytest.raises(RequestError):
        some.submit(image("r1"), 0.0)
    assert len(seen(some).recent) == 1


def speeds(*ratios):
    """The speed of the stage "unet" after each of its steps, which took so many times their profiled latency."""
    some, found = scheduler(), []
    some.submit(image(steps=len(ratios) + 1), 0.0)
    _, now = run(some, 0.0)
    for ratio in ratios:
        set_policy(some, PATIENT)
        batch = some.next_batch("gpu", now)
        now += ratio * batch.expected
        some.finish(batch, [{}], now)
        found.append(seen(some, now).speed["unet"])
    return found


def test_a_view_tells_how_fast_stages_have_been_lately():
    some = scheduler()
    some.submit(image(steps=1), 0.0)
    assert seen(some).speed == {}
    set_policy(some, PATIENT)
    some.finish(some.next_batch("gpu", 0.0), [{}], 0.5 * 1.5)
    assert seen(some, 1.0).speed == {"text": 1.0}  # one step says little
    set_policy(some, PATIENT)
    run(some, 1.0)
    assert seen(some, 3.0).speed == {"text": 1.0, "unet": 1.0}


def test_the_speed_is_that_of_most_blocks_of_steps_and_of_the_profile_before():
    assert speeds(1.5, 1.0, 0.75, 1.25, 1.75) == [1.0] * 5
    wrong = speeds(*[1.5] * 60)
    assert wrong[:29] == pytest.approx([1.0] * 29)  # two blocks of ten steps and three of the profile
    assert wrong[39] > 1.45
    steady = speeds(*[1.0] * 60, *[1.5] * 70)
    assert steady[:110] == pytest.approx([1.0] * 110)  # most blocks are the quick ones
    assert steady[119:129] == pytest.approx([1.25] * 10)
    assert steady[129] == pytest.approx(1.5)


def test_one_outlier_makes_no_stage_look_hopeless():
    for outlier in (500.0, 0.001):
        assert speeds(outlier, *[1.0] * 40)[-1] == pytest.approx(1.0)
        assert speeds(*[1.0] * 40, outlier, *[1.0] * 9)[-1] == pytest.approx(1.0)


def test_a_step_that_failed_as_a_whole_says_nothing_of_the_speed():
    some = scheduler()
    some.submit(image("r1"), 0.0)
    some.fail(some.next_batch("gpu", 0.0), RuntimeError("out of memory"), 5.0)
    some.submit(image("r2"), 5.0)
    some.finish(some.next_batch("gpu", 5.0), [], 50.0)
    some.submit(image("r3"), 50.0)
    assert seen(some, 50.0).speed == {}


# -- pools ------------------------------------------------------------------------------------------


def test_in_a_sticky_pool_a_job_stays_on_its_worker():
    some = scheduler(Hand(lambda view: Decision(view.jobs[:1])), workers=2, sticky=True)
    for i in range(2):
        some.submit(image(f"r{i}"), 0.0)
    for worker in (0, 1):
        some.finish(some.next_batch("gpu", 0.0, worker), [{}], 1.0)
    for worker in (1, 0):
        batch = some.next_batch("gpu", 1.0, worker)
        assert ids(batch.jobs) == [f"r{worker}"]
    assert some.next_batch("gpu", 1.0, 0) is None


def test_in_a_pool_that_is_not_sticky_a_job_may_change_workers():
    some = scheduler(Hand(lambda view: Decision(view.jobs[:1])), workers=2)
    job = some.submit(image(), 0.0)
    run(some, 0.0, worker=1)
    run(some, 1.0, worker=0)
    assert job.worker == 0


def test_a_job_s_worker_is_forgotten_when_it_moves_to_another_pool():
    pools = [Pool("small", ("text", "vae"), workers=2, sticky=True), Pool("big", ("unet",), workers=2, sticky=True)]
    some = Scheduler(pools, PATIENT, PROFILES)
    job = some.submit(image(steps=2), 0.0)
    assert some.next_batch("big", 0.0) is None
    run(some, 0.0, worker=1, pool="small")
    assert (job.stage, job.worker) == (UNET, -1)
    assert some.next_batch("small", 1.0, 1) is None
    run(some, 1.0, worker=0, pool="big")
    assert job.worker == 0
    run(some, 2.0, worker=0, pool="big")
    assert (job.stage, job.worker) == (VAE, -1)
    run(some, 3.0, worker=0, pool="small")
    assert job.status == "done"


def test_pools_need_different_names():
    with pytest.raises(GraphError, match=r"pools need different names, got \['gpu', 'gpu'\]"):
        Scheduler([Pool("gpu", ("text",)), Pool("gpu", ("vae",))], PATIENT, PROFILES)


def test_a_pool_needs_a_worker():
    with pytest.raises(GraphError, match="pool 'gpu': workers must be 1 or more, got 0"):
        Scheduler([Pool("gpu", ("text",), workers=0)], PATIENT, PROFILES)


def test_a_stage_is_in_one_pool():
    with pytest.raises(GraphError, match="stage 'text' of pool 'b' is served already, by pool 'a'"):
        Scheduler([Pool("a", ("text",)), Pool("b", ("vae", "text"))], PATIENT, PROFILES)


def test_a_stage_of_a_pool_needs_a_profile():
    with pytest.raises(ProfileError, match="stage 'upscale' of pool 'gpu' has no profile"):
        Scheduler([Pool("gpu", ("text", "upscale"))], PATIENT, PROFILES)


def test_a_graph_s_stages_must_be_served():
    some = Scheduler([Pool("gpu", ("text", "unet"))], PATIENT, PROFILES)
    with pytest.raises(GraphError, match=r"stage 'vae' is in no pool; stages served: \['text', 'unet'\]"):
        some.submit(image(), 0.0)


def test_two_graphs_may_share_stages_but_not_their_names():
    some = scheduler()
    some.submit(image("r1"), 0.0)
    some.submit(Request("r2", Graph("again", seq(TEXT, UNET))), 0.0)
    assert len(some.next_batch("gpu", 0.0)) == 2
    with pytest.raises(GraphError, match="graph 'other': another graph already has a stage named 'text'"):
        some.submit(Request("r3", Graph("other", Stage("text"))), 0.0)


def test_all_errors_are_of_one_family():
    for error in (GraphError, PolicyError, ProfileError, RequestError, StageFailed):
        assert issubclass(error, NeustreamError)


# -- learning and growing -----------------------------------------------------------------------------


def test_steps_that_keep_taking_longer_correct_the_profile_and_the_work_that_is_left():
    stage = Stage("a", max_batch=4)
    graph = Graph("g", loop(stage, times=130))
    profile = TableProfile("a", [1, 4], [1.0, 2.0])
    scheduler = Scheduler([Pool("p", ("a",))], FCFS(drop_hopeless=False), {"a": profile}, correct=True)
    job = scheduler.submit(Request("r", graph), 0.0)
    now, events = 0.0, []
    for _ in range(100):
        batch = scheduler.next_batch("p", now)
        now += 1.5
        scheduler.finish(batch, [{}], now)
        events += scheduler.pop_events()
    assert [type(event).__name__ for event in events] == ["Corrected"]
    assert events[0].factors == scheduler.times.corrections["a"] == {0: 1.5}
    assert scheduler.times.profiles["a"].latency(1) == 1.5
    assert job.remaining_s == pytest.approx(30 * 1.5)
    assert scheduler.next_batch("p", now).expected == 1.5
    assert profile.latency(1) == 1.0  # the one that was given is as it was


def test_without_being_asked_to_a_scheduler_corrects_nothing():
    stage = Stage("a")
    graph = Graph("g", loop(stage, times=20))
    scheduler = Scheduler([Pool("p", ("a",))], FCFS(), {"a": TableProfile("a", [1], [1.0])})
    scheduler.submit(Request("r", graph), 0.0)
    for step in range(15):
        scheduler.finish(scheduler.next_batch("p", 3.0 * step), [{}], 3.0 * step + 3.0)
    assert scheduler.times.corrections == {} and scheduler.times.profiles["a"].latency(1) == 1.0


def test_stages_may_be_added_while_others_are_served():
    first, second = Stage("a"), Stage("b")
    profile = TableProfile("x", [1], [1.0])
    scheduler = Scheduler([Pool("p", ("a",))], FCFS(), {"a": profile})
    scheduler.submit(Request("r", Graph("g", first)), 0.0)
    with pytest.raises(GraphError, match="'b'"):
        scheduler.submit(Request("s", Graph("h", second)), 0.0)
    scheduler.add("p", {"b": profile})
    scheduler.submit(Request("s", Graph("h", second)), 0.0)
    assert {job.id for job in scheduler.next_batch("p", 0.0).jobs} == {"r"}
    with pytest.raises(GraphError, match="stage 'a' of pool 'p' is served already, by pool 'p'"):
        scheduler.add("p", {"a": profile})
