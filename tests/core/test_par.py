"""Branches that run at the same time: forks, joins, failures, cancellations, steps that are lost."""

from __future__ import annotations

import pytest
from hand import Hand, ids

from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    Graph,
    GraphError,
    LinearProfile,
    Member,
    PolicyError,
    Pool,
    Priced,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Stage,
    StageFailed,
    VirtualClock,
    call,
    loop,
    par,
    seq,
    switch,
)
from neustream.core.events import BranchEnded, Emitted, Ended, LegEnded
from neustream.core.kv_cache import KVCache
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

A, B, C, D = (Stage(name, max_batch=8) for name in "abcd")
SECONDS = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 0.5}
NOTHING = SLO()


def scheduler_of(graph, policy=None):
    profiles = {name: LinearProfile(name, base=SECONDS[name], max_batch=8) for name in graph.stages if name in SECONDS}
    steps = StepProfile("llm", *[LinearProfile(name, base=0.25, max_batch=8) for name in "pd"])
    for model in {stage.model for stage in graph.stages.values()} - {""}:
        profiles |= llm_profiles(model, steps, 8)
    return Scheduler([Pool("gpu", tuple(graph.stages), workers=4)], policy or FCFS(False), profiles)


def submit(scheduler, graph, id="r", slo=NOTHING, **params):
    return scheduler.submit(Request(id, graph, slo=slo, params=params), 0.0)


def begin(scheduler, *names, worker=0):
    wanted = Hand(lambda view: Decision([job for job in view.jobs if job.id in names]))
    batch = scheduler.next_batch("gpu", 0.0, worker, instead=wanted)
    assert sorted(ids(batch.jobs)) == sorted(names)
    return batch


def step(scheduler, *names, now=1.0, **update):
    batch = begin(scheduler, *names)
    scheduler.finish(batch, [update] * len(batch.jobs), now)


def run(graph, requests, policy=None):
    events = []
    scheduler = scheduler_of(graph, policy or Priced())
    engine = Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), VirtualClock(), [events.append])
    report = engine.run(requests)
    assert not scheduler.jobs
    return report, events


def test_branches_run_at_once_and_their_results_come_by_name():
    graph = Graph("g", seq(A, par(left=B, right=seq(B, C)), D))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    assert job.remaining_s == 1.0 + 6.0 + 0.5, "of branches that run at once the longest counts"
    assert job.calls_left == {"a": 1, "b": 2, "c": 1, "d": 1}
    step(scheduler, "r", seen=1)
    assert (job.status, job.stage) == ("forked", None)
    left, right = scheduler.jobs["r/left"], scheduler.jobs["r/right"]
    assert (left.remaining_s, right.remaining_s) == (2.5, 6.5)
    assert dict(left.state) == {"seen": 1}
    step(scheduler, "r/left", "r/right", found=2)
    assert "r/left" not in scheduler.jobs
    step(scheduler, "r/right", found=3)
    assert job.status == "waiting" and job.stage is D
    assert job.state == {"seen": 1, "left": {"found": 2}, "right": {"found": 3}}
    step(scheduler, "r", now=9.0)
    told = scheduler.pop_events()
    assert [event.branch for event in told if isinstance(event, BranchEnded)] == ["left", "right"]
    assert [event.decided for event in told if isinstance(event, BranchEnded)] == [False, True]
    [ended] = [event for event in told if isinstance(event, Ended)]
    assert ended.status == "done" and not scheduler.jobs


def test_a_request_has_waited_until_the_first_of_its_branches_ran():
    graph = Graph("g", par(left=B, right=C))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph)
    first = scheduler.next_batch("gpu", 2.0)
    then = scheduler.next_batch("gpu", 5.0, 1)
    scheduler.finish(then, [{}], 6.0)
    scheduler.finish(first, [{}], 7.0)
    [ended] = [event for event in scheduler.pop_events() if isinstance(event, Ended)]
    assert ended.waited_s == 2.0


