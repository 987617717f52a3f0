"""Copies of requests in the middle of their steps: kept elsewhere, gone on from after a death."""

from __future__ import annotations

import pytest
from clusters import STREAM, head_of, orders_of, over, request, send
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulation import Run

from neustream import SLO
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.happenings import Restarted, Saved
from neustream.cluster.head import Head
from neustream.cluster.network import Fault
from neustream.errors import ConfigError

EVERY = Settings(snapshot_s=0.5)


def waiting(head: Head) -> say.Send:
    """What sent a request that waits to be copied, at 0.5 s."""
    sent = send(head, request("r"))
    head.heard(sent.instance, say.Began("r", 1), 0.0)
    head.tick(0.5)
    head.heard(sent.instance, say.Waits("r", 1), 0.5)
    return sent


def saved(head: Head, left: dict | None = None, now: float = 0.5) -> tuple[say.Send, say.Give]:
    """A request of which there is a copy, and what ordered that."""
    sent = send(head, request("r"))
    head.heard(sent.instance, say.Began("r", sent.term), 0.0)
    assert head.wake_at() == 0.5
    head.tick(now)
    assert orders_of(head, say.Hold) == [say.Hold(sent.instance, "r", sent.term)]
    head.heard(sent.instance, say.Waits("r", sent.term, left=left or {}), now)
    (give,) = orders_of(head, say.Give)
    head.heard(give.target, say.Kept("r", give.next_term), now)
    assert orders_of(head, say.Resume) == [say.Resume(sent.instance, "r", sent.term)]
    return sent, give


def test_a_copy_goes_to_another_instance_and_the_request_goes_on_where_it_is():
    head = head_of("a", "b", settings=EVERY)
    sent, give = saved(head)
    assert give.keep and give.instance == sent.instance != give.target
    assert [type(event) for event in head.pop_events()][-1] is Saved
    head.tick(1.0)
    assert orders_of(head, say.Hold), "and so every half second"


def test_where_no_copy_gets_there_in_time_the_next_one_leaves_it_twice_as_long():
    head = head_of("a", "b", settings=Settings(snapshot_s=0.5, move_timeout_s=0.5, suspect_s=60, dead_s=60))
    sent = send(head, request("r"))
    head.heard(sent.instance, say.Began("r", sent.term), 0.0)
    head.tick(0.5)
    for held_at, next_at in ((1.0, 2.0), (2.0, 4.0), (4.0, 8.0)):
        head.tick(held_at)
        assert orders_of(head, say.Hold)
        head.tick(held_at + 0.5)
        assert {type(order) for order in head.pop_orders()} == {say.Resume, say.Free}
        head.tick(next_at - 0.1)
        assert not orders_of(head, say.Hold), "it goes on meanwhile"


def test_after_a_death_it_goes_on_from_its_copy_and_is_asked_for_by_what_is_left():
    head = head_of("a", "b", settings=EVERY)
    sent, give = saved(head, {"step": 1, "decode": 1})
    head.lost(sent.instance, "killed", 0.6)
    orders = head.pop_orders()
    assert not [order for order in orders if isinstance(order, say.Send)]
    (reserve,) = [order for order in orders if isinstance(order, say.Reserve)]
    (restore,) = [order for order in orders if isinstance(order, say.Restore)]
    assert restore == say.Restore(give.target, "r", give.next_term, give.target, reserve.term)
    assert head.pop_events()[-2].saved
    asked = head._book.requests["r"].ask(0.6)
    assert {name: each.count for name, each in asked.calls.items()} == {"step": 1, "decode": 1}
    assert asked.stage == "step"
    head.heard(give.target, say.Took("r", reserve.term), 0.7)
    head.heard(give.target, over("r", reserve.term), 0.8)
    freed, *_ = orders_of(head, say.Free)
    assert freed == say.Free(give.target, "r", give.next_term)


def test_what_is_left_decides_whether_there_is_time():
    """Ten steps take over a second, one takes 0.2: a promise of half a second is kept from the copy only."""
    for left, status in (({"step": 1, "decode": 1}, "goes on"), ({}, "failed")):
        head = head_of("a", "b", settings=EVERY)
        one = request("r", slo=SLO(total=1.5), steps=10)
        sent = send(head, one)
        head.heard(sent.instance, say.Began("r", 1), 0.0)
        head.tick(0.5)
        head.heard(sent.instance, say.Waits("r", 1, left=left), 0.5)
        (give,) = orders_of(head, say.Give)
        head.heard(give.target, say.Kept("r", give.next_term), 0.5)
        head.lost(sent.instance, "killed", 1.0)
        answers = orders_of(head, say.Answer)
        assert [answer.ended.status for answer in answers] == ([] if status == "goes on" else ["failed"])


