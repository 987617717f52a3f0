"""Views in, decisions out: the simple rules, and that no policy remembers or changes a thing."""

from __future__ import annotations

import dataclasses

import pytest
from hand import chosen, dropped, ids, seen
from images import (
    FAR,
    IMAGE,
    LOOP,
    PREVIEW,
    TEXT,
    TWO_LOOPS,
    VAE,
    ask,
    run,
    steps_run,
    waiting,
)

from neustream import (
    EDF,
    FCFS,
    POLICIES,
    Graph,
    Job,
    Serial,
    Static,
    TableProfile,
    View,
    seq,
)

# -- every policy -----------------------------------------------------------------------------------


def busy():
    """Fresh jobs, started ones at several stages and on two workers, skipped ones, hopeless ones."""
    some = waiting(*[ask(f"r{i}", 2 + i % 2, total=[FAR, 40.0, 2.0][i % 3]) for i in range(8)], workers=2)
    run(some, "r0", "r1", "r3", "r7")
    run(some, "r4", "r6", worker=1)
    run(some, "r0", "r3", now=1.0)
    run(some, "r1", "r3", now=2.0, worker=1)
    run(some, "r0", now=3.0)
    run(some, "r4", now=4.0, worker=1, end=False)
    some.submit(ask("r8", arrival=5.0, total=30.0), 5.0)
    return some


def facts(job):
    return {name: getattr(job, name) for name in Job.__slots__} | {
        "left": dict(job.calls_left),
        "state": dict(job.state),
    }


@pytest.mark.parametrize("policy", [make() for make in POLICIES.values()], ids=list(POLICIES))
def test_deciding_is_pure(policy):
    some = busy()
    for worker in (0, 1):
        view = seen(some, 5.0, worker)
        before = [facts(job) for job in some.jobs.values()]
        queues = {stage: list(jobs) for stage, jobs in view.queues.items()}
        one, two = policy.decide(view), policy.decide(view)
        assert list(one.jobs) == list(two.jobs)
        assert one.drop == two.drop
        assert (one.wake_at, one.sizes) == (two.wake_at, two.sizes)
        assert [facts(job) for job in some.jobs.values()] == before
        assert {stage: list(jobs) for stage, jobs in view.queues.items()} == queues


@pytest.mark.parametrize("policy", [make() for make in POLICIES.values()], ids=list(POLICIES))
def test_a_policy_keeps_nothing_between_calls(policy):
    assert dataclasses.is_dataclass(policy)
    field = dataclasses.fields(policy)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, field, None)


@pytest.mark.parametrize("policy", [make() for make in POLICIES.values()], ids=list(POLICIES))
def test_a_decision_can_be_carried_out(policy):
    some = busy()
    view = seen(some, 5.0, 0)
    decision = policy.decide(view)
    (stage,) = {job.stage for job in decision.jobs}
    assert 1 <= len(decision.jobs) <= view.limit(stage.name)
    assert not set(decision.jobs) & set(decision.drop)
    assert all(decision.drop.values())  # each with its reason


@pytest.mark.parametrize("name", POLICIES)
def test_a_lonely_request_is_served_at_once(name):
    assert steps_run(POLICIES[name](), ask("r0", steps=2)) == [
        ("text", ["r0"]),
        ("unet", ["r0"]),
        ("unet", ["r0"]),
        ("vae", ["r0"]),
    ]


# -- what a view tells ------------------------------------------------------------------------------


def test_a_limit_is_what_stage_and_profile_both_allow():
    view = seen(waiting(ask("r0")))
    assert view.limit("text") == 8
    short = {"text": TableProfile("text", [1, 3], [1.0, 1.0])}
    assert View(0.0, view.pool, 0, view.queues, short).limit("text") == 3


def test_work_in_batches_goes_as_far_as_stages_and_profiles_do():
    view = seen(waiting(ask("r0", steps=2)))
    (job,) = view.jobs
    assert view.work(job, 1) == job.remaining_s == 0.5 + 2 * 1.0 + 0.25
    assert view.work(job, 3) == 0.5 + 2 * 1.5 + 0.25
    assert view.work(job, 100) == 0.5 + 2 * 4.0 + 0.25


