"""The head by hand: what it is told, and what it orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
from clusters import GRAPH, STAGES, STREAM, busy, head_of, orders_of, over, request, send

from neustream import SLO, GraphError, PolicyError, RequestError
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.fleet import Route
from neustream.cluster.happenings import Routed


def test_a_request_is_sent_taken_and_answered_once():
    head = head_of("a")
    order = send(head, request("r", arrival=1.0), now=1.5)
    assert (order.instance, order.term, order.age, order.graph) == ("a", 1, 0.5, "image")
    head.heard("a", over("r", 1), 2.0)
    head.heard("a", over("r", 1), 2.1)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.on_time and answer.ended.latency_s == 1.0 and answer.ended.member == "a"
    assert head.open == 0


def test_the_head_says_by_its_own_clock_who_was_late():
    head = head_of("a")
    send(head, request("r", slo=SLO(total=1.0)))
    head.heard("a", over("r", 1), 1.2)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.status == "done" and not answer.ended.on_time


def test_an_answer_says_how_long_its_request_waited():
    head = head_of("a")
    heard, unheard = (send(head, request(id)) for id in ("heard", "unheard"))
    head.heard("a", say.Began("heard", heard.term), 0.5)
    for order in (heard, unheard):
        head.heard("a", replace(over(order.id, order.term), waited_s=0.25), 1.0)
    waited = {answer.ended.id: answer.ended.waited_s for answer in orders_of(head, say.Answer)}
    assert waited == {"heard": 0.5, "unheard": 0.25}


def test_outputs_go_out_in_order_each_once():
    head = head_of("a")
    send(head, request("r", graph=STREAM))
    for index in (0, 0, 1, 1, 0, 2):
        head.heard("a", say.Made("r", 1, index, {"frame": index}), 0.1)
    assert [order.emitted.index for order in orders_of(head, say.Forward)] == [0, 1, 2]


def test_a_gap_in_a_stream_is_never_passed_over():
    head = head_of("a", again={"stream": "repeat"})
    send(head, request("r", graph=STREAM))
    head.heard("a", say.Made("r", 1, 1, {}), 0.1)
    free, again, kept = head.pop_orders()
    assert isinstance(free, say.Free) and free.term == 1
    assert isinstance(again, say.Send) and again.term == 2
    assert isinstance(kept, say.Remember) and kept.instance == "a"


def test_slack_takes_the_least_busy_of_those_where_it_fits():
    head = head_of("a", "b", "c")
    head.heard("a", say.Told(busy("a", 4, due_in=1.0, left=4)), 0.0)  # one more makes these late
    head.heard("b", say.Told(busy("b", 1, due_in=9.0, left=40)), 0.0)
    head.heard("c", say.Told(busy("c", 4, due_in=9.0, left=20)), 0.0)
    assert send(head, request("r", slo=SLO(total=2.0))).instance == "b"
    routed = [event for event in head.pop_events() if isinstance(event, Routed)]
    assert [event.reason for event in routed] == ["fits"]


def test_where_nothing_fits_the_least_backlog_counts():
    head = head_of("a", "b")
    head.heard("a", say.Told(busy("a", 4, due_in=2.0)), 0.0)
    head.heard("b", say.Told(busy("b", 3, due_in=2.0)), 0.0)
    assert send(head, request("r", slo=SLO(total=0.45))).instance == "b"


def test_what_was_sent_counts_before_the_instance_tells_of_it():
    head = head_of("a", "b")
    places = [send(head, request(str(n), slo=SLO(total=1.0), steps=5)).instance for n in range(4)]
    assert sorted(places) == ["a", "a", "b", "b"]


def test_unlike_devices_are_told_apart():
    head = head_of()
    head.joined("slow", 0.0, stages=STAGES, device="slow")
    head.joined("quick", 0.0, stages=STAGES)
    head.heard("quick", say.Told(busy("quick", 2, due_in=9.0)), 0.0)
    head.pop_orders()
    assert send(head, request("tight", slo=SLO(total=1.5), steps=5)).instance == "quick"
    assert send(head, request("loose", slo=SLO(total=9.0), steps=5)).instance == "slow"


def test_requests_without_an_instance_wait_and_then_end_with_a_reason():
    head = head_of()
    head.submit(request("dated", slo=SLO(total=2.0)), 0.0)
    head.submit(request("undated"), 0.0)
    head.tick(head.wake_at())
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.reason == "no instance serves stage 'step': waited 1.600 s, due in 0.400 s"
    head.joined("late", 3.0, stages=STAGES)
    (order,) = orders_of(head, say.Send)
    assert (order.id, order.instance) == ("undated", "late")


def test_a_request_without_a_promise_is_not_kept_waiting_for_ever():
    head = head_of(settings=Settings(patience_s=7.0))
    head.submit(request("r"), 0.0)
    assert head.wake_at() == 7.0
    head.tick(7.0)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.status == "failed" and head.wake_at() is None


@pytest.mark.parametrize("phase", ["waiting", "sent", "there"])
def test_a_cancelled_request_gets_one_answer(phase):
    head = head_of(*(["a"] if phase != "waiting" else []))
    head.submit(request("r"), 0.0)
    if phase == "there":
        head.heard("a", say.Took("r", 1), 0.0)
    assert head.cancel("r", 0.1) and not head.cancel("r" if phase != "waiting" else "x", 0.1)
    if phase != "waiting":
        (order,) = orders_of(head, say.Cancel)
        assert order.term == 1
        head.heard("a", over("r", 1, "cancelled"), 0.2)
    (answer,) = orders_of(head, say.Answer)
    assert answer.ended.status == "cancelled" and head.open == 0


def test_wrong_requests_and_instances_are_refused_by_name():
    head = head_of("a")
    head.submit(request("r"), 0.0)
    with pytest.raises(RequestError, match="request id 'r' is already being served"):
        head.submit(request("r"), 0.0)
    other = type(GRAPH)("other", GRAPH.root)
    with pytest.raises(GraphError, match="graph 'other' is not served here; allowed: image, stream"):
        head.submit(request("x", graph=other), 0.0)
    with pytest.raises(GraphError, match=f"its graph 'image' has print 12; the one here has {GRAPH.print}"):
        head.joined("b", 0.0, stages=STAGES, prints={"image": "12"})
    with pytest.raises(RequestError, match="no profiles of device 'h200'"):
        head.joined("b", 0.0, stages=STAGES, device="h200")
    with pytest.raises(RequestError, match="instance 'a' has joined already"):
        head.joined("a", 0.0, stages=STAGES)
    with pytest.raises(RequestError, match="stage 'vae' has no profile on device ''"):
        head.joined("b", 0.0, stages=["vae"])


def test_a_router_that_chooses_nobody_is_named():
    class Astray:
        def route(self, fleet, asked):
            return Route("nowhere")

    head = head_of("a", router=Astray())
    with pytest.raises(PolicyError, match="router 'Astray' chose instance 'nowhere' for request 'r'"):
        head.submit(request("r"), 0.0)


def test_a_router_may_let_a_request_wait():
    class Later:
        def route(self, fleet, asked):
            return Route(None, wait_until=1.0) if fleet.now < 1.0 else Route("a")

    head = head_of("a", router=Later())
    head.submit(request("r"), 0.0)
    assert head.pop_orders() == [] and head.wake_at() == 1.0
    head.tick(1.0)
    (order,) = orders_of(head, say.Send)
    assert order.age == 1.0


def test_an_instance_that_never_speaks_is_given_up():
    head = head_of("mute", "b")
    head.heard("b", say.Told(busy("b", 3, due_in=9.0)), 0.0)
    head.submit(request("r"), 0.0)
    assert orders_of(head, say.Send)[0].instance == "mute"
    for now in (0.5, 1.0, 1.5, 2.0):
        head.heard("b", say.Told(busy("b", 3, due_in=9.0, sent_at=now)), now)
        head.tick(now)
    assert head.fleet.instances["mute"].state == "suspect"
    assert [order.instance for order in orders_of(head, say.Send)] == ["b"]
    head.heard("b", say.Took("r", 2), 4.9)
    head.tick(5.0)
    assert set(head.fleet.instances) == {"b"}
    head.heard("mute", say.Took("r", 1), 6.0)
    assert head.pop_orders() == [say.Fence("mute")]
    head.heard("mute", say.Fenced(), 6.1)
    assert set(head.fleet.instances) == {"b", "mute"}


def test_an_instance_that_speaks_again_in_time_is_no_longer_suspect():
    head = head_of("a")
    head.tick(1.5)
    assert head.fleet.instances["a"].state == "suspect"
    head.submit(request("r"), 1.6)
    assert not orders_of(head, say.Send)
    head.heard("a", say.Told(busy("a", 0, due_in=9.0)), 1.7)
    assert [order.id for order in orders_of(head, say.Send)] == ["r"]


def test_seconds_in_which_the_head_itself_was_away_are_no_silence():
    head = head_of("a")
    head.overslept(4.0, 4.2)
    head.tick(4.2)
    assert head.fleet.instances["a"].state == "up"
    head.tick(5.5)
    assert head.fleet.instances["a"].state == "suspect"
    head.tick(9.0)
    assert not head.fleet.instances


def test_what_was_ordered_and_is_not_there_is_ordered_again():
    from neustream.cluster.rules import SCALERS

    head = head_of("a", scaler=SCALERS["fixed"](3))
    head.tick(0.0)
    assert orders_of(head, say.Start) == [say.Start("whole")] * 2
    head.tick(1.0)
    assert not orders_of(head, say.Start)
    head.not_started("whole", "no device is free", 1.5)
    head.tick(2.0)
    assert orders_of(head, say.Start) == [say.Start("whole")]
    head.joined("b", 2.5, stages=STAGES)
    head.joined("c", 2.5, stages=STAGES)
    head.tick(3.0)
    assert not orders_of(head, say.Start)