@pytest.mark.parametrize(
    "branches", [{"left": seq(B, D), "right": C}, {"left": par(deep=seq(B, D), deeper=C), "right": A}]
)
@pytest.mark.parametrize("what", ["cancelled", "lost"])
@pytest.mark.parametrize("over", [True, False])
def test_a_request_that_ends_before_its_branches_has_waited_until_the_first_of_them_ran(branches, what, over):
    graph = Graph("g", par(**branches))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph)
    wanted = Hand(lambda view: Decision([job for job in view.jobs if job.stage.name == "b"]))
    step = scheduler.next_batch("gpu", 2.0, instead=wanted)
    if over:
        scheduler.finish(step, [{}], 2.5)
    if what == "cancelled":
        scheduler.cancel("r", 3.0)
    else:
        dropped = Hand(lambda view: Decision(drop={job: "no" for job in view.jobs if job.stage.name in "ac"}))
        scheduler.next_batch("gpu", 3.0, 1, instead=dropped)
    [ended] = [event for event in scheduler.pop_events() if isinstance(event, Ended)]
    assert ended.waited_s == 2.0


def test_names_of_branches():
    assert list(par(A, B).branches) == ["a", "b"]
    assert list(par(A, A, llm("x"), call(A, "once"), seq(A)).branches) == ["0", "1", "x", "once", "4"]
    for make, message in (
        (lambda: par(A, a=B), "two branches named 'a'"),
        (lambda: par(), "at least one branch"),
        (lambda: par(A, policy="any"), "policy must be 'all', 'first' or a number from 1 to 1, got 'any'"),
        (lambda: par(A, policy=2), "policy must be 'all', 'first' or a number from 1 to 1, got 2"),
    ):
        with pytest.raises(GraphError, match=message):
            make()


def test_the_first_that_is_done_is_the_result_and_the_others_end_after_their_steps():
    graph = Graph("g", seq(par(B, C, D, policy="first"), A))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    assert (job.alone_s, job.planned_calls) == (1.5, {"b": 1, "c": 1, "d": 1, "a": 1})
    slow = begin(scheduler, "r/c", worker=1)
    step(scheduler, "r/b", found=1)
    assert job.stage is A and job.state == {"b": {"found": 1}}
    assert set(scheduler.jobs) == {"r", "r/c"}, "one is in a step"
    scheduler.finish(slow, [{}], 2.0)
    step(scheduler, "r", now=3.0)
    told = scheduler.pop_events()
    assert [(e.branch, e.status) for e in told if isinstance(e, BranchEnded)] == [
        ("b", "done"),
        ("d", "cancelled"),
        ("c", "cancelled"),
    ]
    assert told[-1].status == "done" and not scheduler.jobs


@pytest.mark.parametrize(
    ("policy", "fails", "status"),
    [
        ("all", ["b"], "failed"),
        ("first", ["b"], "done"),
        ("first", ["b", "c", "d"], "failed"),
        (2, ["b"], "done"),
        (2, ["b", "c"], "failed"),
    ],
)
def test_a_failing_branch_under_each_policy(policy, fails, status):
    graph = Graph("g", seq(par(B, C, D, policy=policy), A))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph)
    for name in "bcd":
        if f"r/{name}" in scheduler.jobs:
            batch = begin(scheduler, f"r/{name}")
            scheduler.finish(batch, [StageFailed("no luck") if name in fails else {}], 1.0)
    if status == "done":
        step(scheduler, "r")
    [ended] = [event for event in scheduler.pop_events() if isinstance(event, Ended)]
    assert ended.status == status and not scheduler.jobs
    if status == "failed":
        assert ended.reason == f"branch {fails[-1]!r}: no luck"


def test_a_branch_that_is_given_up_drops_its_request():
    graph = Graph("g", par(B, C))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph, slo=SLO(total=5.0))
    drop = Hand(lambda view: Decision(drop={view.queues["b"][0]: "crowded"}, wake_at=2.0))
    scheduler.next_batch("gpu", 1.0, instead=drop)
    [ended] = [event for event in scheduler.pop_events() if isinstance(event, Ended)]
    assert (ended.status, ended.reason) == ("dropped", "branch 'b': crowded")
    assert not scheduler.jobs


def test_with_finish_all_branches_go_on_without_the_promise():
    graph = Graph("g", par(B, C))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph, slo=SLO(total=5.0, finish=True))

    def drop_promised(view):
        return Decision(drop={job: "crowded" for job in view.queues["b"] if job.promised}, wake_at=2.0)

    drop = Hand(drop_promised)
    scheduler.next_batch("gpu", 1.0, instead=drop)
    assert [one.promised for one in scheduler.jobs.values()] == [False] * 3
    step(scheduler, "r/b")
    step(scheduler, "r/c")
    assert (job.status, job.late) == ("done", True)
    assert scheduler._lives.unpromised == 0


