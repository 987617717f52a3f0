"""The state machine: requests from submission to their end, generations, cancelling, pools."""

from __future__ import annotations

import pytest
from hand import Hand, facts, ids
from scheduled import (
    CHAT,
    IMAGE,
    PATIENT,
    PROFILES,
    TEXT,
    UNET,
    VAE,
    chat,
    image,
    run,
    scheduler,
)
from toys import policy_in

from neustream import (
    EDF,
    SLO,
    Decision,
    Graph,
    GraphError,
    NeustreamError,
    PolicyError,
    Pool,
    ProfileError,
    Request,
    RequestError,
    Scheduler,
    Stage,
    StageFailed,
    alone_s,
    loop,
    seq,
)
from neustream.core.events import Emitted, Ended, Ending

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
        Ended(
            "r1",
            "done",
            "",
            {"image": "x"},
            on_time=True,
            arrival=0.25,
            at=1.25,
            slo=slo,
            steps=0,
            waited_s=0.0,
            outputs=1,
        ),
    ]
    assert some.pop_events() == []
    some.cancel("r2", 3.0)
    (end,) = some.pop_events()
    assert end == Ended(
        "r2", "cancelled", "cancelled by the caller", None, False, 0.0, 3.0, SLO(), steps=1, waited_s=0.25
    )
    assert end.latency_s == 3.0


def test_an_end_says_how_long_the_request_waited():
    some = scheduler()
    some.submit(image("r1", steps=0, arrival=0.25), 0.25)
    some.submit(image("never", steps=0), 0.25)
    some.cancel("never", 0.5)
    run(some, 2.0)
    run(some, 3.0, [{}])
    ends = [event for event in some.pop_events() if isinstance(event, Ended)]
    assert [(end.id, end.waited_s, end.started) for end in ends] == [("never", None, False), ("r1", 1.75, True)]


def test_a_finished_job_is_forgotten():
    some = scheduler()
    job = some.submit(image(steps=1), 0.0)
    for now in range(3):
        run(some, float(now), [{"big": object()}])
    assert some.jobs == {}
    assert (job.state, job.calls_left, job.stage, job.cursor) == ({}, {}, None, None)
    asked = some.asked.decisions
    assert some.next_batch("gpu", 9.0) is None
    assert some.asked.decisions == asked  # nobody waits, so the policy is not even asked


def test_a_request_of_no_steps_ends_at_once():
    some = scheduler()
    nothing = Graph("nothing", loop(UNET, times=0))
    job = some.submit(Request("r1", nothing), 5.0)
    assert (job.status, job.output, job.ended_at, job.on_time) == ("done", {}, 5.0, True)
    assert some.jobs == {}
    assert some.pop_events() == [Ended("r1", "done", "", {}, True, 0.0, 5.0, SLO(), steps=0)]
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
    assert (job.status, some.pop_events()) == ("running", [Ending("r1", "r1", "gpu", 0.25)])
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
