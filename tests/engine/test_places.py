"""A bound on how many requests of a workload are under way."""

from __future__ import annotations

import pytest
from toys import draw_and_decode, engine, one_stage, request, table

from neustream.core.events import Ended, Submitted
from neustream.engine.events import Refused
from neustream.engine.places import Places
from neustream.engine.turns import Turn

GRAPH = one_stage()


def asked(*arrivals):
    return [request(f"r{at}", GRAPH, arrival) for at, arrival in enumerate(arrivals)]


def played(requests, places, turns=None):
    """When each came and ended, of steps of a second on one device."""
    log = []
    device = engine(GRAPH, {"s": table("s", 1.0)}, workers=4, observers=[log.append])
    device.run(requests, turns=turns or {}, places=places)
    came = {each.id: each.arrival for each in log if isinstance(each, Submitted)}
    ended = {each.id: each.at for each in log if isinstance(each, Ended)}
    assert came.keys() == ended.keys() == {each.id for each in requests}
    return came, ended


def test_who_finds_no_place_waits_for_one_in_order():
    first, second, third, fourth = asked(0.0, 0.0, 0.0, 9.0)
    places = Places(1)
    assert [places.enter(each) for each in (first, second, third, fourth)] == [True, False, False, False]
    assert places.waiting and places.left("r9", 1.0) is None and places.left("r1", 1.0) is None
    after = places.left("r0", 1.5)
    assert (after.id, after.arrival) == ("r1", 1.5) and places.enter(after)
    assert places.left("r1", 2.0).id == "r2"
    after = places.left("r2", 3.0)
    assert (after.id, after.arrival) == ("r3", 9.0) and not places.waiting
    assert places.left("r3", 10.0) is None and places.enter(first)


def test_some_get_a_place_before_the_others():
    first, second, third = asked(0.0, 0.0, 0.0)
    places = Places(1, ahead={"r2"})
    assert [places.enter(each) for each in (first, second, third)] == [True, False, False]
    assert [places.left("r0", 1.0).id, places.left("r2", 2.0).id] == ["r2", "r1"]


def test_without_a_bound_all_enter():
    places = Places()
    assert not places and all(places.enter(each) for each in asked(0.0, 0.0))
    assert places.left("r0", 1.0) is None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_closed_loop_keeps_so_many_under_way(most):
    came, ended = played(asked(*[0.0] * 6), Places(most))
    assert sorted(came.values()) == [float(at // most) for at in range(6)]
    assert all(ended[id] == at + 1.0 for id, at in came.items())


def test_a_request_that_comes_later_waits_only_while_all_places_are_taken():
    came, _ = played(asked(0.0, 0.25, 5.0), Places(1))
    assert came == {"r0": 0.0, "r1": 1.0, "r2": 5.0}


def test_a_turn_takes_no_place_while_it_waits_for_the_one_before():
    came, _ = played(asked(0.0, 0.0, 0.0), Places(1), {"r1": Turn("r0", 0.5)})
    assert came == {"r0": 0.0, "r2": 1.0, "r1": 2.0}


def test_a_place_is_free_again_after_a_request_that_is_refused():
    first, second = asked(0.0, 0.0)
    log = []
    device = engine(GRAPH, {"s": table("s", 1.0)}, observers=[log.append])
    device.run([request("r9", draw_and_decode(), 0.0), first, second], places=Places(1))
    assert [each.id for each in log if isinstance(each, Refused)] == ["r9"]
    assert [(each.id, each.at) for each in log if isinstance(each, Ended)] == [("r0", 1.0), ("r1", 2.0)]
