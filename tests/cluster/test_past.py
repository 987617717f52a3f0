"""What requests went through under heads that are gone: deaths and restarts count on."""

from __future__ import annotations

from random import Random

import pytest
from clusters import STAGES, STREAM, head_of, orders_of, request, send
from hypothesis import given, settings
from hypothesis import strategies as st
from test_member_instance import Bench, begin
from test_simulation import Run
from wires import World

from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.messages import TERMS, Past
from neustream.cluster.network import Fault
from neustream.cluster.past import Remembered
from neustream.cluster.reporting import Reporting


def told(pasts: Past | tuple[Past, ...]) -> say.Here:
    return say.Here((), pasts if isinstance(pasts, tuple) else (pasts,))


# -- the head ----------------------------------------------------------------------------------------


def test_all_instances_are_told_of_a_request_that_begins_anew_and_that_it_is_over():
    head = head_of("a", "b", "c")
    sent = send(head, request("r"))
    assert not [order for order in head.pop_orders() if isinstance(order, say.Remember)]
    head.heard(sent.instance, say.Began("r", sent.term), 0.1)
    head.lost(sent.instance, "killed", 0.2)
    orders = head.pop_orders()
    (again,) = [order for order in orders if isinstance(order, say.Send)]
    kept = [order for order in orders if isinstance(order, say.Remember)]
    assert {order.instance for order in kept} == {"a", "b", "c"} - {sent.instance}
    assert all(order.pasts == (Past("r", 2, again.instance, 1, 1),) for order in kept)
    head.joined("d", 0.3, stages=STAGES)
    assert [order.pasts for order in orders_of(head, say.Remember)] == [kept[0].pasts]
    head.cancel("r", 0.4)
    head.heard(again.instance, say.Over("r", 2, "cancelled", "", None, 0, 0.0, True), 0.5)
    forgotten = orders_of(head, say.Remember)
    assert {order.instance for order in forgotten} == {"a", "b", "c", "d"} - {sent.instance}
    assert all(order.over == ("r",) and not order.pasts for order in forgotten)
    head.joined("e", 0.6, stages=STAGES)
    assert not orders_of(head, say.Remember)


def test_a_request_that_moved_on_is_told_of_where_it_is():
    head = head_of("a", "b")
    order = send(head, request("r"))
    head.heard(order.instance, say.Began("r", order.term), 0.0)
    head.tick(0.0)
    head._placing.restart(head._book.requests["r"], "for once", 0.1)
    (again,) = orders_of(head, say.Send)
    head.heard(again.instance, say.Took("r", again.term), 0.1)
    other = {"a": "b", "b": "a"}[again.instance]
    head.move("r", other, "because", 0.2)
    (room,) = orders_of(head, say.Reserve)
    head.heard(other, say.Reserved("r", room.term), 0.2)
    head.heard(again.instance, say.Waits("r", again.term), 0.2)
    head.heard(other, say.Took("r", room.term), 0.3)
    kept = orders_of(head, say.Remember)
    assert {order.pasts for order in kept} == {(Past("r", room.term, other, 1, 0),)}


@pytest.mark.parametrize("standing", [True, False])
def test_the_next_head_counts_on(standing):
    head = head_of("a", "b", epoch=1, settings=Settings(restarts=1, deaths=2))
    past = Past("r", 7, "a", 1, 1)
    here = say.Here((say.Standing("r", 7),) if standing else (), (past,))
    head.heard("a", here, 0.0)
    head.heard("b", told(past), 0.0)
    head.submit(request("r"), 0.1)
    (order,) = orders_of(head, say.Send)
    assert order.instance == "a" or not standing
    head.heard(order.instance, say.Took("r", order.term), 0.2)
    head.heard(order.instance, say.Began("r", order.term), 0.2)
    head.lost(order.instance, "killed", 0.3)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.reason.startswith("was running when 2 instances died")


@pytest.mark.parametrize(("deaths", "answered"), [(1, True), (0, False)])
def test_an_instance_that_died_while_there_was_no_head_counts(deaths, answered):
    head = head_of("a", "b", epoch=1)
    past = Past("r", 7, "gone", 1, deaths)
    head.heard("a", told(past), 0.0)
    head.heard("b", told(past), 0.0)
    head.submit(request("r"), 0.1)
    orders = head.pop_orders()
    answers = [order.ended for order in orders if isinstance(order, say.Answer)]
    if answered:
        assert answers[0].reason == (
            "was running when 2 instances died; the last: lost with instance 'gone' while there was no head"
        )
        return
    assert not answers
    kept = {order.pasts for order in orders if isinstance(order, say.Remember)}
    (order,) = [order for order in orders if isinstance(order, say.Send)]
    assert kept == {(Past("r", order.term, order.instance, 2, 1),)}


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_pasts_the_latest_counts_once(turned):
    """Instances that had not heard of the last head tell what the one before it knew."""
    head = head_of("a", "b", epoch=2)
    pasts = [Past("r", 7, "a", 1, 0), Past("r", TERMS + 1, "", 2, 1)]
    for name, past in zip("ab", pasts[::-1] if turned else pasts, strict=True):
        head.heard(name, told(past), 0.0)
    head.submit(request("r"), 0.1)
    assert {order.pasts[0].restarts for order in orders_of(head, say.Remember)} == {2}
    head.cancel("r", 0.2)
    head.heard("a", say.Over("r", 2 * TERMS + 1, "cancelled", "", None, 0, 0.0, True), 0.2)
    head.heard("b", say.Over("r", 2 * TERMS + 1, "cancelled", "", None, 0, 0.0, True), 0.2)
    head.pop_orders()
    head.submit(request("r"), 0.3)
    assert not orders_of(head, say.Remember), "another request of that name has no past"


