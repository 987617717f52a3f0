"""A workload sent to a service: when, and what becomes of requests that the service does not take."""

from __future__ import annotations

import threading

from toys import Gate, Step, one_stage, request, table

from neustream import Report, serve
from neustream.backends.replaying import OfService, Replay, Sending
from neustream.core.events import Ended

KNOWN = {"s": table("s", 0.001)}


def test_requests_are_sent_at_their_arrivals_in_order():
    graph, module = one_stage(), Step()
    ended = []

    def note(record):
        if isinstance(record, Ended):
            ended.append((record.id, record.arrival))

    with serve(graph, {"s": module}, KNOWN, observers=[note]) as service:
        replay, done = Replay(OfService(service)), []
        start = service.engine.clock.now()
        arrivals = (("a", 0.0), ("b", 0.05), ("c", 0.1))
        replay.play(Sending(request(id, graph, at), (({"n": id},), {}), None, done.append) for id, at in arrivals)
    assert [id for id, _ in ended] == ["a", "b", "c"] == [answer.id for answer in done]
    assert all(arrival >= start + due - 1e-3 for (_, arrival), due in zip(ended, (0.0, 0.05, 0.1), strict=True))
    assert not replay.interrupted and not replay.over


def test_a_request_that_is_refused_is_in_the_report_all_the_same():
    graph = one_stage()
    with serve(graph, {"s": Step()}, KNOWN) as service:
        replay = Replay(OfService(service))
        replay.play([Sending(request("a", graph), (("no parameters",), {}), None, lambda answer: None)])
    report = Report()
    replay.tell([report])
    assert report.submitted == report.counts["failed"] == 1
    assert list(report.reasons) == ["parameters are a mapping, got 'no parameters'"]


def test_an_interruption_ends_what_is_open_and_sends_no_more():
    graph, module = one_stage(), Gate()
    with serve(graph, {"s": module}, KNOWN) as service:
        replay, done = Replay(OfService(service)), []
        replay.play([Sending(request("a", graph), ((), {}), None, done.append)])
        assert module.began.wait(30)
        threading.Timer(0.05, replay.interrupt).start()
        replay.play([Sending(request("b", graph, 60.0), ((), {}), None, done.append)])
        assert replay.interrupted
        module.go.set()
    replay.tell([report := Report()])
    assert [answer.id for answer in done] == ["a"] and report.submitted == 0
    assert service.report.counts["cancelled"] == 1
