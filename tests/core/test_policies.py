"""Views in, decisions out: the rule of each policy, and that none of them remembers or changes a thing."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hand import Hand, begin, chosen, dropped, ids, seen
from toys import batches, engine

from neustream import (
    EDF,
    FCFS,
    POLICIES,
    SLO,
    Clockwork,
    ConfigError,
    EventLog,
    Graph,
    Job,
    LeastLaxity,
    LinearProfile,
    NeuStream,
    Pool,
    Request,
    Scheduler,
    Serial,
    SlackRanked,
    Stage,
    Static,
    SumProfile,
    Symphony,
    TableProfile,
    View,
    load_profile,
    loop,
    seq,
)

TEXT, UNET, VAE = Stage("text", max_batch=8), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)


def steps_of(job):
    return job.params["steps"]


IMAGE = Graph("image", seq(TEXT, loop(UNET, times=steps_of), VAE))
LOOP = Graph("loop", loop(UNET, times=steps_of))
PREVIEW = Graph("preview", seq(VAE, loop(UNET, times=steps_of)))  # its only output comes first
REFINE = Stage("refine", max_batch=4)
TWO_LOOPS = Graph("two loops", seq(loop(UNET, times=steps_of), loop(REFINE, times=2)))
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=8),
    "unet": TableProfile("unet", [1, 2, 3, 4], [1.0, 1.25, 1.5, 4.0]),
    "refine": LinearProfile("refine", base=1.0, max_batch=4),
    "vae": LinearProfile("vae", base=0.25, max_batch=2),
}
FAR = math.inf


def ask(id, steps=4, arrival=0.0, total=FAR, graph=IMAGE, **slo):
    return Request(id, graph, arrival, SLO(total=total, **slo), {"steps": steps})


def waiting(*requests, workers=1, policy=None):
    """A scheduler with these requests waiting; tests move them with `run`."""
    some = Scheduler([Pool("gpu", tuple(PROFILES), workers)], policy or Hand(), PROFILES)
    for request in requests:
        some.submit(request, request.arrival)
    return some


def run(some, *names, now=0.0, worker=0, end=True):
    """One step of the named jobs on `worker`."""
    batch = begin(some, *names, now=now, worker=worker)
    if end:
        some.finish(batch, [{}] * len(batch), now)
    return batch


def steps_run(policy, *requests):
    """All steps of a run with one worker, one after the other: (stage, ids)."""
    some, now, steps = waiting(*requests, policy=policy), 0.0, []
    while batch := some.next_batch("gpu", now):
        now += batch.expected
        some.finish(batch, [{}] * len(batch), now)
        steps.append((batch.stage, ids(batch.jobs)))
    assert not some.jobs
    return steps


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


# -- clockwork --------------------------------------------------------------------------------------


def units(*steps_and_totals, workers=1):
    """Requests of one looped stage: 1, 1.25, 1.5 or 4 s a step in batches of 1 to 4."""
    requests = [ask(f"r{i}", steps, total=total, graph=LOOP) for i, (steps, total) in enumerate(steps_and_totals)]
    return waiting(*requests, workers=workers)


def test_clockwork_batches_equal_step_counts_only():
    some = units((4, 100.0), (5, 110.0), (4, 100.0))
    assert chosen(Clockwork(), some) == ["r0", "r2"]


def test_clockwork_takes_the_earliest_latest_start():
    some = units((4, 100.0), (5, 50.0), (4, 100.0))
    assert chosen(Clockwork(), some) == ["r1"]


def test_clockwork_counts_the_longer_batches_of_a_group_as_offers_too():
    # alone, r0 must start by 16 and r3 by 14.5; but the batch of r0 to r2 takes 6 s, so by 14
    some = units((4, 20.0), (4, 20.0), (4, 20.0), (5, 19.5))
    assert chosen(Clockwork(), some) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_clockwork_runs_the_largest_batch_whose_members_all_make_it(total, most):
    some = units(*[(4, total)] * 4)
    assert len(chosen(Clockwork(), some)) == most


def test_clockwork_grows_a_batch_up_to_the_first_size_that_fails():
    bumpy = {"unet": TableProfile("unet", [1, 2, 3], [1.0, 3.0, 2.0])}
    some = units(*[(4, 10.0)] * 3)
    assert chosen(Clockwork(plan=bumpy), some) == ["r0"]  # 2 would take 12 s, 3 only 8 s


def test_clockwork_leaves_out_of_a_batch_who_would_not_make_it_there():
    some = units((4, 4.5), (4, 90.0), (4, 90.0))
    assert chosen(Clockwork(), some) == ["r1", "r2"]
    assert dropped(Clockwork(), some) == []


def test_clockwork_batches_no_larger_than_the_artifact_did():
    some = units(*[(4, 100.0)] * 4)
    assert chosen(Clockwork(max_batch=2), some) == ["r0", "r1"]


def test_clockwork_drops_who_cannot_be_on_time_alone():
    some = units((4, 3.0), (4, 90.0))
    assert chosen(Clockwork(), some) == ["r1"]
    (reason,) = Clockwork().decide(seen(some)).drop.values()
    assert reason == "expired: needs 4.000 s, due in 3.000 s"


def test_clockwork_plans_a_little_ahead():
    some = units((4, 4.0005))
    assert dropped(Clockwork(), some) == ["r0"]
    assert chosen(Clockwork(lead_s=0.0), some) == ["r0"]


def test_clockwork_lets_nobody_join_a_running_batch():
    some = units((4, 90.0), (4, 90.0))
    run(some, "r0", "r1")
    some.submit(ask("new", 3, total=4.0, graph=LOOP), 0.0)  # urgent, and with as many steps left
    assert chosen(Clockwork(), some) == ["r0", "r1"]
    assert dropped(Clockwork(), some, now=3.0) == []  # between its batches it looks at nobody


def test_clockwork_never_takes_over_another_worker_s_batch():
    some = units((4, 90.0), (4, 90.0), (4, 95.0), workers=2)
    run(some, "r0", "r1", worker=1)
    assert chosen(Clockwork(), some, worker=0) == ["r2"]
    assert chosen(Clockwork(), some, worker=1) == ["r0", "r1"]


def test_clockwork_may_plan_with_other_profiles():
    slow = {"unet": TableProfile("unet", [1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])}
    some = units((4, 7.0), (4, 12.5), (4, 12.5))
    assert chosen(Clockwork(), some) == ["r0", "r1", "r2"]
    assert (chosen(Clockwork(plan=slow), some), dropped(Clockwork(plan=slow), some)) == (["r1", "r2"], ["r0"])


def test_clockwork_keeps_to_a_plan_that_is_slower_than_the_device():
    slow = {"unet": TableProfile("unet", [1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])}
    some = units((4, 90.0), (4, 90.0))
    run(some, "r0", "r1", now=1.0)
    decision = Clockwork(plan=slow).decide(seen(some, now=2.25))
    assert (list(decision.jobs), decision.wake_at) == ([], 1.0 + 3.0)
    assert chosen(Clockwork(plan=slow), some, now=4.0) == ["r0", "r1"]
    assert chosen(Clockwork(), some, now=2.25) == ["r0", "r1"]
    fast = {"unet": TableProfile("unet", [1, 2, 3, 4], [0.5, 0.5, 0.5, 0.5])}
    assert chosen(Clockwork(plan=fast), some, now=2.25) == ["r0", "r1"]


def test_clockwork_runs_a_batch_to_completion_through_all_stages():
    steps = steps_run(Clockwork(), ask("r0", 2), ask("r1", 1), ask("r2", 2))
    assert steps[:4] == [("text", ["r0", "r2"]), ("unet", ["r0", "r2"]), ("unet", ["r0", "r2"]), ("vae", ["r0", "r2"])]
    assert steps[4] == ("text", ["r1"])


# -- neustream: the cap -----------------------------------------------------------------------------

# Table 1.3 of the reference: the caps in the artifact's own files.
CAPS = [
    ("rtx4090/dit_s2_256", ["dit"], 0.95, {1.2: 4, 1.5: 10, 2: 20, 2.5: 20, 3: 20, 3.5: 20, 4: 20, 5: 20}),
    ("rtx4090/dit_s2_256", ["vae"], 0.95, {1.2: 1, 1.5: 1, 2: 2, 2.5: 2, 3: 3, 3.5: 4, 4: 4, 5: 5}),
    ("rtx4090/dit_xl2_256", ["dit"], 1.0, {1.2: 3, 1.5: 4, 2: 6, 2.5: 7, 3: 10, 3.5: 12, 4: 12, 5: 17}),
    ("rtx4090/dit_xl2_256", ["dit"], 0.95, {1.2: 3, 1.5: 4, 2: 6, 2.5: 7, 3: 8, 3.5: 11, 4: 12, 5: 16}),
    ("rtx4090/palette_256", ["unet"], 0.95, {1.2: 2, 1.5: 3, 2: 4, 2.5: 5, 3: 6, 3.5: 7, 4: 8, 5: 10}),
    ("rtx4090/sd15_256", ["unet"], 0.95, {1.2: 6, 1.5: 10, 2: 12, 3: 21, 4: 28, 5: 36, 6: 40, 7: 40}),
    ("rtx4090/sd15_256", ["vae", "safety"], 0.95, {1.2: 2, 1.5: 2, 2: 3, 3: 5, 4: 6, 5: 8, 6: 9, 7: 10}),
    ("rtx4090/sd15_512", ["unet"], 0.95, {1.2: 1, 1.5: 2, 2: 3, 3: 4, 4: 6, 5: 8, 6: 11, 7: 12}),
    ("h100/sd15_512", ["unet"], 0.95, {1.2: 1, 1.5: 2, 2: 4, 3: 6, 4: 9, 5: 11, 6: 14, 7: 15}),
]


def cap_of(profile, policy, *jobs):
    stage = Stage("x", max_batch=1000)
    some = jobs or [Job(Request("r0", Graph("g", stage)))]
    for job in some:
        job.stage = stage
    view = View(0.0, Pool("gpu", ("x",)), 0, {"x": some}, {"x": profile})
    return policy.cap(view, "x", some)


@pytest.mark.parametrize("model, parts, delta, caps", CAPS, ids=[f"{m}/{'+'.join(p)}@{d}" for m, p, d, _ in CAPS])
def test_the_caps_are_those_of_the_artifact(root, model, parts, delta, caps):
    profile = SumProfile("x", [load_profile(root / "profiles" / model / f"{part}.json") for part in parts])
    assert {scale: cap_of(profile, NeuStream(scale, delta)) for scale in caps} == caps


def test_the_cap_is_found_by_scanning_up_to_the_first_failure():
    profile = TableProfile("x", [1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])
    assert cap_of(profile, NeuStream(2.5, 1.0)) == 1  # 3 would fit
    assert cap_of(profile, NeuStream(3.5, 1.0)) == 3
    assert cap_of(profile, NeuStream(3.0, 1.0)) == 1  # less than, not equal


@pytest.mark.parametrize("scale, delta", [(1.0, 0.95), (1.05, 0.95), (0.1, 1.0)])
def test_the_cap_is_at_least_1(scale, delta):
    assert cap_of(PROFILES["unet"], NeuStream(scale, delta)) == 1


def test_the_cap_stays_within_stage_and_profile():
    assert cap_of(PROFILES["unet"], NeuStream(1000.0)) == 4
    some = waiting(*[ask(f"r{i}", graph=LOOP) for i in range(6)])
    assert chosen(NeuStream(1000.0), some) == ["r0", "r1", "r2", "r3"]


def test_without_a_scale_the_cap_uses_the_mean_of_what_was_promised():
    def promised(*totals):
        jobs = [Job(Request(f"r{i}", LOOP, 0.0, SLO(total=total))) for i, total in enumerate(totals)]
        for job in jobs:
            job.alone_s = 4.0
        return cap_of(PROFILES["unet"], NeuStream(step_delta=1.0), *jobs)

    assert promised(5.2) == 2  # 1.3 times the solo latency
    assert promised(6.4) == 3
    assert promised(5.2, 7.6) == 3  # 1.6 on average
    assert promised(FAR) == 4


# -- neustream: the two queues ----------------------------------------------------------------------

PAIRS = NeuStream(1.4, 1.0)  # a cap of 2
SEATED = NeuStream(1.4, 1.0, sticky_demotion=False)


def demoted():
    """a and b ran from the start, c was skipped twice; then b ended and d came."""
    some = waiting(*[ask(name, steps, graph=LOOP) for name, steps in (("a", 9), ("b", 2), ("c", 9))])
    for now in (1.0, 2.0):
        run(some, "a", "b", now=now)
    some.submit(ask("d", 9, arrival=2.0, graph=LOOP), 2.0)
    assert [(job.id, job.skipped) for job in some.jobs.values()] == [("a", 0), ("c", 2), ("d", 0)]
    return some


@pytest.mark.parametrize("policy", [PAIRS, SEATED])
def test_who_was_never_skipped_goes_first_in_order_of_coming(policy):
    some = waiting(*[ask(name, 9, graph=LOOP) for name in "abc"])
    assert chosen(policy, some) == ["a", "b"]
    run(some, "a", "b")
    assert chosen(policy, some) == ["a", "b"]
    assert chosen(policy, demoted()) == ["a", "d"]  # c lost its turn to a newcomer


@pytest.mark.parametrize("policy", [PAIRS, SEATED])
def test_among_the_skipped_the_least_often_skipped_goes_first(policy):
    some = demoted()
    some.submit(ask("e", 9, arrival=2.0, graph=LOOP), 2.0)
    run(some, "a", "d", now=3.0)
    some.cancel("a", 3.0)
    some.cancel("d", 3.0)
    assert {job.id: job.skipped for job in some.jobs.values()} == {"c": 3, "e": 1}
    some.submit(ask("f", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(policy, some, now=3.0) == ["f", "e"]  # the oldest waits on: last in, first out


def test_sticky_demotion_lets_newcomers_pre_empt_who_was_skipped_once():
    some = demoted()
    some.cancel("d", 2.0)
    assert chosen(PAIRS, some, now=2.0) == ["a", "c"]
    run(some, "a", "c", now=3.0)
    some.submit(ask("e", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(PAIRS, some, now=3.0) == ["a", "e"]


def test_without_it_who_runs_again_keeps_its_seat():
    some = demoted()
    some.cancel("d", 2.0)
    run(some, "a", "c", now=3.0)
    some.submit(ask("e", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(SEATED, some, now=3.0) == ["c", "a"]
    run(some, "c", "a", now=4.0)
    some.cancel("a", 4.0)
    assert chosen(SEATED, some, now=4.0) == ["c", "e"]


# -- neustream: the drop test -----------------------------------------------------------------------


def test_neustream_drops_whose_budget_is_not_more_than_the_work_left():
    some = units((4, 4.0), (4, 4.125), (4, 90.0))
    assert dropped(NeuStream(3.0), some) == ["r0"]
    assert dropped(NeuStream(3.0), some, now=0.125) == ["r0", "r1"]
    (reason,) = NeuStream(3.0).decide(seen(some)).drop.values()
    assert reason == "budget: needs 4.000 s and 0 s of margin, due in 4.000 s"


def test_neustream_tests_every_queue_and_the_next_output_too():
    some = waiting(ask("r0", total=5.0), ask("r1", first=5.0), ask("r2", total=5.0), ask("r3"))
    run(some, "r0")
    assert dropped(NeuStream(3.0), some, now=0.75) == ["r1", "r2", "r0"]
    assert chosen(NeuStream(3.0), some, now=0.75) == ["r3"]


def test_neustream_tests_the_end_where_the_next_output_is_near():
    some = waiting(ask("r0", total=4.25, graph=PREVIEW), ask("r1", total=4.5, graph=PREVIEW))
    assert dropped(NeuStream(3.0), some) == ["r0"]


def test_neustream_may_drop_everyone():
    some = units((4, 3.0), (4, 3.0))
    assert (chosen(NeuStream(), some), dropped(NeuStream(), some)) == ([], ["r0", "r1"])


def test_the_margin_is_charged_in_front_of_a_later_stage_only():
    rule = NeuStream(3.0, margin_s=0.5)
    alone = units((4, 4.25))
    assert dropped(rule, alone) == []  # nothing comes after this loop
    some = waiting(ask("r0", 1, total=2.0))  # 1.75 s of work
    assert dropped(rule, some) == []  # text is not looped
    run(some, "r0")
    assert dropped(rule, some, now=0.5) == ["r0"]  # 1.5 s left for 1.25 s of work and the margin
    assert dropped(NeuStream(3.0), some, now=0.5) == []
    run(some, "r0", now=0.5)
    assert dropped(rule, some, now=1.7) == []  # vae is the last one


def test_neustream_clears_the_once_only_stages_first_and_then_the_oldest_comer():
    some = waiting(ask("r0", 2), ask("r1", 2))
    run(some, "r0")
    assert chosen(NeuStream(3.0), some) == ["r1"]
    run(some, "r1")
    assert chosen(NeuStream(3.0), some) == ["r0", "r1"]


def test_requests_at_different_rounds_share_a_step():
    some = waiting(ask("r0", 9, graph=LOOP))
    run(some, "r0")
    some.submit(ask("r1", 9, graph=LOOP), 0.0)
    for policy in (FCFS(), EDF(), NeuStream(3.0)):
        assert chosen(policy, some) == ["r0", "r1"]


# -- least laxity -----------------------------------------------------------------------------------


def test_least_laxity_runs_who_can_idle_the_least():
    some = units((4, 20.0), (9, 22.0), (2, 16.0), (3, 20.0), (5, 30.0))  # slack 16, 13, 14, 17, 25
    assert chosen(LeastLaxity(), some) == ["r1", "r2", "r0", "r3"]
    assert chosen(EDF(), some) == ["r2", "r0", "r3", "r1"]


def test_least_laxity_changes_its_mind_as_slack_is_spent():
    some = units((4, 20.0), (4, 20.5), (4, 20.25), (4, 20.75), (4, 20.875))
    assert chosen(LeastLaxity(), some) == ["r0", "r2", "r1", "r3"]
    run(some, "r0", "r1", "r2", "r3", now=1.0)  # they have one step less to do, so one second more to idle
    assert chosen(LeastLaxity(), some, now=1.0) == ["r4", "r0", "r2", "r1"]


def test_least_laxity_counts_the_next_output_too():
    some = waiting(ask("r0", total=50.0), ask("r1", total=90.0, first=40.0), ask("r2", total=45.0))
    assert chosen(LeastLaxity(), some) == ["r1", "r2", "r0"]


def test_least_laxity_gives_up_the_hopeless_unless_told_not_to():
    some = waiting(ask("r0"), ask("r1", total=1.0))
    assert (chosen(LeastLaxity(), some), dropped(LeastLaxity(), some)) == (["r0"], ["r1"])
    patient = LeastLaxity(drop_hopeless=False)
    assert (chosen(patient, some), dropped(patient, some)) == (["r1", "r0"], [])


# -- symphony ---------------------------------------------------------------------------------------

DEFERRED = Symphony(defer_loops=True)
EAGER = Symphony(margin_s=1e6)  # as if nothing could wait


def waits_until(policy, some, now=0.0):
    decision = policy.decide(seen(some, now))
    assert not decision.jobs
    return decision.wake_at


def test_symphony_waits_while_one_more_could_still_join_in_time():
    some = waiting(ask("r0", steps=4, total=20.0))
    assert waits_until(DEFERRED, some) == 20.0 - (0.5 + 4 * 1.25 + 0.25)  # in batches of two
    assert chosen(DEFERRED, some, now=14.25) == ["r0"]  # a second of slack is left: alone it takes 4.75
    some.submit(ask("r1", steps=4, arrival=3.0, total=30.0), 3.0)
    assert waits_until(DEFERRED, some, now=3.0) == 20.0 - (0.5 + 4 * 1.5 + 0.25)  # in batches of three
    assert chosen(DEFERRED, some, now=13.25) == ["r0", "r1"]


def test_symphony_waits_for_its_most_urgent_member():
    some = waiting(ask("r0", steps=4, total=20.0), ask("r1", steps=1, total=12.0))
    assert waits_until(DEFERRED, some) == 12.0 - (0.5 + 1.5 + 0.25)
    assert waits_until(Symphony(defer_loops=True, margin_s=0.5), some) == 12.0 - (0.5 + 1.5 + 0.25) - 0.5


def test_symphony_waits_no_longer_than_its_batch_as_it_is_can_where_a_larger_one_is_faster():
    view = seen(units((4, 20.0)))
    bumpy = {"unet": TableProfile("unet", [1, 2], [3.0, 1.0])}
    decision = DEFERRED.decide(View(view.now, view.pool, view.worker, view.queues, bumpy))
    assert decision.wake_at == 20.0 - 4 * 3.0


def test_symphony_starts_a_full_batch_at_once():
    some = units(*[(4, 100.0)] * 3)
    assert waits_until(DEFERRED, some) == 100.0 - 4 * 4.0
    some.submit(ask("r3", 4, total=100.0, graph=LOOP), 0.0)
    assert chosen(DEFERRED, some) == ["r0", "r1", "r2", "r3"]


def test_symphony_starts_at_once_what_was_promised_nothing():
    assert chosen(DEFERRED, waiting(ask("r0"), ask("r1"))) == ["r0", "r1"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_symphony_runs_the_largest_batch_whose_members_all_make_it(total, most):
    some = units(*[(4, total)] * 4)
    assert len(chosen(EAGER, some)) == most
    assert len(chosen(DEFERRED, some)) == most  # none of these may wait: who is left out has to


def test_symphony_leaves_out_of_a_batch_who_would_not_make_it_there():
    some = units((4, 4.5), (4, 90.0), (4, 80.0))
    assert (chosen(DEFERRED, some), dropped(DEFERRED, some)) == (["r2", "r1"], [])
    assert dropped(DEFERRED, some, now=1.0) == ["r0"]


def test_symphony_joins_a_running_loop_at_its_next_step():
    some = units((9, 90.0))
    assert waits_until(DEFERRED, some) == 90.0 - 9 * 1.25
    assert chosen(Symphony(defer_loops=False), some) == ["r0"]
    run(some, "r0", now=1.0)
    some.submit(ask("r1", 9, arrival=1.0, total=90.0, graph=LOOP), 1.0)
    assert chosen(DEFERRED, some, now=1.0) == ["r0", "r1"]


def test_symphony_runs_other_stages_while_one_waits():
    some = waiting(ask("r0", 9), ask("r1", 4, total=20.0))
    run(some, "r0")
    # r1 would share its steps with r0 and one more, 0.5 + 4 * 1.5 + 0.25; a step of r0 goes first
    assert chosen(DEFERRED, some, now=0.0) == ["r0"]
    assert chosen(DEFERRED, some, now=12.0) == ["r0"]
    assert chosen(DEFERRED, some, now=12.25) == ["r1"]


def test_symphony_fills_the_batches_of_a_decoder_while_the_loop_goes_on():
    some = waiting(ask("r0", 1, total=50.0), ask("r1", 3, total=50.0))
    run(some, "r0", "r1")
    run(some, "r0", "r1", now=1.25)
    assert {stage: ids(jobs) for stage, jobs in seen(some).queues.items()} == {"vae": ["r0"], "unet": ["r1"]}
    for now in (1.25, 2.25):
        assert chosen(DEFERRED, some, now=now) == ["r1"]
        run(some, "r1", now=now)
    assert chosen(DEFERRED, some, now=3.25) == ["r0", "r1"]  # full


def test_symphony_wakes_in_time_for_everyone():
    arrivals, log = (0.0, 3.0, 13.5, 16.0), EventLog()
    work = [ask(f"r{at}", 4, arrival, 20.0) for at, arrival in enumerate(arrivals)]
    report = engine(IMAGE, {name: PROFILES[name] for name in IMAGE.stages}, DEFERRED, observers=[log]).run(work)
    assert report.counts["on_time"] == 4
    assert [stage for stage, _ in batches(log)[:5]] == ["text", "unet", "unet", "text", "unet"]
    assert batches(log)[0] == ("text", ["r0", "r1"])
    assert log.steps[0]["start"] == 20.0 - (0.5 + 4 * 1.5 + 0.25)
    assert batches(log)[3] == ("text", ["r2", "r3"])


@pytest.mark.parametrize("margin", [-1.0, math.inf, math.nan])
def test_symphony_refuses_a_margin_that_is_no_time(margin):
    with pytest.raises(ConfigError, match="margin_s must be a time >= 0"):
        Symphony(margin_s=margin)


# -- slack ranked -----------------------------------------------------------------------------------


def test_slack_ranked_runs_the_least_slack_first():
    some = units((4, 90.0), (9, 92.0), (2, 86.0), (3, 90.0), (5, 99.0))  # slack 86, 83, 84, 87, 94
    assert chosen(SlackRanked(), some) == ["r1", "r2", "r0", "r3"]


@pytest.mark.parametrize("total, most", [(100.0, 4), (10.0, 3), (5.5, 2), (4.5, 1)])
def test_slack_ranked_runs_the_largest_batch_that_keeps_its_deadlines(total, most):
    assert len(chosen(SlackRanked(), units(*[(4, total)] * 4))) == most


def test_slack_ranked_lets_wait_who_would_not_make_it_in_a_larger_batch():
    some = units((4, 4.5), (4, 90.0), (4, 80.0))
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == (["r2", "r1"], [])


def test_slack_ranked_counts_the_next_output_as_slowed_down_like_the_whole():
    some = waiting(*[ask(f"r{at}", 4, total=90.0, first=4.0, graph=PREVIEW) for at in range(2)])
    assert chosen(SlackRanked(), some) == ["r0", "r1"]
    loops = [ask(f"r{at}", 4, total=90.0, first=first, graph=LOOP) for at, first in enumerate((5.5, 5.5, 6.0))]
    assert chosen(SlackRanked(), waiting(*loops)) == ["r0", "r1"]  # 1.25 times 4 s by 5.5 s, not 1.5 times


def newcomer(steps_and_totals):
    """r0 and r1 have run a step until 1.25 and have four left; r2 comes then, as urgent as can be for two."""
    some = units(*[(5, 1.25 + total) for total in steps_and_totals])
    run(some, "r0", "r1", now=1.25)
    some.submit(ask("r2", 4, arrival=1.25, total=5.25, graph=LOOP), 1.25)
    return some


def test_slack_ranked_preempts_who_can_afford_it():
    # two to a step, four steps take 5 s; a step without r0 1.25 s more, which it has and r1 has not
    assert chosen(SlackRanked(), newcomer([6.5, 5.5]), now=1.25) == ["r1", "r2"]


def test_slack_ranked_preempts_nobody_who_cannot():
    assert chosen(SlackRanked(), newcomer([5.75, 5.5]), now=1.25) == ["r1", "r0"]  # r2 has less slack, and waits
    assert dropped(SlackRanked(), newcomer([5.75, 5.5]), now=1.25) == []


def test_slack_ranked_takes_no_size_that_makes_late_who_cannot_be_preempted():
    some = units((5, 1.25 + 5.5))
    run(some, "r0", now=1.25)
    for name in ("r1", "r2", "r3"):
        some.submit(ask(name, 4, arrival=1.25, total=90.0, graph=LOOP), 1.25)
    assert chosen(SlackRanked(), some, now=1.25) == ["r0", "r1"]  # three take 6 s
    some.cancel("r0", 1.25)
    some.submit(ask("r4", 4, arrival=1.25, total=5.5, graph=LOOP), 1.25)  # as urgent, but not running
    assert chosen(SlackRanked(), some, now=1.25) == ["r1", "r2", "r3"]


def test_slack_ranked_serves_the_hopeless_last_or_never():
    some = units((4, 3.0), (4, 90.0), (4, 2.0))
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == (["r1"], ["r0", "r2"])
    patient = SlackRanked(drop_hopeless=False)
    assert (chosen(patient, some), dropped(patient, some)) == (["r1"], [])
    some.cancel("r1", 0.0)
    assert (chosen(patient, some), dropped(patient, some)) == (["r0", "r2"], [])
    assert (chosen(SlackRanked(), some), dropped(SlackRanked(), some)) == ([], ["r0", "r2"])
