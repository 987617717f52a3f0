"""A job that moves between schedulers at any step ends as the one that stayed."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moved import IMAGE, PROFILES, STAGES, STEPS, Twins, anything, one_step, scheduler_of, slos
from walks import step, walk

from neustream import (
    POLICIES,
    SLO,
    Graph,
    GraphError,
    Job,
    KVCache,
    PolicyError,
    Pool,
    Request,
    RequestError,
    Scheduler,
    loop,
    seq,
)
from neustream.core.cursor import Cursor
from neustream.core.events import Ended, Given, Held
from neustream.graphs import llm, llm_profiles


def two_graphs(node):
    return Graph("any", node), Graph("any", node)


@settings(max_examples=60, deadline=None)
@given(
    anything,
    st.lists(slos, min_size=1, max_size=6),
    st.sampled_from(sorted(POLICIES)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_calls_and_outputs_are_those_of_a_job_that_stays(node, promises, policy, sticky, draw):
    graph = Graph("any", node)
    names = tuple(graph.stages)
    pool = Pool("gpu", names, sticky=sticky)

    def make():
        profiles = {name: PROFILES[name] for name in names}
        return Scheduler([pool], POLICIES[policy](), profiles)

    twins = Twins(make, (graph, graph), draw)
    for index, slo in enumerate(promises):
        twins.submit(f"r{index}", slo, {}, index % 2)
    twins.run("gpu", step)
    for id, (status, reason) in twins.status.items():
        alone = Job(Request(id, graph))
        expected, emitted = [], 0
        for stage in walk(node, alone):
            expected.append(stage.name)
            alone.state.update(step(alone))
            emitted += stage.emits
        assert twins.ends[id] == 1
        if status == "done":
            assert twins.calls[id] == expected
            assert len(twins.outputs[id]) == emitted
        else:
            assert status == "dropped" and reason
            assert twins.calls[id] == expected[: len(twins.calls[id])]
    assert set(twins.ends) == set(twins.calls)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from(["fcfs", "edf", "priced", "neustream_llm", "sarathi", "priority"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_generations_go_on_where_they_were_with_their_blocks_or_without(asks, policy, cached, draw):
    graph = Graph("chat", llm("llm", max_batch=6))
    pool = Pool("gpu", tuple(graph.stages), kv_caches={"llm": KVCache(10, 4)}, step_tokens=8)
    twins = Twins(lambda: Scheduler([pool], POLICIES[policy](), llm_profiles("llm", STEPS, 6)), (graph, graph), draw)
    for index, (prompt, most) in enumerate(asks):
        twins.submit(f"r{index}", SLO(), {"prompt_tokens": prompt, "max_tokens": most}, index % 2)
    twins.run("gpu", lambda job: {"at": job.call_outputs}, cached)
    for index, (_, most) in enumerate(asks):
        assert twins.status[f"r{index}"] == ("done", "")
        assert [update["at"] for update in twins.outputs[f"r{index}"]] == list(range(most))
    for scheduler in twins.schedulers:
        assert scheduler.reserve("gpu", "llm", 40).blocks == 10  # all of them are free again


# -- one move, step by step ---------------------------------------------------------------------------


def test_what_leaves_is_relative_and_arrives_on_another_clock():
    here, there = scheduler_of(), scheduler_of()
    job = here.submit(Request("a", IMAGE, 1.0, SLO(total=10.0), {"seed": 7}), 1.0)
    one_step(here, 1.0, 0.5, {"x": 1})
    one_step(here, 1.5)
    assert job.calls_left == {"denoise": 3, "decode": 1}
    carry = here.give("a", 3.0)
    assert (carry.age, carry.due_in, carry.started_ago) == (2.0, 8.0, 2.0)
    assert [type(event) for event in here.pop_events()] == [Given]
    moved = there.take(carry, IMAGE, 100.0)
    assert (moved.arrival, moved.due, moved.started_at) == (98.0, 108.0, 98.0)
    assert (moved.state, moved.params, moved.worker) == ({"x": 1}, {"seed": 7}, 0)
    assert (moved.calls_left, moved.remaining_s) == ({"denoise": 3, "decode": 1}, 3.5)
    assert (moved.alone_s, moved.planned_calls) == (4.75, {"encode": 1, "denoise": 4, "decode": 1})
    for at in range(4):
        one_step(there, 100.0 + at)
    (ended,) = [event for event in there.pop_events() if isinstance(event, Ended)]
    assert (ended.status, ended.on_time, ended.latency_s) == ("done", True, 6.0)


def test_a_clock_that_began_later_is_no_obstacle():
    here, there = scheduler_of(), scheduler_of()
    here.submit(Request("a", IMAGE, 5.0, SLO(total=10.0)), 5.0)
    moved = there.take(here.give("a", 9.0), IMAGE, 1.0)
    assert (moved.arrival, moved.due) == (-3.0, 7.0)


def test_a_job_in_a_step_is_held_first():
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    batch = scheduler.next_batch("gpu", 0.0)
    with pytest.raises(PolicyError, match="give: request 'a' is in a step; hold it"):
        scheduler.give("a", 0.0)
    scheduler.hold("a", 0.0)
    assert not scheduler.pop_events()
    scheduler.finish(batch, [{}], 1.0)
    assert scheduler.pop_events() == [Held("a", 1.0)]
    assert scheduler.next_batch("gpu", 1.0) is None  # in no view
    assert scheduler.give("a", 1.0).saved.stage == "denoise"


def test_a_held_job_runs_again_when_it_is_resumed_and_can_be_cancelled():
    scheduler = scheduler_of()
    for id in "ab":
        scheduler.submit(Request(id, IMAGE), 0.0)
    scheduler.hold("a", 0.0)
    assert [job.id for job in scheduler.next_batch("gpu", 0.0).jobs] == ["b"]
    scheduler.resume("a")
    assert [job.id for job in scheduler.next_batch("gpu", 0.0, 1).jobs] == ["a"]
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.hold("a", 0.0)
    assert scheduler.cancel("a", 0.5)
    assert [type(event) for event in scheduler.pop_events()] == [Held, Ended]
    scheduler.submit(Request("b", IMAGE), 0.5)
    assert scheduler.next_batch("gpu", 0.5) is not None


def test_unknown_and_ended_requests_cannot_be_moved():
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.cancel("a", 0.0)
    for move in (scheduler.hold, scheduler.give):
        for id in ("a", "nobody"):
            with pytest.raises(RequestError, match=f"{move.__name__}: no request '{id}' is being served"):
                move(id, 0.0)
    with pytest.raises(RequestError, match="resume: no request 'a'"):
        scheduler.resume("a")
    scheduler.submit(Request("b", IMAGE), 0.0)
    with pytest.raises(RequestError, match="resume: request 'b' is not held"):
        scheduler.resume("b")


def test_a_carry_of_another_graph_is_refused_with_both_prints():
    here, there = scheduler_of(), scheduler_of()
    here.submit(Request("a", IMAGE), 0.0)
    carry = here.give("a", 0.0)
    other = Graph("image", seq(STAGES[0], STAGES[1], STAGES[2]))
    with pytest.raises(GraphError, match=f"print {IMAGE.print}; .* has print {other.print}"):
        there.take(carry, other, 0.0)
    assert not there.jobs
    assert there.take(carry, IMAGE, 0.0).status == "waiting"
    with pytest.raises(RequestError, match="'a' is already being served"):
        there.take(carry, IMAGE, 0.0)


def test_a_carry_whose_place_is_not_in_the_graph_is_refused():
    here = scheduler_of()
    here.submit(Request("a", IMAGE), 0.0)
    carry = here.give("a", 0.0)
    there = scheduler_of()
    for frames, problem in ((((99, 0, 1),), "loop 99 at 0 of 1"), (((1, 0, 1),), "loop 1 at 0 of 1")):
        saved = carry.saved._replace(frames=frames)
        with pytest.raises(GraphError, match=problem):
            there.take(replace(carry, saved=saved), IMAGE, 0.0)
    with pytest.raises(GraphError, match="no stage 'vae'"):
        there.take(replace(carry, saved=carry.saved._replace(stage="vae")), IMAGE, 0.0)
    assert not there.jobs


@settings(max_examples=100, deadline=None)
@given(anything, st.integers(0, 12), st.integers(1, 3))
def test_a_saved_place_goes_on_as_the_cursor_that_stayed(node, stay, every):
    graph = Graph("any", node)
    job, moved = Job(Request("a", graph)), Job(Request("a", graph))
    here, there = Cursor(graph, job), Cursor(graph, moved)
    for count in range(60):
        assert (here.stage is None) == (there.stage is None)
        if here.stage is None:
            break
        assert here.stage is there.stage
        assert list(here.ahead(job)) == list(there.ahead(moved))
        if count >= stay and count % every == 0:
            there = Cursor.load(graph, pickle.loads(pickle.dumps(there.save(graph))))
        for one in (job, moved):
            one.state.update(step(one))
        here.advance(job)
        there.advance(moved)


def test_prints_differ_with_structure_and_not_with_conditions():
    one = Graph("g", seq(STAGES[0], loop(STAGES[1], times=3)))
    assert one.print == Graph("g", seq(STAGES[0], loop(STAGES[1], times=9))).print
    assert len({one.print, Graph("h", one.root).print, Graph("g", seq(STAGES[0], STAGES[1])).print}) == 3
    assert [type(node).__name__ for node in one.nodes] == ["Seq", "Stage", "Loop", "Stage"]
