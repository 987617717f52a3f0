"""Copies of requests that services serve: they go on from there when their instance is gone. Without Ray."""

from __future__ import annotations

import threading

import pytest
from local_machines import LocalMachines, driving
from test_cluster_driver import Words, ask, chat, said, until

from neustream.backends.ray.wire import NotMovable
from neustream.cluster.book import Settings
from neustream.cluster.head import Head
from neustream.cluster.messages import Hold
from neustream.cluster.rules.fixed import Fixed
from neustream.cluster.rules.round_robin import RoundRobin

WORDS = 30


class Paced(Words):
    """Notes each word. From the fifth on each waits until a test lets it be said."""

    def __init__(self, place, allowed, notes):
        super().__init__(place, None)
        self.allowed, self.notes = allowed, notes

    def say(self, given):
        number = given.state.get("said", 0) + 1
        self.notes.append((self.place, number))
        if number >= 5:
            self.allowed.acquire(timeout=60)
        return {"said": number, "word": f"{given.params['voice']}{number}"}


class Machines(LocalMachines):
    def __init__(self):
        self.allowed, self.notes = threading.Semaphore(0), []
        self.held = threading.Event()
        super().__init__(lambda number, kind: chat(Paced, number, self.allowed, self.notes))

    def order(self, name, orders):
        super().order(name, orders)
        if any(isinstance(order, Hold) for order in orders):
            self.held.set()

    def die(self, name):
        self.allowed.release(1000)
        super().die(name)


def limits(snapshot_s):
    patient = {"suspect_s": 60.0, "dead_s": 90.0, "send_s": 60.0, "move_timeout_s": 60.0}
    return Settings(**patient, snapshot_s=snapshot_s)


@pytest.fixture
def driver(request):
    machines = Machines()
    head = Head([], {}, RoundRobin(), None, Fixed(2), settings=limits(getattr(request, "param", 0.02)))
    with driving(head, None, 2, machines) as driver:
        yield driver


def copied(driver):
    one = driver._head._book.requests.get("a")
    return one is not None and one.snapshot is not None


def wait_for_copy(driver):
    """Its instance was told to hold it, maybe in the middle of a word: once that is said, it is copied."""
    assert driver.machines.held.wait(30)
    if not copied(driver):
        driver.machines.allowed.release()
    until(lambda: copied(driver))


def owner_dies(driver):
    """With its step under way; the other one may say all words then."""
    driver.machines.die(driver._head._book.requests["a"].where)


def test_a_stream_goes_on_from_its_copy_without_a_gap_or_a_repeat(driver):
    answer = ask(driver, "a", words=WORDS, voice="a")
    wait_for_copy(driver)
    owner_dies(driver)
    assert said(answer) == [f"a{number}" for number in range(1, WORDS + 1)]
    firsts = [place for place, number in driver.machines.notes if number == 1]
    assert len(firsts) == 1, "it did not begin at its start again"
    assert driver.counts.restarted == 1 and driver.counts.on_time == 1


def test_a_copy_says_what_is_left_of_its_request(driver):
    answer = ask(driver, "a", words=WORDS, voice="a")
    wait_for_copy(driver)
    one = driver._head._book.requests["a"]
    (whole,), (left,) = one.asked.calls.values(), one.snapshot.asked.calls.values()
    assert whole.count == WORDS and 0 < left.count < WORDS
    driver.machines.allowed.release(1000)
    assert len(said(answer)) == WORDS


@pytest.mark.parametrize("driver", [float("inf")], indirect=True)
def test_without_copies_it_begins_at_its_start(driver):
    answer = ask(driver, "a", words=WORDS, voice="a")
    until(lambda: len(answer.outputs) == 4)
    owner_dies(driver)
    assert said(answer) == [f"a{number}" for number in range(1, WORDS + 1)]
    assert len([place for place, number in driver.machines.notes if number == 1]) == 2


def test_a_copy_that_is_not_there_any_more_is_not_waited_for(driver):
    answer = ask(driver, "a", words=WORDS, voice="a")
    wait_for_copy(driver)
    for instance in driver.machines.instances.values():
        instance.copies.keep = lambda id, term, left: None
        instance.copies.clear()
    owner_dies(driver)
    assert said(answer) == [f"a{number}" for number in range(1, WORDS + 1)]
    assert driver.counts.restarted == 2


def test_copies_are_gone_once_their_requests_are_over(driver):
    answer = ask(driver, "a", words=WORDS, voice="a")
    wait_for_copy(driver)
    driver.machines.allowed.release(1000)
    assert len(said(answer)) == WORDS
    until(lambda: not any(len(one.copies) for one in driver.machines.instances.values()))
    with pytest.raises(NotMovable, match="has no copy of request 'a'"):
        next(iter(driver.machines.instances.values())).copies.get("a", 1)
