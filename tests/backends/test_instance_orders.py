"""Orders of a head to an instance that is a service, one by one."""

from __future__ import annotations

import threading
import time

import pytest
from toys import Step, table

from neustream import FCFS, SLO, Graph, Stage, loop, serve
from neustream.backends.ray.service_instance import ServiceInstance
from neustream.backends.ray.wire import asked_as_bytes
from neustream.cluster.messages import Began, Cancel, Fence, Fenced, Over, Refused, Send, Took


class Instance:
    """One whose requests are two steps; the first of them waits for `gate`. `reports`: all that it told."""

    def __init__(self):
        self.gate = threading.Event()
        graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=2))
        module = Step(lambda given: {"word": str(self.gate.wait(30))})
        profile = table("say", *[0.001] * 8, device="toy")
        service = serve(graph, {"say": module}, {"say": profile}, policy=FCFS(drop_hopeless=False))
        self.instance = ServiceInstance(service, "a", lambda: None)
        self.reports = []

    def order(self, *orders):
        self.instance.carry_out(orders)

    def told(self, kind, id="x"):
        """Waits for a report of a request."""
        end = time.monotonic() + 30
        while not any(isinstance(one, kind) and one.id == id for one in self.reports):
            assert time.monotonic() < end
            time.sleep(0.001)
            self.reports.extend([news.report for news in self.instance.news().news])

    def of(self, *kinds):
        return [one for one in self.reports if isinstance(one, kinds)]


@pytest.fixture
def begun():
    """One whose request "x" of term 1 is in a step."""
    instance = Instance()
    instance.order(sent("x", 1))
    instance.told(Began)
    yield instance
    instance.gate.set()
    instance.instance.close()


def sent(id, term):
    params = {"asked": asked_as_bytes(None, (), {}), "guess": None}
    return Send("a", id, term, "chat", SLO(), params, 0.0, 0.0, term)


def test_a_request_that_is_sent_again_to_where_it_still_is_begins_once_that_has_ended(begun):
    begun.order(sent("x", 2))  # its step of term 1 has begun: it ends behind that
    begun.order(sent("x", 3))  # and this one is to be instead of term 2
    begun.gate.set()
    begun.told(Over)
    answers = begun.of(Took, Refused, Over)
    assert [(type(one), one.term) for one in answers] == [(Took, 1), (Took, 3), (Over, 3)]
    assert answers[-1].status == "done" and answers[-1].outputs == 2


@pytest.mark.parametrize("order", [Cancel("a", "x", 2), Fence("a")], ids=["cancelled", "fenced"])
def test_one_that_is_given_up_before_it_begins_anew_does_not_begin(begun, order):
    begun.order(sent("x", 2), order, sent("y", 1))
    begun.gate.set()
    begun.told(Over, "y")
    cancelled = isinstance(order, Cancel)
    overs = [(one.id, one.term, one.status) for one in begun.of(Over)]
    assert overs == [("x", 2, "cancelled")] * cancelled + [("y", 1, "done")]
    assert [(one.id, one.term) for one in begun.of(Took)] == [("x", 1), ("y", 1)]
    assert len(begun.of(Fenced)) == (not cancelled)
