"""The next step, decided while the present one runs."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from math import inf

import pytest
from hand import Hand, facts, free_blocks, ids, seen
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import (
    FCFS,
    POLICIES,
    SLO,
    Decision,
    Graph,
    KVCache,
    LinearProfile,
    Policy,
    Pool,
    Request,
    Scheduler,
    Stage,
    View,
    loop,
    seq,
    switch,
)
from neustream.core.ahead import copy_of
from neustream.core.batch import Batch
from neustream.core.events import Ended, Event
from neustream.core.job import Entry, Job
from neustream.core.steps import PrefillTable, StepProfile
from neustream.errors import PolicyError
from neustream.graphs import llm, llm_profiles

STEP = Stage("step", max_batch=4)
LAST = Stage("last", max_batch=4, emits=True)
COUNTED = Graph("counted", seq(loop(STEP, times=lambda job: job.params["steps"]), LAST))
PROFILES = {
    "step": LinearProfile("step", base=0.75, per_job=0.25, max_batch=4),
    "last": LinearProfile("last", base=0.5, max_batch=4),
}
TOKENS = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 100], [0.5, 0.75], (0.5, 0.0025, 0.0)),
    LinearProfile("decode", base=0.5, per_size=0.015625, max_batch=4),
)


def scheduler(policy: Policy | None = None, **pool: object) -> Scheduler:
    return Scheduler([Pool("gpu", ("step", "last"), **pool)], policy or FCFS(), PROFILES)


def request(id: str, *, steps: int = 3, arrival: float = 0.0, total: float = inf) -> Request:
    return Request(id, COUNTED, arrival, SLO(total=total), {"steps": steps})


def start(tested: Scheduler, *requests: Request, now: float = 0.0) -> Batch:
    for each in requests:
        tested.submit(each, now)
    batch = tested.next_batch("gpu", now)
    assert batch is not None
    return batch


def over(tested: Scheduler, batch: Batch, at: float | None = None, **update: object) -> float:
    """End a step when it should, or `at`; all of its jobs return `update`."""
    now = batch.started_at + batch.expected if at is None else at
    tested.finish(batch, [update] * len(batch), now)
    return now


def asked(tested: Scheduler, now: float, worker: int = 0) -> tuple[Batch | None, bool]:
    """The next step, and whether the policy was asked for it."""
    before = tested.decisions
    batch = tested.next_batch("gpu", now, worker)
    return batch, tested.decisions > before


# -- a plan that holds -----------------------------------------------------------------------------


def test_a_planned_step_starts_without_the_policy_being_asked():
    tested = scheduler()
    batch = start(tested, request("a"), request("b", steps=5))
    assert not tested.planned(batch)
    tested.plan(batch, 0.5)
    assert tested.planned(batch)
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy, following.planned) == (["a", "b"], False, True)
    assert following.info().planned
    assert all(job is tested.jobs[job.id] for job in following.jobs)
    assert following.started_at == 1.25


def test_what_the_policy_is_shown_is_the_pool_when_the_step_is_over():
    views: list[View] = []
    hand = Hand(lambda view: views.append(view) or FCFS().decide(view))
    tested = scheduler(hand)
    batch = start(tested, request("a", steps=1), request("b", steps=2))
    tested.submit(request("c", arrival=0.5), 0.5)
    tested.plan(batch, 0.5)
    planned = views[-1]
    over(tested, batch)
    real = seen(tested, 1.25)
    assert planned.now == real.now == 1.25
    assert {name: ids(jobs) for name, jobs in planned.queues.items()} == {
        "step": ["b", "c"],
        "last": ["a"],
    }
    for name, jobs in real.queues.items():
        for job, twin in zip(jobs, planned.queues[name], strict=True):
            for fact in ("stage", "calls_left", "remaining_s", "next_output_s", "unit_s", "due"):
                assert getattr(twin, fact) == getattr(job, fact)
            for fact in ("skipped", "joined_at", "started_at", "worker", "ran_last", "status"):
                assert getattr(twin, fact) == getattr(job, fact)


def test_planning_changes_nothing_of_the_jobs_that_run():
    tested = scheduler()
    batch = start(tested, request("a"))
    job = tested.jobs["a"]
    before = (job.stage, dict(job.calls_left), job.remaining_s, job.status, job.outputs)
    tested.plan(batch, 0.0)
    assert (job.stage, dict(job.calls_left), job.remaining_s, job.status, job.outputs) == before


def test_jobs_that_ended_meanwhile_are_left_out():
    tested = scheduler()
    batch = start(tested, request("a"), request("b"))
    tested.plan(batch, 0.0)
    tested.cancel("a", 0.5)
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["b"], False)


def test_a_waiting_job_that_was_planned_and_is_cancelled_is_left_out():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.submit(request("b"), 0.25)
    tested.plan(batch, 0.25)
    tested.cancel("b", 0.5)
    assert not tested.planned(batch)  # another may take its seat
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["a"], False)


def test_a_plan_whose_jobs_all_ended_is_void():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.plan(batch, 0.0)
    tested.cancel("a", 0.5)
    tested.submit(request("b"), 0.75)
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["b"], True)


def test_a_step_that_fails_leaves_the_waiting_jobs_of_the_plan():
    tested = scheduler()
    batch = start(tested, request("a"))
    tested.submit(request("b"), 0.25)
    tested.plan(batch, 0.25)
    tested.fail(batch, RuntimeError("no"), 1.0)
    following, by_policy = asked(tested, 1.0)
    assert (ids(following.jobs), by_policy) == (["b"], False)


def test_held_jobs_are_left_out():
    tested = scheduler()
    batch = start(tested, request("a"), request("b"))
    tested.plan(batch, 0.0)
    tested.hold("a", 0.5)
    following, by_policy = asked(tested, over(tested, batch))
    assert (ids(following.jobs), by_policy) == (["b"], False)
    tested.plan(following, following.started_at)
    tested.resume("a")
    assert not tested.planned(following)


def test_an_empty_pool_is_planned_as_such_once():
    tested = scheduler()
    batch = start(tested, request("a", steps=0))
    before = tested.decisions
    tested.plan(batch, 0.0)
    assert tested.decisions == before
    assert tested.planned(batch)
    assert asked(tested, over(tested, batch)) == (None, False)


def test_a_copy_of_a_job_has_all_that_the_job_has():
    tested = scheduler()
    job = start(tested, request("a")).jobs[0]
    twin = copy_of(job)
    for name in (*Job.__slots__, *Entry.__slots__):
        if name not in ("status", "cursor", "calls_left"):
            assert getattr(twin, name) is getattr(job, name), name
    assert twin.status == "waiting"
    assert twin.calls_left == job.calls_left and twin.calls_left is not job.calls_left
    assert twin.cursor.save(COUNTED) == job.cursor.save(COUNTED) and twin.cursor is not job.cursor


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


# -- language models -------------------------------------------------------------------------------


def model(policy: Policy, blocks: int = 64, step_tokens: int = 8) -> tuple[Scheduler, Graph]:
    graph = Graph("llm", llm("llm", max_batch=4))
    pool = Pool("gpu", tuple(graph.stages), kv_caches={"llm": KVCache(blocks, 4)}, step_tokens=step_tokens)
    return Scheduler([pool], policy, llm_profiles("llm", TOKENS, 4)), graph


def ask_for(graph: Graph, id: str, prompt: int, tokens: int, arrival: float = 0.0) -> Request:
    return Request(id, graph, arrival, SLO(), {"prompt_tokens": prompt, "max_tokens": tokens})


def test_a_generation_that_ends_by_itself_is_left_out_of_the_planned_decode():
    tested, graph = model(FCFS())
    for name in "ab":
        tested.submit(ask_for(graph, name, 3, 9), 0.0)
    batch = tested.next_batch("gpu", 0.0)
    tested.plan(batch, 0.0)
    tested.finish(batch, [{"ended": True}, {}], 1.0)
    following, by_policy = asked(tested, 1.0)
    assert (ids(following.jobs), following.stage, by_policy) == (["b"], "llm.decode", False)


def test_the_rest_of_a_prompt_is_planned_in_its_parts():
    tested, graph = model(POLICIES["sarathi"]())
    tested.submit(ask_for(graph, "a", 20, 2), 0.0)
    batch, by_policy = asked(tested, 0.0)
    sizes = [batch.sizes]
    for _ in range(2):
        tested.plan(batch, batch.started_at)
        batch, by_policy = asked(tested, over(tested, batch))
        assert not by_policy
        sizes.append(batch.sizes)
    assert sizes == [(8.0,), (8.0,), (4.0,)]


def test_blocks_of_a_planned_step_are_taken_when_it_starts():
    tested, graph = model(FCFS(), blocks=4, step_tokens=64)
    for name in "ab":
        tested.submit(ask_for(graph, name, 8, 9), 0.0)
    batch = tested.next_batch("gpu", 0.0)
    assert free_blocks(tested) == 0
    now = 0.0
    while not batch.preempted:
        tested.plan(batch, now)
        now = over(tested, batch)
        batch, by_policy = asked(tested, now)
        assert not by_policy
    assert ids(batch.preempted) == ["b"]
    assert ids(batch.jobs) == ["a"]


# -- where steps take what they should, planning ahead decides what deciding late does -------------


def drive(tested: Scheduler, requests: Sequence[Request], ahead: bool) -> list[Event]:
    """Serve requests on one worker; with `ahead`, plan after each start and each arrival."""
    order = itertools.count()
    heap: list[tuple[float, int, int, object]] = []
    events: list[Event] = []
    running: Batch | None = None
    for each in requests:
        heapq.heappush(heap, (each.arrival, 1, next(order), each))
    while heap:
        now, _, _, what = heapq.heappop(heap)
        if isinstance(what, Request):
            tested.submit(what, now)
        elif what is running:
            tested.finish(what, [{}] * len(what), now)
            running = None
        if running is None:
            running = tested.next_batch("gpu", now)
            if running is not None:
                over_at = now + running.expected
                heapq.heappush(heap, (over_at, 0, next(order), running))
            elif tested.wake_at("gpu") is not None:
                heapq.heappush(heap, (tested.wake_at("gpu"), 2, next(order), "wake"))
        if ahead and running is not None and not tested.planned(running):
            tested.plan(running, now)
        events += tested.pop_events()
    return events


def lately(events: Sequence[Event]) -> list[tuple[str, str, float, bool]]:
    """How requests ended; those that were given up may hear of it earlier."""
    return sorted(
        (event.id, event.status, event.at if event.status == "done" else 0.0, event.on_time)
        for event in events
        if isinstance(event, Ended)
    )


ARRIVALS = st.lists(
    st.tuples(st.floats(0.01, 3.0), st.integers(0, 5), st.sampled_from([3.0, 6.0, 12.0])),
    min_size=1,
    max_size=12,
)
PATIENT = [name for name in POLICIES if name not in ("symphony", "clockwork")]
"""Those that wait on purpose are asked at other instants, with other outcomes."""


@pytest.mark.parametrize("name", PATIENT)
@settings(max_examples=25, deadline=None)
@given(ARRIVALS)
def test_planning_ahead_decides_as_deciding_late_does(name: str, drawn: list[tuple[float, int, float]]):
    outcomes = []
    for ahead in (False, True):
        now, requests = 0.0, []
        for index, (gap, steps, total) in enumerate(drawn):
            now += gap
            requests.append(request(f"r{index}", steps=steps, arrival=now, total=total))
        outcomes.append(lately(drive(scheduler(POLICIES[name]()), requests, ahead)))
    assert outcomes[0] == outcomes[1]


def test_a_step_that_begins_later_than_it_was_decided_takes_its_time_from_then_on():
    tested = scheduler()
    decided = start(tested, request("a"))
    batch = tested.begin(decided, 0.25)
    assert (batch.started_at, batch.jobs, batch.id) == (0.25, decided.jobs, decided.id)
    tested.plan(batch, 0.25)
    assert tested.planned(batch)
    tested.finish(batch, [{}], 1.25)
    assert tested.times.spread["step"].median == 1.0
    assert tested.jobs["a"].started_at == 0.25
    with pytest.raises(PolicyError, match="is not running"):
        tested.begin(batch, 2.0)