def test_cancelling_ends_the_request_at_once_and_its_steps_run_out():
    graph = Graph("g", seq(par(B, par(C, D)), A))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph)
    assert "r/1/c" in scheduler.jobs
    running = begin(scheduler, "r/1/c")
    assert scheduler.cancel("r", 1.0)
    told = scheduler.pop_events()
    assert [event.status for event in told if isinstance(event, Ended)] == ["cancelled"]
    assert list(scheduler.jobs) == ["r/1/c"] and scheduler.requests == []
    submit(scheduler, graph)
    assert "r/1/c~2" in scheduler.jobs, "the one before is still in its step"
    scheduler.finish(running, [{}], 2.0)
    assert set(scheduler.jobs) == {"r", "r/b", "r/1", "r/1/c~2", "r/1/d"}


def test_a_branch_that_is_cancelled_counts_as_failed():
    graph = Graph("g", par(B, C, policy="first"))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    scheduler.cancel("r/b", 0.0)
    step(scheduler, "r/c", found=1)
    assert job.status == "done"


def test_a_request_that_forked_is_held_at_its_join():
    graph = Graph("g", seq(par(B, C), A))
    here, there = scheduler_of(graph), scheduler_of(graph)
    job = submit(here, graph)
    with pytest.raises(PolicyError, match="give: request 'r' is in a par; hold it"):
        here.give("r", 0.0)
    with pytest.raises(PolicyError, match="give: 'r/b' is a branch of request 'r'"):
        here.give("r/b", 0.0)
    with pytest.raises(RequestError, match="hold: 'r/b' is a branch of request 'r'"):
        here.hold("r/b", 0.0)
    here.hold("r", 0.0)
    step(here, "r/b", found=1)
    step(here, "r/c", found=2)
    assert job.status == "held"
    moved = there.take(here.give("r", 2.0), graph, 0.0)
    assert moved.stage is A
    assert moved.state == {"b": {"found": 1}, "c": {"found": 2}}


def test_a_step_that_is_lost_is_made_anew_or_all_of_the_request_is():
    graph = Graph("g", seq(A, par(B, C)))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    step(scheduler, "r", seen=1)
    scheduler.requeue(begin(scheduler, "r/b"), 1.0)
    assert scheduler.jobs["r/b"].status == "waiting"
    beside = begin(scheduler, "r/c", worker=1)
    scheduler.requeue(begin(scheduler, "r/b"), 1.0, lost="state")
    assert job.status == "waiting" and job.stage is A and not job.state
    assert set(scheduler.jobs) == {"r", "r/c"}, "one is in a step"
    scheduler.finish(beside, [{}], 2.0)
    step(scheduler, "r")
    step(scheduler, "r/b")
    step(scheduler, "r/c")
    assert job.status == "done"


def test_branches_that_are_in_one_step_are_lost_together():
    graph = Graph("g", seq(A, par(B, seq(B, C))))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    step(scheduler, "r")
    scheduler.requeue(begin(scheduler, "r/b", "r/1"), 1.0, lost="state")
    assert set(scheduler.jobs) == {"r"} and job.stage is A


def test_empty_branches_and_loops_of_them():
    graph = Graph("g", seq(par(seq(), seq()), A))
    scheduler = scheduler_of(graph)
    assert submit(scheduler, graph).stage is A
    skip = switch(lambda job: 0, {0: seq(), 1: A})
    graph = Graph("h", loop(par(skip, skip), until=lambda job: False))
    scheduler = scheduler_of(graph)
    job = submit(scheduler, graph)
    assert job.status == "failed" and "a round of a loop ran no stage" in job.reason


def test_what_a_branch_asks_and_gets_wrong_fails_it_alone():
    wrong = loop(B, times=lambda job: job.params["missing"])
    graph = Graph("g", par(wrong, C, policy="first"))
    scheduler = scheduler_of(Graph("other", par(B, C)))
    with pytest.raises(GraphError):
        submit(scheduler, graph)  # what is ahead cannot be told
    graph = Graph("g", par(loop(B, times=lambda job: job.params["missing"], expect=1), C, policy="first"))
    job = submit(scheduler, graph)
    assert "r/0" not in scheduler.jobs and job.status == "forked"
    step(scheduler, "r/c")
    assert job.status == "done"