@pytest.mark.parametrize("what", ["refused", "no answer"])
def test_a_copy_of_which_nothing_comes_is_begun_at_the_start(what):
    head = head_of("a", "b", "c", settings=Settings(snapshot_s=0.5, send_s=1.0))
    sent, give = saved(head)
    head.lost(sent.instance, "killed", 0.6)
    (restore,) = orders_of(head, say.Restore)
    if what == "refused":
        head.heard(restore.target, say.Refused("r", restore.next_term, "no"), 0.7)
    else:
        head.tick(1.6)
    orders = head.pop_orders()
    assert len([order for order in orders if isinstance(order, say.Send)]) == 1
    assert not [order for order in orders if isinstance(order, say.Restore)]
    assert say.Free(give.target, "r", give.next_term) in orders, "nobody needs it any more"


def test_a_copy_that_comes_once_nobody_waits_for_it_is_not_kept():
    head = head_of("a", "b", settings=EVERY)
    sent = waiting(head)
    (give,) = orders_of(head, say.Give)
    head.heard(sent.instance, over("r", 1), 0.6)
    head.pop_orders()
    head.heard(give.target, say.Kept("r", give.next_term), 0.7)
    assert orders_of(head, say.Free) == [say.Free(give.target, "r", give.next_term)]


def test_a_copy_whose_keeper_is_gone_too_is_none():
    head = head_of("a", "b", "c", settings=EVERY)
    sent, give = saved(head)
    head.lost(give.target, "killed", 0.6)
    head.lost(sent.instance, "killed", 0.7)
    orders = head.pop_orders()
    assert [type(order) for order in orders if isinstance(order, say.Send | say.Restore)] == [say.Send]


def test_a_death_while_a_copy_is_made_does_not_wait_for_it():
    head = head_of("a", "b", settings=EVERY)
    sent = waiting(head)
    (give,) = orders_of(head, say.Give)
    head.lost(sent.instance, "killed", 0.5)
    orders = head.pop_orders()
    assert say.Free(give.target, "r", give.next_term) in orders
    assert [order.instance for order in orders if isinstance(order, say.Send)] == [give.target]


def test_one_instance_has_nowhere_to_keep_copies_and_texts_need_none():
    alone = head_of("a", settings=EVERY)
    send(alone, request("r"))
    alone.heard("a", say.Began("r", 1), 0.0)
    alone.tick(0.5)
    assert not alone.pop_orders()


def test_a_request_that_cannot_be_copied_is_not_tried_again():
    head = head_of("a", "b", settings=EVERY)
    sent = waiting(head)
    head.pop_orders()
    head.heard(sent.instance, say.Refused("r", 1, "not movable: so it is"), 0.5)
    assert orders_of(head, say.Resume)
    head.tick(9.0)
    assert not orders_of(head, say.Hold)


def test_no_time_is_no_setting():
    with pytest.raises(ConfigError, match="snapshot_s must be greater than 0"):
        Settings(snapshot_s=0.0)


# -- simulated ---------------------------------------------------------------------------------------


def steps_after_a_crash(snapshot_s: float) -> tuple[Run, int]:
    run = Run([request("r", steps=40)], faults=[Fault(3.05, 0, "crash")], settings=Settings(snapshot_s=snapshot_s))
    return run, run.steps["r"]


def test_a_death_costs_the_steps_since_the_last_copy_only():
    without, all_again = steps_after_a_crash(float("inf"))
    copied, some_again = steps_after_a_crash(0.5)
    assert {run.ended["r"].status for run in (without, copied)} == {"done"}
    assert all_again > 41 + 25 and 41 < some_again <= 41 + 6
    (event,) = copied.of(Restarted)
    assert event.saved and len(copied.of(Saved)) >= 5
    kept = [len(each.instance._keeping) for each in copied.cluster.running.values()]
    assert sum(kept) <= 1, "only the last, of which nobody has heard yet that it is over"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_dies_each_is_answered_once_and_streams_have_no_gap(data):
    instants = st.floats(0.05, 3.0)
    kinds = st.sampled_from(["crash", "hang", "partition"])
    faults = data.draw(st.lists(st.builds(Fault, instants, st.integers(0, 1), kinds, st.floats(0.1, 7.0)), max_size=2))
    if data.draw(st.booleans()):
        faults.append(Fault(data.draw(instants), None, "head", 0.3))
    limits = Settings(restarts=9, deaths=9, snapshot_s=data.draw(st.sampled_from([0.11, 0.3])))
    asked = [request(str(n), 0.1 * n, graph=STREAM, steps=9) for n in range(4)]
    asked += [request(str(n), 0.1 * n, steps=9) for n in range(4, 7)]
    run = Run(asked, 3, faults=faults, settings=limits)
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 7
    assert all(indices == list(range(9)) for indices in run.emitted.values())
