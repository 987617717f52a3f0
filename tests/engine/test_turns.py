"""Requests that go on with others."""

from __future__ import annotations

from toys import one_stage, request

from neustream.engine.turns import Next, Turn, Turns

GRAPH = one_stage()
FIRST, SECOND, THIRD = (request(id, GRAPH, arrival) for id, arrival in (("a", 0.0), ("b", 1.0), ("c", 2.0)))


def arrivals(found):
    return [(each.request.id, each.request.arrival, each.blocked) for each in found]


def test_a_turn_comes_when_the_one_before_is_done_and_thought_about():
    turns = Turns({"b": Turn("a", 0.5), "c": Turn("b")})
    assert turns.came(FIRST) == [Next(FIRST)] and not turns.waiting
    assert turns.came(SECOND) == turns.came(THIRD) == [] and turns.waiting
    assert arrivals(turns.ended("a", 3.0, done=True)) == [("b", 3.5, "")]
    assert arrivals(turns.ended("b", 4.0, done=True)) == [("c", 4.0, "")]
    assert not turns.waiting and turns.ended("c", 5.0, done=True) == []


def test_a_turn_that_comes_late_waits_no_more_and_not_before_its_own_arrival():
    turns = Turns({"b": Turn("a", 0.25), "c": Turn("a", 0.25)})
    turns.came(FIRST)
    assert turns.ended("a", 0.5, done=True) == []
    assert arrivals(turns.came(SECOND)) == [("b", 1.0, "")]
    assert arrivals(turns.came(THIRD)) == [("c", 2.0, "")]


def test_all_turns_behind_one_that_was_not_done_are_blocked():
    turns = Turns({"b": Turn("a"), "c": Turn("b")})
    for each in (FIRST, SECOND, THIRD):
        turns.came(each)
    found = turns.ended("a", 3.0, done=False)
    assert [each.request.id for each in found] == ["b", "c"]
    assert [each.blocked for each in found] == [f"the turn before it, {id!r}, failed" for id in "ab"]
    assert not turns.waiting and turns.ended("a", 4.0, done=True) == []


def test_a_turn_behind_nothing_is_blocked():
    turns = Turns({"b": Turn("x")})
    (blocked,) = turns.came(SECOND)
    assert blocked.blocked == "the turn before it, 'x', did not come before it" and not turns.waiting
