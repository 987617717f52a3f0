"""Several heads that begin at the same moment: one has all instances in the end, whatever the wires do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream.cluster.epochs import HOLDERS, Grant, holder, next_epoch


@pytest.mark.parametrize("known", [[], [0], [7], [HOLDERS * 3 + 5, 0, HOLDERS]])
def test_an_epoch_is_above_all_that_are_known_and_one_holder_s_only(known):
    first, second, last = (next_epoch(known, mine) for mine in (0, 1, HOLDERS - 1))
    assert len({first, second, last}) == 3 and min(first, second, last) > max(known, default=0)
    assert next_epoch([last], 0) > last


def test_holders_draw_numbers_of_their_own():
    assert len({holder() for _ in range(100)}) == 100


class Wire:
    """Calls to instances on their way: they arrive in any order, late, or never; with `repeat` again."""

    def __init__(self, data) -> None:
        self.data, self.calls = data, []

    def send(self, call) -> None:
        self.calls.append(call)

    def deliver(self, *, lossy: bool) -> None:
        """One of them."""
        at = self.data.draw(st.integers(0, len(self.calls) - 1))
        fates = ["arrives", "repeat", "lost"] if lossy else ["arrives"]
        fate = self.data.draw(st.sampled_from(fates))
        call = self.calls[at] if fate == "repeat" else self.calls.pop(at)
        if fate != "lost":
            call()


class Claimant:
    """Wants to be the head: asks for epochs, claims, and gives orders until it is told of another head."""

    def __init__(self, number: int, places: list[Place], wire: Wire) -> None:
        self.number, self.places, self.wire = number, places, wire
        self.known: list[int] = []
        self.epoch, self.superseded = 0, False
        for place in places:
            wire.send(lambda place=place: self.known.append(place.grant.epoch))

    def claim(self) -> None:
        """Those that have not answered it does not wait for."""
        if not self.epoch:
            self.epoch = next_epoch(self.known, self.number)
            for place in self.places:
                self.wire.send(lambda place=place: self.begins(place))

    def begins(self, place: Place) -> None:
        place.grant.claim(self.epoch)
        if place.grant.holds(self.epoch):
            self.wire.send(lambda: self.order(place))
        else:
            self.superseded = True

    def order(self, place: Place) -> None:
        if place.grant.holds(self.epoch):
            place.served.append(self.epoch)
        else:
            self.superseded = True


class Place:
    def __init__(self) -> None:
        self.grant, self.served = Grant(), []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_of_several_heads_has_all_instances_and_the_others_are_told(data):
    wire, places = Wire(data), [Place() for _ in range(data.draw(st.integers(1, 3)))]
    numbers = data.draw(st.lists(st.integers(0, HOLDERS - 1), min_size=2, max_size=4, unique=True))
    heads = [Claimant(number, places, wire) for number in numbers]
    for _ in range(data.draw(st.integers(0, 30))):
        if wire.calls and data.draw(st.booleans()):
            wire.deliver(lossy=True)
        else:
            data.draw(st.sampled_from(heads)).claim()
    for head in heads:
        head.claim()
    while wire.calls:  # what went on its way before may be lost or not; from now on nothing is
        wire.deliver(lossy=False)
    last = max(heads, key=lambda head: head.epoch)
    for head in heads:
        for place in places:
            head.begins(place)  # a head that was not heard asks again
    while wire.calls:
        wire.deliver(lossy=False)
    assert len({head.epoch for head in heads}) == len(heads)
    assert {place.grant.epoch for place in places} == {last.epoch}
    assert [head for head in heads if not head.superseded] == [last]
    for place in places:
        assert place.served == sorted(place.served) and place.served[-1] == last.epoch
