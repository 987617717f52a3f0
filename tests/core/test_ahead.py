"""The step after the one under way is planned, and starts as it would have without a plan."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import pytest
from hand import Hand, free_blocks, ids, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import COUNTED, TOKENS, asked, over, request, scheduler, start

from neustream import (
    FCFS,
    POLICIES,
    SLO,
    Graph,
    KVCache,
    Policy,
    Pool,
    Request,
    Scheduler,
    View,
)
from neustream.core.ahead import copy_of
from neustream.core.batch import Batch
from neustream.core.entry import Entry
from neustream.core.events import Ended, Event
from neustream.core.job import Job
from neustream.errors import PolicyError
from neustream.graphs import llm, llm_profiles

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
    before = tested.asked.decisions
    tested.plan(batch, 0.0)
    assert tested.asked.decisions == before
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
