"""A head that is gone, and the one that begins after it: what instances have goes on there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from clusters import GRAPH, STREAM, head_of, orders_of, over, request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_member_instance import Bench, begin
from test_simulation import Run, stream_of

from neustream import SLO
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.happenings import Restarted, Routed, Succeeded
from neustream.cluster.messages import TERMS
from neustream.cluster.network import Fault, Network
from neustream.cluster.reporting import Reporting

# -- the head ----------------------------------------------------------------------------------------


def here(*standing: tuple[str, int]) -> say.Here:
    return say.Here(tuple(say.Standing(id, term) for id, term in standing))


def test_a_request_goes_on_where_it_stands_and_another_one_is_routed():
    head = head_of("a", "b", epoch=2)
    head.heard("b", here(("r", TERMS + 7), ("nobody's", TERMS + 3)), 0.0)
    head.heard("a", here(), 0.0)
    head.submit(request("r", graph=STREAM), 1.0, made=[{"n": 0}])
    head.submit(request("new", graph=STREAM), 1.0)
    sent = {order.id: order for order in orders_of(head, say.Send)}
    assert sent.keys() == {"r", "new"}
    assert sent["r"].instance == "b" and sent["r"].term == 2 * TERMS + 1
    made = ((0, {"n": 0}), (1, {"n": 1}))
    head.heard("b", say.Took("r", sent["r"].term, made), 1.1)
    head.heard("b", over("r", sent["r"].term, outputs=2), 1.2)
    forward, answer = head.pop_orders()
    assert forward.emitted.index == 1, "its caller has the first one"
    assert answer.ended.id == "r" and answer.ended.outputs == 2


def test_requests_wait_until_all_that_joined_have_told():
    head = head_of("a", "b", epoch=1)
    head.heard("a", here(), 0.0)
    head.submit(request("r"), 0.1)
    assert not orders_of(head, say.Send)
    head.heard("b", here(("r", 4)), 0.2)
    assert [order.instance for order in orders_of(head, say.Send)] == ["b"]


@pytest.mark.parametrize("why", ["it says nothing", "it dies"])
def test_who_does_not_tell_keeps_nobody_waiting_for_long(why):
    head = head_of("a", "b", epoch=1, settings=Settings(send_s=0.5))
    head.heard("a", here(), 0.0)
    head.submit(request("r"), 0.1)
    if why == "it dies":
        head.lost("b", why, 0.2)
    else:
        assert not orders_of(head, say.Send)
        head.tick(0.5)
    (order,) = orders_of(head, say.Send)
    assert order.term == TERMS + 1


def test_nobody_joins_and_requests_end_with_a_reason():
    head = head_of(epoch=1)
    head.submit(request("r", slo=SLO(total=2.0)), 0.0)
    now = 0.0
    while head.open:
        now = head.wake_at()
        head.tick(now)
    assert now < 2.0 and "no instance serves" in head.pop_orders()[-1].ended.reason


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_of_two_that_have_it_the_later_term_goes_on(order):
    """It moved while the head died."""
    terms = {"a": 4, "b": 5}
    head = head_of("a", "b", epoch=1)
    for name in order:
        head.heard(name, here(("r", terms[name])), 0.0)
    assert head.pop_orders() == [say.Free("a", "r", TERMS)]
    head.submit(request("r"), 0.1)
    assert [order.instance for order in orders_of(head, say.Send)] == ["b"]


def test_what_was_sent_elsewhere_meanwhile_is_forgotten_where_it_stood():
    head = head_of("a", epoch=1)
    head.heard("a", here(), 0.0)
    head.submit(request("r"), 0.0)
    head.joined("b", 0.1, stages=["step", "decode", "frame"])
    assert say.Ask("b", 1) in head.pop_orders()
    head.heard("b", here(("r", 2)), 0.2)
    assert head.pop_orders() == [say.Free("b", "r", TERMS)]


def test_who_gives_up_before_all_have_told_leaves_nothing_where_it_stands():
    head = head_of("a", "b", epoch=1)
    head.heard("a", here(("r", 2)), 0.0)
    head.submit(request("r"), 0.1)
    head.cancel("r", 0.2)
    freed, answer = head.pop_orders()
    assert freed == say.Free("a", "r", TERMS) and answer.ended.status == "cancelled"


def test_who_was_late_before_is_late_in_the_end():
    head = head_of("a", epoch=1)
    head.heard("a", here(), 0.0)
    head.submit(request("r", graph=STREAM, slo=SLO(total=9.0)), 1.0, made=[{}], late=True)
    (order,) = orders_of(head, say.Send)
    head.heard("a", say.Took("r", order.term), 1.0)
    head.heard("a", over("r", order.term, outputs=1), 1.1)
    (answer,) = head.pop_orders()
    assert answer.ended.status == "done" and not answer.ended.on_time


# -- an instance -------------------------------------------------------------------------------------


def go_on(bench: Bench, outputs: int) -> list:
    """Let a request run until it has so many outputs; what was said."""
    said = []
    for _ in range(20):
        if "r" not in bench.jobs or bench.jobs["r"].outputs == outputs:
            return said
        said += bench.step()
    raise AssertionError(f"{bench.jobs['r'].outputs} outputs, and no more come")


def test_what_is_there_goes_on_untold_until_the_next_head_wants_it():
    bench = Bench()
    bench.do(begin())
    go_on(bench, 1)
    assert bench.do(say.Ask("a", 1)) == [here(("r", 1))]
    assert bench.do(say.Cancel("a", "r", 1), say.Free("a", "r", 1)) == [], "of the head that is gone"
    assert go_on(bench, 2) == []
    said = bench.do(begin(term=TERMS + 1))
    assert [type(one) for one in said] == [say.Took, say.Began]
    assert [index for index, _ in said[0].unheard] == [0, 1]
    said = go_on(bench, 3)
    assert [(type(one), one.term) for one in said] == [(say.Made, TERMS + 1), (say.Over, TERMS + 1)]


def test_what_ended_meanwhile_is_answered_to_the_next_head():
    bench = Bench()
    bench.do(begin(), say.Ask("a", 1))
    assert go_on(bench, 3) == [] and not bench.jobs
    assert bench.do(say.Ask("a", 1))[-1] == here(("r", 1))
    took, _, ended = bench.do(begin(term=TERMS + 1))
    assert [index for index, _ in took.unheard] == [0, 1, 2]
    assert (ended.status, ended.outputs, ended.term) == ("done", 3, TERMS + 1)
    assert bench.do(say.Ask("a", 1)) == [here()]


def test_a_held_request_runs_again_and_a_parcel_of_the_old_head_is_not_taken():
    bench, other = Bench(), Bench()
    bench.do(begin())
    bench.do(say.Hold("a", "r", 1))
    go_on(bench, 1)
    bench.instance.receive(say.Give("a", "r", 1, "b", 2), bench.clock.now())
    (parcel,) = [message for to, message in bench.said if to == "b"]
    other.do(say.Ask("b", 1))
    assert other.do(parcel) == [] and not other.jobs
    bench.do(say.Ask("a", 1))
    assert bench.jobs["r"].status == "running"


def test_outputs_that_came_unheard_with_a_request_are_told_to_the_next_head():
    source, bench = Bench(), Bench()
    source.do(begin())
    source.do(say.Hold("a", "r", 1))
    go_on(source, 1)
    source.instance.receive(say.Give("a", "r", 1, "b", 2), source.clock.now())
    (parcel,) = [message for to, message in source.said if to == "b"]
    bench.do(replace(parcel, unheard=((0, {}),)), say.Ask("a", 1))
    go_on(bench, 2)
    took = bench.do(begin(term=TERMS + 1))[0]
    assert [index for index, _ in took.unheard] == [0, 1]


def test_what_nobody_asks_for_ends_with_the_lease():
    bench = Bench(reporting=Reporting(lease_s=0.15))
    bench.do(begin("r"), begin("s"), say.Ask("a", 1))
    bench.do(begin("s", term=TERMS + 1))
    said = []
    for _ in range(50):
        said += bench.step() if bench.jobs else []
    assert not bench.jobs and bench.clock.now() > 0.15
    assert {one.id for one in said} == {"s"}
    assert bench.do(say.Ask("a", 1)) == [here()]


# -- simulated ---------------------------------------------------------------------------------------


def test_a_head_that_dies_costs_its_callers_nothing_but_time():
    run = Run(stream_of(20, every=0.1, steps=8), faults=[Fault(1.0, None, "head", 0.5)])
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 20
    assert all(indices == list(range(8)) for indices in run.emitted.values())
    (began,) = run.of(Succeeded)
    there = [event for event in run.of(Routed) if event.reason == "is there"]
    assert began.epoch == 1 and began.at == 1.5 and len(there) >= 5
    assert not run.of(Restarted)
    assert run.cluster.head.open == 0 and not any(each.drive.scheduler.jobs for each in run.cluster.running.values())


def test_instances_that_come_and_go_without_a_head_are_known_by_the_next():
    faults = [Fault(0.4, None, "head", 1.0), Fault(0.6, 0, "crash")]
    run = Run(stream_of(20, every=0.1), faults=faults)
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 20
    assert {ended.member for ended in run.ended.values() if ended.arrival > 0.6} == {"whole-1"}


@pytest.mark.parametrize("dies_at", [0.31, 0.25, 0.305])
def test_what_ends_while_its_head_dies_or_there_is_none_is_not_done_again(dies_at):
    """Three steps end at 0.31 at the instance; the head would hear of that at 0.32."""
    faults = [Fault(dies_at, None, "head", 0.5)]
    run = Run([request("r", graph=STREAM)], 1, faults=faults, network=Network(delay_s=0.01))
    assert run.ended["r"].status == "done" and run.emitted["r"] == [0, 1, 2]
    assert run.steps == {"r": 3}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_heads_that_die_again_and_again_cost_no_step(data):
    """Also while messages are under way, before all have told, and before anybody was asked."""
    instant = st.integers(0, 40).map(lambda n: n * 0.05) | st.floats(0.0, 2.0)
    gap = st.sampled_from([0.001, 0.05, 0.2]) | st.floats(0.001, 1.0)
    faults = data.draw(st.lists(st.builds(Fault, instant, st.none(), st.just("head"), gap), min_size=1, max_size=4))
    network = Network(data.draw(st.sampled_from([0.0, 0.002, 0.05])))
    asked = [request(str(n), 0.1 * n, graph=data.draw(st.sampled_from([GRAPH, STREAM]))) for n in range(8)]
    run = Run(asked, faults=faults, network=network)
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 8
    assert run.steps == {one.id: 4 if one.graph is GRAPH else 3 for one in asked}
    assert not run.of(Restarted)
