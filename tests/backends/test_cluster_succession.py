"""The process of a head is gone: what its instances have is there for the next one. Without Ray."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future

import pytest
from local_machines import LocalMachines, driving, failed, through
from test_cluster_driver import PATIENT, Words, ask, chat, said, until

from neustream import BackendError, RequestError, RequestFailed
from neustream.backends.ray.cluster import Cluster
from neustream.backends.ray.driver import Driver
from neustream.backends.ray.wire import Superseded
from neustream.cluster import messages as to
from neustream.cluster.head import Head
from neustream.cluster.rules.fixed import Fixed
from neustream.cluster.rules.round_robin import RoundRobin


class Counted(Words):
    """Notes each word that is said."""

    def __init__(self, place, gate, notes):
        super().__init__(place, gate)
        self.notes = notes

    def say(self, given):
        update = super().say(given)
        self.notes.append((self.place, given.id, update["said"]))
        return update


class Machines(LocalMachines):
    """Instances that outlive their heads. `gate`: the third words wait for it; `notes`: what was said."""

    def __init__(self):
        self.gate, self.notes = threading.Event(), []
        super().__init__(lambda number, kind: chat(Counted, number, self.gate, self.notes))

    def head(self):
        return Head([], {}, RoundRobin(), None, Fixed(2), settings=PATIENT, epoch=self.epoch)

    def die(self, name):
        """As a machine that a test closes does: nobody waits for the gate."""
        self.gate.set()
        super().die(name)


def dies(driver):
    """Its process is gone: it says nothing any more, to anybody."""
    driver.post(lambda now: setattr(driver, "_over", True))
    driver._thread.join(30)
    assert not driver._thread.is_alive()
    driver.machines.succeed()


@contextlib.contextmanager
def two_heads(*asked):
    """Streams of three words that the first head was asked for, and the second head."""
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        for id in asked:
            ask(first, id, words=3, voice=id)
        until(lambda: len(machines.notes) == 2 * len(asked))
        dies(first)
        with driving(machines.head(), None, 2, machines) as second:
            yield second


def test_streams_go_on_where_they_are_and_no_step_is_done_twice():
    with two_heads("a", "b") as driver:
        answers = [ask(driver, id, words=3, voice=id) for id in "ab"]
        until(lambda: all(len(answer.outputs) == 2 for answer in answers))
        driver.machines.gate.set()
        assert [said(answer) for answer in answers] == [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
        assert len(driver.machines.notes) == 6 and len({place for place, *_ in driver.machines.notes}) == 2
        assert driver.machines.made == 2 and driver.counts.on_time == 2 and not driver.counts.restarted
        assert said(ask(driver, "c", words=1, voice="c")) == ["c1"], "what is new is served, too"


def test_what_ended_before_it_was_asked_for_again_is_answered():
    with two_heads("a") as driver:
        driver.machines.gate.set()
        services = [each.service for each in driver.machines.instances.values()]
        until(lambda: not any(service.answers for service in services))
        assert said(ask(driver, "a", words=3, voice="a")) == ["a1", "a2", "a3"]
        assert len(driver.machines.notes) == 3


@pytest.mark.parametrize("fetched", [False, True])
def test_what_ended_while_there_was_no_head_is_answered(fetched):
    """Also what was fetched by a head that did not live to read it."""
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        ask(first, "a", words=3, voice="a")
        until(lambda: len(machines.notes) == 2)
        dies(first)
        instances = list(machines.instances.values())
        machines.gate.set()
        until(lambda: not any(each.service.answers for each in instances))
        if fetched:
            assert any(each.news().news for each in instances)
        with driving(machines.head(), None, 2, machines) as second:
            assert said(ask(second, "a", words=3, voice="a")) == ["a1", "a2", "a3"]
            assert len(machines.notes) == 3 and machines.made == 2


def test_another_request_of_the_same_id_is_served_as_what_it_is():
    with two_heads("a") as driver:
        driver.machines.gate.set()
        assert said(ask(driver, "a", words=2, voice="other")) == ["other1", "other2"]


def test_what_an_earlier_head_passed_on_is_not_taken_any_more():
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        ask(first, "a", words=9, voice="a")
        until(lambda: len(machines.notes) == 2)
        [place] = {place for place, *_ in machines.notes}
        source = machines.instances.pop(f"whole-{place}")
        [target] = machines.instances.values()
        machines.instances[source.name] = source
        source.carry_out([to.Hold(source.name, "a", 1)])
        machines.gate.set()
        until(lambda: source._entries.get("a").left is not None)
        left = through(source.leave("a", 1))
        dies(first)
        with driving(machines.head(), None, 2, machines) as second:
            target.take("a", 2, left)
            assert target._entries.get("a") is None
            assert len(said(ask(second, "a", words=9, voice="a"))) == 9
            assert len(machines.notes) == 9, "it went on where it was held"


def test_what_nobody_asks_for_ends_with_the_lease():
    with two_heads("a") as driver:
        instances = list(driver.machines.instances.values())
        for instance in instances:
            instance.end_lease(3600.0)
        assert sum(len(each.service.answers) for each in instances) == 1
        for instance in instances:
            instance.end_lease(0.0)
        driver.machines.gate.set()
        until(lambda: not any(each.service.answers for each in instances))


def test_one_that_died_meanwhile_is_replaced_and_its_requests_begin_anew():
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        answer = ask(first, "a", words=3, voice="a")
        until(lambda: len(answer.outputs) == 2)
        dies(first)
        [lost] = {place for place, *_ in machines.notes}
        machines.gate.set()
        machines.instances[f"whole-{lost}"].service.engine.interrupt()
        del machines.found[f"whole-{lost}"], machines.instances[f"whole-{lost}"]
        with driving(machines.head(), None, 2, machines) as second:
            assert said(ask(second, "a", words=3, voice="a")) == ["a1", "a2", "a3"]
            until(lambda: len(second.states) == 2)
            assert machines.made == 3


def test_a_head_that_another_one_has_taken_the_place_of_says_so():
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as driver:
        answer = ask(driver, "a", words=3, voice="a")
        until(lambda: len(answer.outputs) == 2)
        machines.listen = lambda name, now: (_ for _ in ()).throw(AssertionError("nobody listens"))
        taken = Superseded("another process is the head of this cluster by now")
        until(lambda: machines._listening)
        for news in list(machines._listening.values()):
            if not news.done():
                news.set_exception(taken)
        with pytest.raises(RequestFailed, match="another process is the head"):
            answer.result(30)
        assert machines.left
        with pytest.raises(RequestError, match="or another head has its instances"):
            ask(driver, "b", words=1, voice="b")


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_asked_of_a_head_that_ends_is_answered(when):
    """Else whoever drains, moves or resizes would wait for ever."""
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as driver:
        held, go = threading.Event(), threading.Event()
        driver.post(lambda now: (held.set(), go.wait(30)))
        assert held.wait(30)
        closing = threading.Thread(target=driver.close)
        closing.start()
        asked = driver.ask(lambda head, now: len(head.graphs)) if when == "before" else None
        go.set()
        closing.join(30)
        assert not closing.is_alive()
        assert asked is None or asked.done()
        with pytest.raises(RequestError, match="the cluster was closed"):
            driver.ask(lambda head, now: len(head.graphs)).result(30)


def test_a_head_whose_instance_another_one_has_ends_none_of_them():
    """They began at the same moment, and this one was the first to lose."""
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        dies(first)
        adopt = machines.adopt
        taken = Superseded("another process is the head of this cluster by now")
        machines.adopt = lambda name: failed(taken) if name == "whole-2" else adopt(name)
        second = Driver(machines.head(), machines, 2)
        with pytest.raises(Superseded, match="another process is the head"):
            second.up.result(30)
        second.close()
        assert machines.left and not machines.ended and len(machines.instances) == 2


def test_a_head_that_begins_anew_serves_before_what_is_missing_is_there():
    """To load it may take longer than the lease of what callers ask for again."""
    machines = Machines()
    with driving(machines.head(), None, 2, machines) as first:
        ask(first, "a", words=3, voice="a")
        until(lambda: len(machines.notes) == 2)
        dies(first)
        [place] = {place for place, *_ in machines.notes}
        other = next(name for name in machines.instances if name != f"whole-{place}")
        machines.instances.pop(other).service.engine.interrupt()
        del machines.found[other]
        missing = Future()
        machines.start = lambda name, kind: missing
        with driving(machines.head(), None, 2, machines) as second:
            machines.gate.set()
            assert said(ask(second, "a", words=3, voice="a")) == ["a1", "a2", "a3"]
            assert len(machines.notes) == 3 and len(second.states) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "here"}, "a Ray of its own ends with this process; give an address"),
        ({"name": "a b", "address": "auto"}, "name must be letters, digits"),
        ({"name": "a", "address": "auto", "lease_s": 0}, "lease_s must be a number of seconds greater than 0, got 0"),
    ],
)
def test_names_that_cannot_be(options, why):
    with pytest.raises(BackendError, match=why):
        Cluster(chat, **options)