def test_hopeless_is_who_would_be_late_even_alone():
    some = waiting(ask("r0", total=4.75), ask("r1", total=4.7), ask("r2", first=4.7), ask("r3", total=9.0))
    assert ids(seen(some).hopeless()) == ["r1", "r2"]
    assert seen(some).hopeless()[some.jobs["r1"]] == "hopeless: needs 4.750 s more, due in 4.700 s"
    assert ids(seen(some, now=0.1).hopeless()) == ["r0", "r1", "r2"]
    some = waiting(ask("r0", total=4.25, graph=PREVIEW), ask("r1", total=4.0, graph=PREVIEW))
    assert ids(seen(some).hopeless()) == ["r1"]  # the output could be in time, the end could not


def test_stages_that_run_once_go_first_and_the_last_of_them_foremost():
    some = waiting(*[ask(f"r{i}", steps=1) for i in range(3)])
    run(some, "r0", "r1")
    assert seen(some).first_stage(lambda job: job.arrival) == "text"
    assert seen(some).first_stage(lambda job: -100.0) == "text"  # keys rank looped stages only
    run(some, "r0")
    assert set(seen(some).queues) == {"text", "unet", "vae"}
    assert seen(some).first_stage(lambda job: job.arrival) == "vae"
    run(some, "r0")
    run(some, "r2")
    assert seen(some).first_stage(lambda job: job.arrival) == "unet"


def test_among_looped_stages_the_smallest_key_decides():
    some = waiting(ask("r0", steps=1, graph=TWO_LOOPS), ask("r1", steps=5, graph=TWO_LOOPS))
    run(some, "r0")
    view = seen(some)
    assert view.first_stage(lambda job: {"r0": 1.0, "r1": 2.0}[job.id]) == "refine"
    assert view.first_stage(lambda job: {"r0": 3.0, "r1": 2.0}[job.id]) == "unet"


def test_jobs_that_are_given_up_do_not_choose_the_stage():
    some = waiting(ask("r0"), ask("r1"))
    run(some, "r0")
    view = seen(some)
    assert view.first_stage(lambda job: job.arrival, without={some.jobs["r1"]: ""}) == "unet"
    assert view.first_stage(lambda job: job.arrival, without=dict.fromkeys(view.jobs, "")) is None


# -- serial -----------------------------------------------------------------------------------------


def test_serial_runs_one_request_after_the_other():
    steps = steps_run(Serial(), ask("r0", 2, arrival=1.0), ask("r1", 1, arrival=0.5))
    assert steps == [
        *[("text", ["r1"]), ("unet", ["r1"]), ("vae", ["r1"])],
        *[("text", ["r0"]), ("unet", ["r0"]), ("unet", ["r0"]), ("vae", ["r0"])],
    ]


def test_serial_leaves_other_workers_requests_alone():
    some = waiting(ask("r0"), ask("r1", arrival=1.0), ask("r2", arrival=2.0), workers=2)
    run(some, "r0", worker=1, now=2.0)
    assert chosen(Serial(), some, worker=1, now=2.0) == ["r0"]
    assert chosen(Serial(), some, worker=0, now=2.0) == ["r1"]


def test_serial_serves_however_late_unless_told_to_drop_before_a_start():
    some = waiting(ask("r0", total=1.0), ask("r1"))
    assert (chosen(Serial(), some), dropped(Serial(), some)) == (["r0"], [])
    strict = Serial(drop_hopeless=True)
    assert (chosen(strict, some), dropped(strict, some)) == (["r1"], ["r0"])
    run(some, "r0")
    assert (chosen(strict, some), dropped(strict, some)) == (["r0"], [])  # begun is begun


# -- static -----------------------------------------------------------------------------------------


def test_static_lets_nobody_join_until_all_are_done():
    some = waiting(ask("r0", 1), ask("r1", 2))
    policy = Static()
    for stage, names in [("text", ["r0", "r1"]), ("unet", ["r0", "r1"]), ("unet", ["r1"]), ("vae", ["r0", "r1"])]:
        if stage == "unet":
            some.submit(ask(f"new{len(some.jobs)}", arrival=0.0), 0.0)
        assert chosen(policy, some) == names
        assert {some.jobs[name].stage.name for name in names} == {stage}
        run(some, *names)
    assert chosen(policy, some) == ["new2", "new3"]