def test_calls_in_branches_have_their_own_promises_and_events_name_the_branch():
    graph = Graph("g", seq(A, par(llm("x"), llm("y")), llm("z")))
    params = {"prompt_tokens": 4, "max_tokens": 3}
    report, events = run(graph, [Request("r", graph, slo=SLO(first=0.6, step=0.6), params=params)])
    assert report.counts["on_time"] == 1
    outputs = [(event.id, event.branch, event.index) for event in events if isinstance(event, Emitted)]
    assert len(outputs) == 9 and [index for _, _, index in outputs] == list(range(9))
    assert {branch for _, branch, _ in outputs} == {"x", "y", ""}
    legs = [(event.id, event.leg, event.branch, event.outputs) for event in events if isinstance(event, LegEnded)]
    assert set(legs) == {("r", "a", "", 0), ("r", "x", "x", 3), ("r", "y", "y", 3), ("r", "z", "", 3)}


def test_a_late_branch_makes_its_request_late():
    graph = Graph("g", par(llm("x", slo=SLO(first=0.1)), llm("y")))
    params = {"prompt_tokens": 4, "max_tokens": 3}
    report, _ = run(graph, [Request("r", graph, params=params)], FCFS(False))
    assert report.counts["late"] == 1


def test_slack_of_a_branch_counts_what_follows_the_join():
    graph = Graph("g", seq(par(llm("x"), llm("y")), llm("z")))
    scheduler = scheduler_of(graph)
    submit(scheduler, graph, slo=SLO(total=8.0), prompt_tokens=4, max_tokens=4)
    branch = scheduler.jobs["r/x"]
    assert (branch.remaining_s, branch.leg_due) == (2.0, 4.0)
    assert branch.leg_latest == 7.75, "of what follows only a prompt is sure, as no generation was seen"


def test_branches_of_one_request_are_given_up_together_beside_others():
    graph, plain = Graph("g", par(B, seq(B, D))), Graph("p", B)
    scheduler = scheduler_of(graph)
    submit(scheduler, graph, slo=SLO(total=5.0))
    scheduler.submit(Request("p", plain), 0.0)

    def decide(view):
        dropped = {job: "crowded" for job in view.queues["b"] if job.id == "r/b"}
        return Decision([job for job in view.queues["b"] if job not in dropped], dropped)

    batch = scheduler.next_batch("gpu", 1.0, instead=Hand(decide))
    assert ids(batch.jobs) == ["p"] and set(scheduler.jobs) == {"p"}


def test_a_branch_too_large_for_the_cache_takes_the_others_along():
    chat = llm("m")
    large = {"prompt_tokens": 100, "max_tokens": 3}
    graph = Graph("g", par(call(chat, "small"), call(chat, "large", params=large)))
    steps = StepProfile("llm", *[LinearProfile(name, base=0.25, max_batch=8) for name in "pd"])
    pool = Pool("gpu", tuple(graph.stages), kv_caches={"m": KVCache(4, 16)})
    scheduler = Scheduler([pool], FCFS(False), llm_profiles("m", steps, 8))
    job = submit(scheduler, graph, prompt_tokens=4, max_tokens=3)
    assert job.status == "failed" and "branch 'large'" in job.reason
    assert not scheduler.jobs and scheduler.next_batch("gpu", 0.0) is None


def test_fan_out_of_ten_thousand_costs_no_more_than_linear():
    counts = []
    for width in (1000, 10_000):
        graph = Graph("g", seq(A, par(*[D] * width), D))
        scheduler = scheduler_of(graph)
        job = submit(scheduler, graph)
        measured = []
        real = scheduler._lives.work.measure
        scheduler._lives.work.measure = lambda job, real=real, measured=measured: (measured.append(job), real(job))
        step(scheduler, "r")
        assert len(scheduler.jobs) == width + 1
        for _ in range(0, width, 8):
            batch = scheduler.next_batch("gpu", 1.0, instead=Hand(_eight))
            scheduler.finish(batch, [{}] * len(batch.jobs), 1.0)
        assert job.stage is D and len(job.state) == width
        counts.append(len(measured))
    assert counts[1] <= 10 * counts[0]


def _eight(view):
    return Decision(view.queues["d"][:8])
