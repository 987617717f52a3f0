"""Moves between instances: each row of their table by hand, and all of them over bad wires."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from clusters import GRAPH, STREAM, head_of, orders_of, over, request, send
from hypothesis import given, settings
from hypothesis import strategies as st
from wires import World

from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.fleet import Fleet, Move
from neustream.cluster.happenings import Moved, Unmoved


@dataclass(frozen=True)
class To:
    """Moves all requests of one instance to another, again and again."""

    source: str
    target: str

    def moves(self, fleet: Fleet) -> list[Move]:
        if not {self.source, self.target} <= set(fleet.instances):
            return []
        return [Move(place.id, self.source, self.target, "test") for place in fleet.requests(self.source) if place.free]


def moving(step: str, graph=STREAM):
    """A head whose request "r" is on the move from "a" to "b", up to a step, with an output made."""
    patient = Settings(suspect_s=90.0, dead_s=90.0, deaths=9)
    head = head_of("a", mover=To("a", "b"), again={"stream": "repeat", "image": "repeat"}, settings=patient)
    head.submit(request("r", graph=graph), 0.0)
    head.heard("a", say.Took("r", 1), 0.0)
    head.joined("b", 0.0, stages=("frame", "step", "decode"))
    if graph is STREAM:
        head.heard("a", say.Made("r", 1, 0, {}), 0.1)
    head.pop_orders()
    head.tick(0.2)
    (order,) = head.pop_orders()
    assert order == say.Reserve("b", "r", 2, 1, 0.0)
    if step == "room":
        return head
    head.heard("b", say.Reserved("r", 2), 0.2)
    assert head.pop_orders() == [say.Hold("a", "r", 1)]
    if step == "hold":
        return head
    head.heard("a", say.Waits("r", 1), 0.3)
    assert head.pop_orders() == [say.Give("a", "r", 1, "b", 2)]
    return head


def test_a_move_in_its_steps():
    head = moving("take")
    head.heard("b", say.Took("r", 2), 0.4)
    assert head.pop_orders() == [say.Free("a", "r", 1)]
    (moved,) = [event for event in head.pop_events() if isinstance(event, Moved)]
    assert (moved.source, moved.target, moved.held_at, moved.at) == ("a", "b", 0.3, 0.4)
    head.heard("a", say.Made("r", 1, 1, {}), 0.5)  # of the old term
    head.heard("b", say.Made("r", 2, 1, {}), 0.5)
    head.heard("b", over("r", 2, outputs=2), 0.6)
    assert [type(order) for order in head.pop_orders()] == [say.Free, say.Forward, say.Answer]


def test_outputs_that_the_source_could_not_tell_come_with_the_target():
    head = moving("take")
    head.heard("b", say.Took("r", 2, unheard=((0, {}), (1, {}), (2, {}))), 0.4)
    assert [order.emitted.index for order in orders_of(head, say.Forward)] == [1, 2]


def test_a_target_without_room_changes_nothing():
    head = moving("room")
    head.heard("b", say.Refused("r", 2, "no blocks"), 0.3)
    assert head.pop_orders() == [say.Free("b", "r", 2)]
    (unmoved,) = [event for event in head.pop_events() if isinstance(event, Unmoved)]
    assert unmoved.reason == "no blocks"


def test_what_cannot_move_is_not_asked_again():
    head = moving("take")
    head.heard("a", say.Refused("r", 1, "not movable: module Sampler keeps it"), 0.4)
    assert head.pop_orders() == [say.Free("b", "r", 2), say.Resume("a", "r", 1)]
    head.tick(9.0)
    assert not orders_of(head, say.Reserve)


@pytest.mark.parametrize("step", ["room", "hold", "take"])
class TestFailures:
    def test_the_request_ends_meanwhile(self, step):
        head = moving(step)
        head.heard("a", over("r", 1, outputs=1), 0.4)
        orders = head.pop_orders()
        assert say.Free("b", "r", 2) in orders and isinstance(orders[-1], say.Answer)
        head.heard("b", say.Took("r", 2), 0.5)  # its parcel was on the way
        assert head.pop_orders() == [say.Free("b", "r", 2)]

    def test_the_target_dies(self, step):
        head = moving(step)
        head.lost("b", "killed", 0.4)
        assert head.pop_orders() == ([say.Resume("a", "r", 1)] if step != "room" else [])
        head.heard("a", over("r", 1, outputs=1), 0.5)
        assert orders_of(head, say.Answer)

    def test_the_source_dies(self, step):
        head = moving(step)
        head.lost("a", "killed", 0.4)
        if step == "take":  # the target may have it
            assert not head.pop_orders()
            head.heard("b", say.Took("r", 2), 0.5)
            head.heard("b", over("r", 2, outputs=1), 0.6)
        else:
            free, again, _ = head.pop_orders()
            assert free == say.Free("b", "r", 2) and (again.instance, again.term) == ("b", 3)
            head.heard("b", say.Took("r", 3), 0.5)
            head.heard("b", over("r", 3, outputs=1), 0.6)
        assert orders_of(head, say.Answer)

    def test_both_die(self, step):
        head = moving(step)
        head.lost("a", "killed", 0.4)
        head.lost("b", "killed", 0.4)
        head.joined("c", 0.5, stages=("frame",))
        *_, again = orders_of(head, say.Send)
        assert again.instance == "c"

    def test_it_takes_too_long(self, step):
        head = moving(step)
        head.tick(5.3)
        expected = [say.Free("b", "r", 2)] + [say.Resume("a", "r", 1)] * (step != "room")
        assert [order for order in head.pop_orders() if not isinstance(order, say.Reserve)] == expected

    def test_its_caller_gives_it_up(self, step):
        head = moving(step)
        head.cancel("r", 0.4)
        assert head.pop_orders() == [say.Cancel("a", "r", 1)]
        head.heard("a", over("r", 1, "cancelled", outputs=1), 0.5)
        (answer,) = orders_of(head, say.Answer)
        assert answer.ended.status == "cancelled"


def test_who_gives_up_while_it_leaves_is_cancelled_where_it_is_then():
    """The first order came when the source did not have it in its hands any more."""
    head = moving("hold")
    head.cancel("r", 0.3)
    head.pop_orders()
    head.heard("a", say.Waits("r", 1), 0.4)
    assert head.pop_orders() == [say.Cancel("a", "r", 1)]
    head = moving("take")
    head.cancel("r", 0.3)
    head.pop_orders()
    head.heard("b", say.Took("r", 2), 0.4)
    assert head.pop_orders() == [say.Free("a", "r", 1), say.Cancel("b", "r", 2)]


def test_after_the_source_died_the_target_is_not_waited_for_for_ever():
    head = moving("take")
    head.lost("a", "killed", 0.4)
    head.tick(head.wake_at())
    while not (sent := orders_of(head, say.Send)):
        head.tick(head.wake_at())
    assert sent[0].term > 2


def test_a_poison_request_stops_at_two_deaths():
    head = head_of("a", "b", "c", settings=Settings(restarts=9))
    order = send(head, request("r"))
    for now in (1.0, 2.0):
        head.heard(order.instance, say.Began("r", order.term), now)
        head.lost(order.instance, "signal 11", now)
        sent = orders_of(head, say.Send) if now < 2 else []
        if sent:
            order = sent[0]
            head.heard(order.instance, say.Took("r", order.term), now)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.reason.startswith("was running when 2 instances died; the last: lost with instance")
    assert len(head.fleet.instances) == 1


def test_requests_that_only_waited_on_instances_that_died_are_innocent():
    head = head_of("a", "b", "c", settings=Settings(restarts=9))
    order = send(head, request("r"))
    for now in (1.0, 2.0):
        head.heard(order.instance, say.Told(outlook(order)), now)
        head.lost(order.instance, "signal 11", now)
        (order,) = orders_of(head, say.Send)
        head.heard(order.instance, say.Took("r", order.term), now)
    head.heard(order.instance, over("r", order.term), 3.0)
    assert orders_of(head, say.Answer)[0].ended.status == "done"


def outlook(order: say.Send):
    from neustream.core.outlook import Outlook

    return Outlook(order.instance, 0.0, order.number)


def test_a_restart_that_cannot_be_in_time_is_not_tried():
    from neustream import SLO

    head = head_of("a", "b")
    order = send(head, request("r", slo=SLO(total=2.0), steps=10))
    head.lost(order.instance, "killed", 1.5)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.reason == f"lost with instance {order.instance!r} (killed); needs 1.100 s more, due in 0.500 s"


@pytest.mark.parametrize("again", ["replay", "repeat", "fail"])
def test_what_becomes_of_a_stream_whose_instance_is_gone(again):
    head = head_of("a", "b", again={"stream": again})
    order = send(head, request("r", graph=STREAM))
    head.heard(order.instance, say.Made("r", 1, 0, {"frame": 0}), 0.1)
    head.lost(order.instance, "killed", 0.2)
    orders = head.pop_orders()
    if again == "fail":
        reason = orders[-1].ended.reason
        assert reason.endswith("after 1 outputs; its stream cannot be made again")
        return
    (sent,) = [order for order in orders if isinstance(order, say.Send)]
    assert sent.made == (({"frame": 0},) if again == "replay" else ())
    head.heard(sent.instance, say.Took("r", 2), 0.2)
    first = 1 if again == "replay" else 0
    for index in range(first, 3):
        head.heard(sent.instance, say.Made("r", 2, index, {"frame": index}), 0.3)
    assert [order.emitted.index for order in orders_of(head, say.Forward)] == [1, 2]


def test_a_dispatch_that_is_not_acknowledged_goes_elsewhere():
    head = head_of("a", "b")
    head.submit(request("r"), 0.0)
    (first,) = orders_of(head, say.Send)
    head.heard("a", say.Told(outlook(first)), 1.9)
    head.heard("b", say.Told(outlook(first)), 1.9)
    head.tick(2.0)
    free, second, *_ = head.pop_orders()
    assert free == say.Free(first.instance, "r", 1) and second.term == 2
    head.heard(first.instance, say.Took("r", 1), 2.1)  # late
    assert head.pop_orders() == [say.Free(first.instance, "r", 1)]


def test_a_drained_instance_gives_all_away_and_stops():
    head = head_of("a", again={"stream": "repeat"})
    head.submit(request("r", graph=GRAPH), 0.0)
    head.heard("a", say.Took("r", 1), 0.0)
    head.joined("b", 0.0, stages=("frame", "step", "decode"))
    head.pop_orders()
    head.drain("a", 1.0)
    head.tick(1.0)
    assert orders_of(head, say.Reserve)[0].instance == "b"
    head.heard("b", say.Reserved("r", 2), 1.0)
    head.heard("a", say.Waits("r", 1), 1.1)
    head.heard("b", say.Took("r", 2), 1.2)
    head.tick(1.3)
    assert head.pop_orders()[-1] == say.Stop("a", "drained")


def test_what_does_not_leave_a_drained_instance_in_time_begins_anew():
    head = head_of("a", "b", settings=Settings(drain_s=3.0, dead_s=90.0, suspect_s=90.0))
    order = send(head, request("r"))
    other = "b" if order.instance == "a" else "a"
    head.drain(order.instance, 0.0)
    head.tick(0.0)
    head.heard(other, say.Refused("r", 2, "not movable"), 0.1)
    head.pop_orders()
    head.tick(3.0)
    orders = head.pop_orders()
    assert orders[0] == say.Free(order.instance, "r", 1)
    assert [(one.instance, one.id) for one in orders if isinstance(one, say.Send)] == [(other, "r")]
    assert say.Stop(order.instance, "drained") in orders


def test_streams_move_without_a_gap_or_a_repeat():
    world = World(lambda epoch: head_of(mover=To("a", "b"), epoch=epoch), ["a", "b"], lambda: [0.01])
    for number in range(4):
        world.submit(request(str(number), graph=STREAM, steps=8))
    world.run(4, 60.0)
    moved = [event for event in world.head.pop_events() if isinstance(event, Moved)]
    assert len(moved) == 2, "those that were sent to a"
    assert all(outputs == list(range(8)) for outputs in world.outputs.values()) and len(world.outputs) == 4


# -- over bad wires ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_request_is_answered_once_whatever_the_wires_and_the_instances_do(data):
    """Letters are lost, repeated, delayed and reordered; two of three instances may die, and heads; all moves."""
    names = ["a", "b", "c"]
    random = Random(data.draw(st.integers(0, 2**32)))
    again = data.draw(st.sampled_from(["replay", "repeat"]))
    lossy = data.draw(st.floats(0, 0.4))

    def fate() -> list[float]:
        if random.random() < lossy:
            return []
        copies = 2 if random.random() < 0.2 else 1
        return [random.choice([0.001, 0.01, 0.3]) for _ in range(copies)]

    snapshot_s = data.draw(st.sampled_from([float("inf"), 0.05, 0.25]))
    limits = Settings(restarts=9, deaths=9, snapshot_s=snapshot_s)
    rules = {"mover": To(*data.draw(st.permutations(names))[:2]), "settings": limits}
    world = World(lambda epoch: head_of(again={"stream": again}, epoch=epoch, **rules), names, fate)
    count = 4
    for number in range(count):
        one = request(str(number), graph=STREAM, steps=6)
        world.at(0.1 * number, lambda one=one: world.submit(one))
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        world.at(random.uniform(0.0, 2.0), lambda name=name: world.kill(name))
    if data.draw(st.booleans()):
        world.at(random.uniform(0.0, 2.0), lambda: world.cancel("0"))
    for _ in range(data.draw(st.integers(0, 3))):
        gap = random.choice([0.001, 0.05, 1.0])
        world.at(random.uniform(0.0, 2.0), lambda gap=gap: world.kill_head(gap))
    world.run(count, 60.0)
    assert set(world.answers) == {str(number) for number in range(count)}
    for id, outputs in world.outputs.items():
        assert outputs == list(range(len(outputs)))
        if world.answers[id].ended.status == "done":
            assert len(outputs) == 6
    assert {answer.ended.status for answer in world.answers.values()} <= {"done", "cancelled"}
    assert world.head.open == 0
    left = {id for one in world.instances.values() if one.alive for id in one.jobs.keys() - one.served.orphans.keys()}
    assert not left, "only what no head asked for is there until its lease ends"
    assert not any(len(one.keeping) for one in world.instances.values() if one.alive and one.epoch == world.epoch)