@pytest.mark.parametrize("steps", [3, 4])
def test_a_request_that_asks_for_something_else_has_no_part_in_the_past_of_another_of_its_id(steps):
    def mark(one):
        return bytes([one.params["steps"]])

    head = head_of("a", "b", settings=Settings(restarts=1), mark=mark)
    sent = send(head, request("r", steps=3))
    head.lost(sent.instance, "killed", 0.2)
    (told_to,) = orders_of(head, say.Remember)
    (past,) = told_to.pasts
    head = head_of("a", "b", epoch=1, settings=Settings(restarts=1), mark=mark)
    for name in "ab":
        head.heard(name, told(past), 0.3)
    head.submit(request("r", steps=steps), 0.4)
    (order,) = orders_of(head, say.Send)
    head.lost(order.instance, "killed", 0.5)
    answers = orders_of(head, say.Answer)
    assert len(answers) == (steps == 3), "only the one that had begun anew before has no try left"


# -- an instance -------------------------------------------------------------------------------------


def test_an_instance_keeps_pasts_of_requests_anywhere_until_they_are_over_or_the_lease_ends():
    bench = Bench(reporting=Reporting(lease_s=0.15))
    mine, others = Past("r", 1, "a", 1, 1), Past("s", 4, "b", 1, 0)
    bench.do(begin("r"), say.Remember("a", 0, (mine, others)), say.Remember("a", 0, (), ("s",)))
    bench.do(say.Remember("a", 0, (others,)))
    assert bench.do(say.Ask("a", 1)) == [say.Here((say.Standing("r", 1),), (mine, others))]
    assert bench.do(say.Remember("a", 0, (), ("r", "s"))) == [], "of the head that is gone"
    again = Past("r", TERMS + 1, "a", 1, 1)
    bench.do(begin("r", term=TERMS + 1), say.Remember("a", TERMS, (again,)))
    while bench.jobs:
        bench.step()
    for _ in range(3):
        bench.do(begin("t", term=TERMS + 2))
        bench.step()
    assert bench.clock.now() > 0.15
    assert bench.do(say.Ask("a", 1))[-1].pasts == (again,)


def test_what_is_over_is_forgotten():
    kept = Remembered()
    kept.hear(say.Remember("a", 0, (Past("r", 1, "a", 1, 0),)))
    kept.hear(say.Remember("a", 0, (), ("r", "never heard of")))
    assert kept.all == ()


# -- simulated ---------------------------------------------------------------------------------------


def test_a_request_that_kills_its_instance_ends_at_two_though_the_head_died_between():
    """It dies with its first instance, then the head, then its second instance while there is none."""
    faults = [Fault(0.15, 0, "crash"), Fault(0.25, None, "head", 0.5), Fault(0.4, 1, "crash")]
    run = Run([request("r", steps=9)], 3, faults=faults)
    assert run.ended["r"].status == "failed" and "2 instances died" in run.ended["r"].reason


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_poison_costs_two_instances_whichever_heads_die_but_for_deaths_that_nobody_could_know(data):
    """Nobody knows of the death of an instance without a head, if what it had never began anew before.

    What a head told arrives before the next one asks; in any order and twice.
    """
    seed = data.draw(st.integers(0, 2**16))
    random = Random(seed)
    names = [f"i{number}" for number in range(9)]
    rules = {"settings": Settings(restarts=9, deaths=2), "again": {"stream": "repeat"}}

    def fate() -> list[float]:
        return [random.choice([0.0001, 0.0003]) for _ in range(random.choice([1, 1, 2]))]

    world = World(lambda epoch: head_of(epoch=epoch, **rules), names, fate)
    world.poison.add("p")
    dead, unknown = [], []

    def kill(name: str) -> None:
        others = [one for one in world.instances.values() if one.alive and one.name != name]
        known = {past.id for one in others for past in one.served.pasts.all}
        dead.append(name)
        unknown.extend([name] if world.head is None and "p" not in known else [])
        World.kill(world, name)

    world.kill = kill
    for number in range(data.draw(st.integers(0, 2))):
        world.at(0.1 * number, lambda id=str(number): world.submit(request(id, graph=STREAM, steps=3)))
    world.at(data.draw(st.floats(0.0, 0.3)), lambda: world.submit(request("p", graph=STREAM, steps=3)))
    heads = data.draw(st.lists(st.floats(0.0, 1.2), min_size=1, max_size=3))
    for at in heads:
        gap = random.choice([0.001, 0.15, 0.5])
        world.at(at, lambda gap=gap: world.kill_head(gap))
    world.run(len(world.asked) or 3, 20.0)
    assert "p" in world.answers and world.answers["p"].ended.status == "failed"
    assert len(dead) == 2 + len(unknown)
