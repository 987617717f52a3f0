"""Letters: each message once and in order, whatever becomes of them."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from letters import Mailbox


@given(st.integers(0, 2**32), st.floats(0, 0.6), st.lists(st.integers(0, 3), max_size=12))
def test_all_messages_come_once_and_in_order(seed, lossy, sizes):
    random, now, number = Random(seed), 0.0, 0
    here, there = Mailbox(), Mailbox()
    wire, read = [], []
    for size in sizes:
        messages = list(range(number, number + size))
        number += size
        wire.append((True, here.send(messages, now)))
    for _ in range(2000):
        now += 0.05
        random.shuffle(wire)
        for towards, letter in [wire.pop() for _ in range(len(wire))]:
            if random.random() < lossy:
                continue
            if random.random() < 0.2:
                wire.append((towards, letter))
            if towards:
                read += there.read(letter, now)
                wire.append((False, there.send([], now)))
            else:
                here.read(letter, now)
        again = here.again(now)
        if again is not None:
            wire.append((True, again))
        if not here.unheard:
            break
    assert read == list(range(number)) and not here.unheard and here.wake_at == math.inf


def test_a_side_that_begins_anew_is_not_taken_for_the_old_one():
    old, new, other = Mailbox(epoch=1), Mailbox(epoch=2), Mailbox(epoch=2)
    assert other.read(old.send(["late"], 0.0), 0.0) == []
    assert other.read(new.send(["hello"], 0.0), 0.0) == ["hello"]


def test_who_was_not_told_that_it_was_heard_is_told_again():
    here, there = Mailbox(), Mailbox()
    letter = here.send(["a"], 0.0)
    there.read(letter, 0.0)
    assert there.owes
    there.send([], 0.0)  # lost
    assert not there.owes
    again = here.again(0.2)
    assert there.read(again, 0.2) == [] and there.owes
    here.read(there.send([], 0.2), 0.2)
    assert not here.unheard
