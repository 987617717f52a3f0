"""What a scheduler tells policies: sizes, who was skipped, how long steps took; what it learns."""

from __future__ import annotations

import math

import pytest
from hand import Hand, ids, seen, set_policy
from scheduled import (
    DECODE,
    PATIENT,
    PREFILL,
    TEXT,
    UNET,
    chat,
    choosing,
    image,
    run,
    scheduler,
)
from toys import policy_in

from neustream import (
    FCFS,
    SLO,
    Decision,
    Graph,
    GraphError,
    PolicyError,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    TableProfile,
    loop,
)
from neustream.core.demand import Calls

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


# -- what policies read: skipped, ran_last, joined_at -----------------------------------------------


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