def test_static_batches_are_as_large_as_the_looped_stages_allow():
    some = waiting(*[ask(f"r{i}") for i in range(6)])
    assert chosen(Static(), some) == ["r0", "r1", "r2", "r3"]  # text takes 8, the loop 4
    assert chosen(Static(max_batch=3), some) == ["r0", "r1", "r2"]


def test_static_takes_stages_behind_the_loop_in_several_steps():
    steps = steps_run(Static(), *[ask(f"r{i}", 1) for i in range(4)])
    assert steps[2:] == [("vae", ["r0", "r1"]), ("vae", ["r2", "r3"])]


def test_static_without_loops_is_bound_by_all_stages():
    graph = Graph("plain", seq(TEXT, VAE))
    some = waiting(*[ask(f"r{i}", graph=graph) for i in range(4)])
    assert chosen(Static(), some) == ["r0", "r1"]


def test_static_takes_the_oldest_first_and_one_graph_at_a_time():
    graphs = [IMAGE, LOOP, TWO_LOOPS, LOOP]
    some = waiting(*[ask(f"r{i}", arrival=[2.0, 1.0, 2.0, 3.0][i], graph=graph) for i, graph in enumerate(graphs)])
    assert chosen(Static(), some, now=3.0) == ["r1", "r3"]


def test_static_goes_on_with_one_graph_after_the_other():
    some = waiting(ask("r0", 1, graph=TWO_LOOPS), ask("r1", 1, arrival=1.0, graph=IMAGE))
    run(some, "r0", now=1.0)
    run(some, "r1", now=1.0)
    assert [job.stage.name for job in some.jobs.values()] == ["refine", "unet"]  # neither graph has both
    assert chosen(Static(), some, now=2.0) == ["r0"]


def test_static_drops_before_the_start_if_told_to():
    some = waiting(ask("r0", total=1.0), ask("r1"))
    assert chosen(Static(), some) == ["r0", "r1"]
    strict = Static(drop_hopeless=True)
    assert (chosen(strict, some), dropped(strict, some)) == (["r1"], ["r0"])
    run(some, "r0", "r1")
    assert (chosen(strict, some), dropped(strict, some)) == (["r0", "r1"], [])


# -- fcfs and edf -----------------------------------------------------------------------------------


def test_fcfs_runs_the_oldest_whatever_their_round():
    some = waiting(*[ask(f"r{i}", 9, arrival=[3.0, 1.0, 2.0, 5.0, 4.0][i], graph=LOOP) for i in range(5)])
    assert chosen(FCFS(), some, now=5.0) == ["r1", "r2", "r0", "r4"]
    run(some, "r3", now=5.0)
    assert chosen(FCFS(), some, now=5.0) == ["r1", "r2", "r0", "r4"]
    some.cancel("r2", 5.0)
    assert chosen(FCFS(), some, now=5.0) == ["r1", "r0", "r4", "r3"]  # rounds 0 and 1 in one step


def test_fcfs_gives_up_the_hopeless_unless_told_not_to():
    some = waiting(ask("r0", total=1.0), ask("r1"))
    assert (chosen(FCFS(), some), dropped(FCFS(), some)) == (["r1"], ["r0"])
    patient = FCFS(drop_hopeless=False)
    assert (chosen(patient, some), dropped(patient, some)) == (["r0", "r1"], [])


@pytest.mark.parametrize("policy", [FCFS(), EDF()])
def test_step_level_policies_may_drop_everyone(policy):
    some = waiting(ask("r0", total=1.0), ask("r1", total=2.0))
    assert (chosen(policy, some), dropped(policy, some)) == ([], ["r0", "r1"])


def test_edf_runs_the_earliest_deadline_first():
    some = waiting(*[ask(f"r{i}", total=50.0 - i, graph=LOOP) for i in range(6)])
    assert chosen(EDF(), some) == ["r5", "r4", "r3", "r2"]


def test_edf_counts_the_next_output_where_that_is_due_earlier():
    some = waiting(ask("r0", total=50.0), ask("r1", total=90.0, first=40.0), ask("r2", total=45.0))
    assert chosen(EDF(), some) == ["r1", "r2", "r0"]


def test_edf_gives_up_the_hopeless_unless_told_not_to():
    some = waiting(ask("r0"), ask("r1", total=1.0))
    assert (chosen(EDF(), some), dropped(EDF(), some)) == (["r0"], ["r1"])
    assert chosen(EDF(drop_hopeless=False), some) == ["r1", "r0"]
