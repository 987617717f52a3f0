"""Graphs are walked as written, budgets count what lies ahead, and mistakes are named."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from walks import counted, free, step, walk

from neustream import Graph, GraphError, Job, Request, Stage, loop, seq, switch
from neustream.core.cursor import Cursor

A, B, C, D = Stage("a"), Stage("b"), Stage("c"), Stage("d")


def job_of(root, **params):
    return Job(Request("r1", Graph("g", root), params=params))


def start(job):
    return Cursor(job.request.graph, job)


def visited(root, **params):
    """The names of the stages in the order that a job of these parameters runs them."""
    job = job_of(root, **params)
    cursor, names = start(job), []
    while cursor.stage is not None:
        names.append(cursor.stage.name)
        job.state.update(step(job))
        cursor.advance(job)
    return "".join(names)


def ahead(cursor, job):
    return [(stage.name, count) for stage, count in cursor.ahead(job)]


# -- walking ----------------------------------------------------------------------------------------


def test_a_graph_may_be_a_single_stage():
    assert visited(A) == "a"


def test_seq_runs_its_nodes_in_order():
    assert visited(seq(A, seq(B, C), D)) == "abcd"


def test_an_empty_seq_runs_nothing():
    assert visited(seq(A, seq(), B)) == "ab"


def test_a_stage_may_stand_in_several_places():
    assert visited(seq(A, loop(A, times=2), B, A)) == "aaaba"


def test_loop_runs_its_body_times():
    assert visited(seq(A, loop(B, times=3), C)) == "abbbc"


def test_times_may_ask_the_job():
    graph = seq(A, loop(B, times=lambda job: job.params["steps"]), C)
    assert visited(graph, steps=2) == "abbc"
    assert visited(graph, steps=4) == "abbbbc"


def test_times_is_asked_once_when_the_job_gets_there():
    graph = loop(A, times=lambda job: 3 - job.state.get("steps", 0))
    assert visited(seq(graph, graph)) == "aaa"  # 3 rounds, then 0 for the second loop


@pytest.mark.parametrize("root, names", [(seq(A, loop(B, times=0), C), "ac"), (seq(loop(A, times=0), B), "b")])
def test_times_zero_skips_the_loop(root, names):
    assert visited(root) == names


def test_a_graph_in_which_nothing_runs_is_over_at_once():
    job = job_of(loop(A, times=0))
    cursor = start(job)
    assert cursor.stage is None
    assert ahead(cursor, job) == []


def test_loops_nest():
    assert visited(loop(seq(A, loop(B, times=2), C), times=2)) == "abbcabbc"
    assert visited(loop(loop(A, times=2), times=3)) == "aaaaaa"


def test_a_counted_loop_over_nothing_ends():
    assert visited(seq(A, loop(seq(), times=3), loop(loop(B, times=0), times=3), C)) == "ac"


def test_until_is_asked_after_each_round():
    assert visited(loop(A, until=lambda job: True, expect=5)) == "a"
    assert visited(seq(loop(A, until=lambda job: job.state["steps"] >= 4, expect=1), B)) == "aaaab"


def test_expect_does_not_change_the_walk():
    graph = loop(seq(A, B), times=2, expect=7)
    assert visited(graph) == "abab"
    assert visited(loop(A, until=lambda job: job.state["steps"] >= 3, expect=0)) == "aaa"


def test_switch_runs_the_case_that_it_chooses():
    graph = seq(A, switch(lambda job: job.params["way"], {"b": B, "none": seq(), "cd": seq(C, D)}, likely="b"), A)
    assert visited(graph, way="b") == "aba"
    assert visited(graph, way="cd") == "acda"
    assert visited(graph, way="none") == "aa"


def test_an_agent_loops_over_turns_with_a_switch():
    llm, search, code = Stage("l"), Stage("s"), Stage("c")
    tool = switch(lambda job: job.params["plan"][job.state["turn"]], {"s": search, "c": code, "-": seq()}, likely="s")
    agent = Graph("agent", loop(seq(llm, tool), until=lambda job: job.state["turn"] == 3, expect=3))
    job = Job(Request("r1", agent, params={"plan": "sc-s"}))
    cursor, names = start(job), ""
    while cursor.stage is not None:
        names += cursor.stage.name
        if cursor.stage is llm:
            job.state["turn"] = job.state.get("turn", -1) + 1
        cursor.advance(job)
    assert names == "lslclls"


# -- budgets ----------------------------------------------------------------------------------------


def test_ahead_counts_times_exactly():
    job = job_of(seq(A, loop(B, times=lambda job: job.params["steps"]), C), steps=3)
    cursor = start(job)
    assert ahead(cursor, job) == [("a", 1), ("b", 3), ("c", 1)]
    cursor.advance(job)
    assert ahead(cursor, job) == [("b", 3), ("c", 1)]
    cursor.advance(job)
    assert ahead(cursor, job) == [("b", 2), ("c", 1)]
    cursor.advance(job)
    cursor.advance(job)
    assert ahead(cursor, job) == [("c", 1)]
    cursor.advance(job)
    assert ahead(cursor, job) == []


def test_ahead_counts_every_stage_of_a_long_body():
    job = job_of(seq(loop(seq(A, loop(B, times=2)), times=3), C))
    cursor, left = start(job), []
    while cursor.stage is not None:
        counts = Counter()
        for name, count in ahead(cursor, job):
            counts[name] += count
        left.append((cursor.stage.name, counts["a"], counts["b"], counts["c"]))
        cursor.advance(job)
    assert left[:4] == [("a", 3, 6, 1), ("b", 2, 6, 1), ("b", 2, 5, 1), ("a", 2, 4, 1)]
    assert left[-1] == ("c", 0, 0, 1)


def test_ahead_comes_in_order_so_that_the_next_output_is_seen():
    job = job_of(loop(seq(A, B), times=3))
    assert ahead(start(job), job)[:2] == [("a", 1), ("b", 1)]


def test_ahead_counts_until_by_its_expectation():
    job = job_of(
        seq(A, loop(B, until=lambda job: job.state["steps"] > 5, expect=lambda job: job.params["about"])), about=2
    )
    cursor, seen = start(job), []
    while cursor.stage is not None:
        seen.append(ahead(cursor, job))
        job.state.update(step(job))
        cursor.advance(job)
    assert seen == [[("a", 1), ("b", 2)], [("b", 2)], [("b", 1)], [("b", 1)], [("b", 1)], [("b", 1)]]


def test_ahead_counts_the_likely_case_until_the_job_is_there():
    job = job_of(seq(A, switch(lambda job: "long", {"long": loop(B, times=3), "short": C}, likely="short"), D))
    cursor = start(job)
    assert ahead(cursor, job) == [("a", 1), ("c", 1), ("d", 1)]
    cursor.advance(job)
    assert ahead(cursor, job) == [("b", 3), ("d", 1)]


def test_expect_stands_in_for_times_that_cannot_be_asked_yet():
    job = job_of(seq(A, loop(B, times=lambda job: job.state["plan"], expect=4)))
    cursor = start(job)
    assert ahead(cursor, job) == [("a", 1), ("b", 4)]
    job.state["plan"] = 2
    cursor.advance(job)
    assert ahead(cursor, job) == [("b", 2)]


def test_again_moves_on_only_in_a_loop_over_one_stage():
    job = job_of(seq(loop(A, times=3), B))
    cursor = start(job)
    assert [cursor.again(job), cursor.again(job), cursor.again(job)] == [True, True, False]
    assert ahead(cursor, job) == [("a", 1), ("b", 1)]  # a refusal changes nothing
    assert cursor.advance(job) is B
    for root in (A, seq(A, A), loop(seq(A), times=2), loop(A, until=lambda job: True, expect=3)):
        job = job_of(root)
        assert not start(job).again(job)


def test_again_asks_until_and_stops_where_the_budget_does():
    job = job_of(loop(A, until=lambda job: job.state.get("over", False), expect=3))
    cursor = start(job)
    assert [cursor.again(job), cursor.again(job), cursor.again(job)] == [True, True, False]
    assert cursor.advance(job) is A  # past what was expected the loop goes on
    job.state["over"] = True
    assert not cursor.again(job)
    assert cursor.advance(job) is None


# -- random graphs ----------------------------------------------------------------------------------

STAGES = [A, B, C, D]
START = Stage("start")


@given(node=free(STAGES))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_the_cursor_walks_as_the_recursive_generator_does(node):
    root = seq(START, node)
    job, twin = job_of(root), job_of(root)
    cursor, oracle = start(job), walk(root, twin)
    for expected in islice(oracle, 300):
        assert cursor.stage is expected
        assert next(iter(cursor.ahead(job)))[0] is expected
        job.state.update(step(job))
        twin.state.update(step(twin))
        if not cursor.again(job):
            cursor.advance(job)
    assert next(oracle, None) is cursor.stage


@given(node=counted(STAGES))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_ahead_is_exact_for_seq_and_counted_loops(node):
    job = job_of(seq(START, node))
    steps = list(walk(seq(START, node), job))
    cursor = start(job)
    for done in range(len(steps)):
        counts = Counter()
        for stage, count in cursor.ahead(job):
            counts[stage] += count
        assert counts == Counter(steps[done:])
        cursor.advance(job)
    assert cursor.stage is None


@given(node=free(STAGES))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_again_agrees_with_advance(node):
    root = seq(START, node)
    quick_job, plain_job = job_of(root), job_of(root)
    quick, plain = start(quick_job), start(plain_job)
    for _ in range(300):
        assert quick.stage is plain.stage
        assert ahead(quick, quick_job) == ahead(plain, plain_job)
        if plain.stage is None:
            break
        quick_job.state.update(step(quick_job))
        plain_job.state.update(step(plain_job))
        if not quick.again(quick_job):
            quick.advance(quick_job)
        plain.advance(plain_job)


# -- what a graph knows of its stages ---------------------------------------------------------------


def test_a_graph_lists_its_stages_in_order_and_those_in_loops():
    way = switch(lambda job: 0, {0: C, 1: loop(D, times=2)}, likely=0)
    graph = Graph("g", seq(A, loop(seq(B, way), times=2), A))
    assert list(graph.stages) == ["a", "b", "c", "d"]
    assert graph.stages["c"] is C
    assert graph.position == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert graph.looped == {"b", "c", "d"}
    assert repr(graph) == "Graph('g')"
    assert repr(A) == "Stage('a')"


# -- mistakes ---------------------------------------------------------------------------------------


def test_a_stage_needs_a_name_and_room_for_one_job():
    with pytest.raises(GraphError, match="a stage needs a name"):
        Stage("")
    for most in (0, -3):
        with pytest.raises(GraphError, match=rf"stage 'x': max_batch must be 1 or more, got {most}"):
            Stage("x", max_batch=most)


def test_two_stages_of_one_name_are_refused():
    with pytest.raises(GraphError, match="graph 'g' has two different stages named 'a'"):
        Graph("g", seq(A, loop(Stage("a"), times=2)))


def test_a_graph_needs_a_stage():
    with pytest.raises(GraphError, match="graph 'g' has no stage"):
        Graph("g", seq(loop(seq(), times=2)))


def test_only_nodes_can_be_in_a_graph():
    with pytest.raises(GraphError, match="not a graph node: 'unet'; use Stage, seq, loop, switch, par, call or tool"):
        Graph("g", seq(A, "unet"))


def test_a_loop_takes_times_or_until():
    with pytest.raises(GraphError, match=r"either times=... or until="):
        loop(A)
    with pytest.raises(GraphError, match=r"either times=... or until="):
        loop(A, times=2, until=lambda job: True)


def test_a_loop_that_never_ends_fails_at_its_most():
    job = job_of(loop(A, until=lambda job: False, most=2))
    cursor = start(job)
    assert cursor.advance(job) is A
    with pytest.raises(GraphError, match=r"request 'r1': a loop did not end within 2 rounds \(most=...\)"):
        cursor.advance(job)
    with pytest.raises(GraphError, match="a loop's most must be a whole number from 1 to 1000000000, got 0"):
        loop(A, until=lambda job: True, most=0)
    with pytest.raises(GraphError, match="ends by itself"):
        loop(A, times=3, most=2)


def test_a_switch_needs_cases_and_a_likely_one_among_them():
    with pytest.raises(GraphError, match="at least one case"):
        switch(lambda job: 0, {}, likely=0)
    with pytest.raises(GraphError, match=r"likely='z' is not one of its cases \['x', 'y'\]"):
        switch(lambda job: 0, {"x": A, "y": B}, likely="z")


def test_an_unknown_case_is_an_error_that_names_the_request():
    job = job_of(seq(A, switch(lambda job: "z", {"x": B, "y": C}, likely="x")))
    cursor = start(job)
    with pytest.raises(GraphError, match=r"request 'r1': switch chose 'z'; its cases are \['x', 'y'\]"):
        cursor.advance(job)


@pytest.mark.parametrize("rounds", [-1, 2.0, True, "3", None])
def test_rounds_must_be_whole_numbers(rounds):
    with pytest.raises(
        GraphError, match=r"request 'r1': a loop's times must be a whole number from 0 to 1000000000, got"
    ):
        start(job_of(loop(A, times=lambda job: rounds)))
    job = job_of(seq(A, loop(B, until=lambda job: True, expect=lambda job: rounds)))
    with pytest.raises(
        GraphError, match=r"request 'r1': a loop's expect must be a whole number from 0 to 1000000000, got"
    ):
        list(start(job).ahead(job))


def test_a_constant_is_checked_as_an_answer_is():
    with pytest.raises(GraphError, match="got -2"):
        start(job_of(loop(A, times=-2)))


@pytest.mark.parametrize("body", [seq(), loop(B, times=0), loop(seq(), until=lambda job: True, expect=1)])
def test_a_round_that_runs_no_stage_would_never_end(body):
    job = job_of(seq(A, loop(body, until=lambda job: False, expect=1)))
    cursor = start(job)
    with pytest.raises(GraphError, match="request 'r1': a round of a loop ran no stage, so it would never end"):
        cursor.advance(job)


def test_a_round_that_runs_no_stage_may_be_the_last():
    empty_then_stop = loop(seq(), until=lambda job: True, expect=1)
    assert visited(seq(A, empty_then_stop, B)) == "ab"


def broken(job):
    raise KeyError("steps")


@pytest.mark.parametrize(
    "root, what",
    [
        (seq(A, loop(B, times=broken, expect=1)), "a loop's times"),
        (seq(A, loop(B, until=lambda job: True, expect=broken)), "a loop's expect"),
        (loop(A, until=broken, expect=1), "a loop's until"),
        (seq(A, switch(broken, {0: B}, likely=0)), "a switch"),
    ],
)
def test_a_callback_that_raises_is_wrapped_and_names_the_request(root, what):
    job = job_of(root)
    cursor = start(job)
    with pytest.raises(GraphError, match=f"request 'r1': {what} raised KeyError: 'steps'") as caught:
        cursor.advance(job)
    assert isinstance(caught.value.__cause__, KeyError)
