"""Clocks: in which order events come, and that time never goes back."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
from toys import one_stage

from neustream.core.batch import Batch
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.events import Cancel, Done, Stop, Submit, Wake


def done(id=1):
    return Done(Batch(id, "gpu", 0, "s", (), (), 0.0, 0.1), [])


def submit(id="a"):
    return Submit(Request(id, one_stage()), None)


@pytest.mark.parametrize("make", [VirtualClock, WallClock])
def test_events_of_one_instant_come_by_kind(make):
    clock = make()
    events = [done(), Cancel("a", Future()), submit(), Wake(None, "gpu"), Stop(False)]
    for event in reversed(events):
        clock.post(event, 0.0)
    assert clock.wait() == events


@pytest.mark.parametrize("make", [VirtualClock, WallClock])
def test_events_of_one_instant_and_kind_come_as_posted(make):
    clock = make()
    events = [Wake(None, name) for name in "zbkaq"]
    for event in events:
        clock.post(event, 0.0)
    assert clock.wait() == events


@pytest.mark.parametrize("make", [VirtualClock, WallClock])
def test_the_instant_counts_before_the_kind(make):
    clock = make()
    clock.post(done(), 0.002)
    clock.post(Stop(False), 0.001)
    got = []
    while len(got) < 2:
        got += clock.wait()
    assert [type(event) for event in got] == [Stop, Done]


def test_virtual_time_jumps_to_the_next_event():
    clock = VirtualClock()
    assert clock.now() == 0.0
    for at in (7.5, 2.0, 2.0):
        clock.post(Wake(None, "gpu"), at)
    assert len(clock.wait()) == 2
    assert clock.now() == 2.0
    assert len(clock.wait()) == 1
    assert clock.now() == 7.5
    assert clock.wait() == []
    assert clock.now() == 7.5


def test_virtual_time_never_goes_back():
    clock = VirtualClock()
    clock.post(Wake(None, "late"), 5.0)
    clock.wait()
    clock.post(Wake(None, "past"), 1.0)
    clock.post(done(), 5.0)
    assert [type(event) for event in clock.wait()] == [Done, Wake]  # the past counts as now
    assert clock.now() == 5.0


def test_wall_time_delivers_the_past_at_once():
    clock = WallClock()
    clock.post(Wake(None, "past"), -3.0)
    assert clock.wait() == [Wake(None, "past")]
    assert clock.now() >= 0.0


def test_wall_time_waits_for_the_instant():
    clock = WallClock()
    clock.post(Wake(None, "later"), 0.01)
    clock.post(Wake(None, "sooner"), 0.005)
    got = []
    while len(got) < 2:
        got += clock.wait()
        assert clock.now() >= (0.005 if len(got) == 1 else 0.01)
    assert got == [Wake(None, "sooner"), Wake(None, "later")]


@pytest.mark.parametrize("other", [None, 3600.0], ids=["waiting for nothing", "waiting for a later event"])
def test_wall_clock_wakes_on_a_post_from_another_thread(other):
    clock = WallClock()
    if other is not None:
        clock.post(Stop(False), other)
    got = []
    waiter = threading.Thread(target=lambda: got.extend(clock.wait()), daemon=True)
    waiter.start()
    clock.post(Wake(None, "gpu"), clock.now())
    waiter.join(30)
    assert got == [Wake(None, "gpu")]


def test_wall_clock_takes_posts_of_many_threads():
    clock = WallClock()

    def post(name):
        for _ in range(50):
            clock.post(Wake(None, name), clock.now())

    threads = [threading.Thread(target=post, args=(str(at),)) for at in range(8)]
    for thread in threads:
        thread.start()
    got = []
    while len(got) < 400:
        got += clock.wait()
    for thread in threads:
        thread.join()
    assert sorted(event.pool for event in got) == sorted(str(at) for at in range(8) for _ in range(50))
