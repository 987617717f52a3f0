"""What other threads and signal handlers hand to one reader."""

from __future__ import annotations

import queue
import signal
import threading
import time

import pytest

from neustream.engine.clock import WallClock
from neustream.engine.events import Wake
from neustream.engine.inbox import Inbox


@pytest.fixture
def alarm():
    """Calls a handler so many seconds from now; one more comes much later, to end what hangs."""
    before = signal.getsignal(signal.SIGALRM)

    def ring(handler, after_s):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, after_s, 20.0)

    yield ring
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


def slow_once(then=None):
    """A handler that outlasts the waits here; its second call ends the test."""
    calls = []

    def handler(number, frame):
        calls.append(number)
        if len(calls) > 1:
            raise AssertionError("the wait outlasted its timeout")
        time.sleep(0.2)
        if then is not None:
            then()

    return handler


def test_items_come_in_their_order():
    inbox = Inbox()
    for item in range(5):
        inbox.put(item)
    assert not inbox.empty()
    assert [inbox.get(1.0), inbox.get_nowait(), inbox.get(None), inbox.get(0.0), inbox.get(1.0)] == [0, 1, 2, 3, 4]
    assert inbox.empty()


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.001])
def test_nothing_comes_in_time(seconds):
    inbox = Inbox()
    inbox.put("before")
    assert inbox.get_nowait() == "before"
    with pytest.raises(queue.Empty):
        inbox.get(seconds)


def test_a_wait_lasts_its_whole_time_after_an_item_that_was_not_waited_for():
    inbox = Inbox()
    inbox.put("before")
    inbox.get_nowait()
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        inbox.get(0.05)
    assert time.monotonic() - began >= 0.05


def test_a_signal_whose_handler_outlasts_the_time(alarm):
    inbox = Inbox()
    alarm(slow_once(), 0.01)
    with pytest.raises(queue.Empty):
        inbox.get(0.05)


def test_a_signal_handler_puts(alarm):
    inbox = Inbox()
    alarm(slow_once(lambda: inbox.put("from the handler")), 0.01)
    assert inbox.get(60.0) == "from the handler"


def test_an_event_whose_instant_passes_while_a_signal_is_handled(alarm):
    clock = WallClock()
    clock.post(Wake(None, "gpu"), clock.now() + 0.05)
    alarm(slow_once(), 0.01)
    assert clock.wait() == [Wake(None, "gpu")]


def test_many_threads_put():
    inbox, each, threads = Inbox(), 2000, 8
    putters = [
        threading.Thread(target=lambda at=at: [inbox.put((at, number)) for number in range(each)])
        for at in range(threads)
    ]
    for putter in putters:
        putter.start()
    got = [inbox.get(60.0) for _ in range(each * threads)]
    for putter in putters:
        putter.join()
    for at in range(threads):
        assert [number for who, number in got if who == at] == list(range(each))
