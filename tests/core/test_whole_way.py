"""Requests that go through several pools, with nothing promised but their end."""

import math

import pytest
from hand import Hand, seen

from neustream.core.batch import Batch
from neustream.core.graph import Graph, Stage, seq
from neustream.core.kv_cache import KVCache
from neustream.core.policies import EDF, Priced, TokenDeadlines
from neustream.core.policies.way_rooms import Room
from neustream.core.policies.whole_way import WholeWay
from neustream.core.policy import Decision, Pool
from neustream.core.profile import LinearProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import StepProfile
from neustream.core.types import SLO, Request
from neustream.engine.clock import VirtualClock
from neustream.engine.engine import Engine
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.member import Member
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "steps",
    LinearProfile("prefill", base=0.01, per_size=1e-4, max_batch=64),
    LinearProfile("decode", base=0.01, per_size=1e-6, max_batch=64),
)
PARAMS = {"first": 50, "second": 100, "outputs": 20, "more": 100}


def served(policy, *, count=40, gap=0.05, total=3.0, params=PARAMS, memory=500, ends=None):
    """`count` requests of two models and a tool; the second model has memory for two of them."""
    first = llm("first", prompt="first", max_tokens="outputs")
    second = llm("second", prompt="second", max_tokens="more")
    graph = Graph("agent", seq(first, Stage("tool"), second))
    pools = [
        Pool("first", ("first.prefill", "first.decode"), kv_caches={"first": KVCache(100, 16)}),
        Pool("second", ("second.prefill", "second.decode"), kv_caches={"second": KVCache(memory // 16, 16)}),
        Pool("tool", ("tool",), concurrency=8),
    ]
    profiles = {**llm_profiles("first", STEPS), **llm_profiles("second", STEPS)}
    profiles["tool"] = LinearProfile("tool", base=0.1, max_batch=1)
    requests = [Request(f"r{at}", graph, at * gap, SLO(total), params) for at in range(count)]
    executor = ProfiledExecutor(outcome=lambda batch: _ended(batch, ends or {}))
    member = Member(Scheduler(pools, policy, profiles), {pool.name: executor for pool in pools})
    return Engine(member, VirtualClock()).run(requests).counts


def _ended(batch: Batch, ends):
    """Whether each is over, by the outputs after which a model ends by itself."""
    return [{"ended": job.call_outputs + 1 >= ends.get(job.stage.model, math.inf)} for job in batch.jobs]


def test_all_are_on_time_where_there_is_time_for_all():
    assert served(Priced(), gap=2.0, count=6)["on_time"] == 6


def test_under_overload_it_begins_what_it_can_end_and_serves_more_than_edf():
    ours, edf = served(Priced()), served(EDF())
    assert ours["late"] == 0 and ours["on_time"] > edf["on_time"]


def test_a_maximum_that_nobody_comes_to_keeps_nobody_out():
    """By their maximum each would take 12 s of its 3; they end after 20 and 100 outputs."""
    far = {**PARAMS, "outputs": 600, "more": 600}
    ends = {"first": 20, "second": 100}
    counts = served(Priced(), gap=0.5, count=20, params=far, memory=4000, ends=ends)
    assert counts["on_time"] >= 15


def burst(*asked, running=(), more=20):
    """What is decided first of `asked` requests, prompt and total of each; `running` are at their second output.

    Each has a second call of at most `more` outputs, and 200 such made all of them.
    """
    first = llm("first", prompt="first", max_tokens="outputs")
    graph = Graph("agent", seq(first, llm("second", prompt="first", max_tokens="more")))
    pools = [
        Pool("first", ("first.prefill", "first.decode"), kv_caches={"first": KVCache(20, 16)}),
        Pool("second", ("second.prefill", "second.decode")),
    ]
    profiles = {**llm_profiles("first", STEPS), **llm_profiles("second", STEPS)}
    scheduler = Scheduler(
        pools, {name: Hand(lambda view: Decision(view.jobs)) for name in ("first", "second")}, profiles
    )
    for _ in range(200):
        scheduler.recent.lengths_of("second").full(more)
    params = {"outputs": 500, "more": more}
    for at, (prompt, total) in enumerate(running):
        scheduler.submit(Request(f"r{at}", graph, 0.0, SLO(total), {**params, "first": prompt}), 0.0)
    if running:
        batch = scheduler.next_batch("first", 0.0)
        scheduler.finish(batch, [{"ended": False} for _ in batch.jobs], 0.05)
    for at, (prompt, total) in enumerate(asked):
        scheduler.submit(Request(f"w{at}", graph, 0.05, SLO(total), {**params, "first": prompt}), 0.05)
    return Priced().decide(seen(scheduler, 0.05, pool="first"))


def test_nobody_is_given_up_who_costs_nobody_else_anything():
    """By what second calls took, none that runs looks as if it would be in time."""
    assert not burst((20, 4.0), running=[(30, 4.0)] * 3, more=500).drop


def test_a_request_that_needs_more_memory_than_there_is_ends():
    counts = served(Priced(), count=3, memory=160)
    assert sum(counts.values()) == 3 and counts["on_time"] == 0


@pytest.mark.parametrize("gap", [0.02, 0.05])
def test_who_comes_with_a_known_beginning_is_asked_for_room_as_others_are(gap):
    """Work is the same, and what is known is in no step: it is not under way."""
    known = {**PARAMS, "first": 60, "second": 110, "cached_tokens": 10}
    plain, some = (served(Priced(), gap=gap, memory=4000, total=2.0, params=params) for params in (PARAMS, known))
    assert some["on_time"] >= 0.8 * plain["on_time"] > 10


def test_within_one_pool_the_rule_for_tokens_decides():
    class Asked(TokenDeadlines):
        views = 0

        def decide(self, view):
            Asked.views += 1
            return super().decide(view)

    graph = Graph("text", llm("text"))
    pool = Pool("gpu", ("text.prefill", "text.decode"))
    member = Member(
        Scheduler([pool], WholeWay(Asked()), llm_profiles("text", STEPS)),
        {"gpu": ProfiledExecutor(outcome=lambda batch: _ended(batch, {}))},
    )
    request = Request("one", graph, 0.0, SLO(5.0), {"prompt_tokens": 5, "max_tokens": 3})
    assert Engine(member, VirtualClock()).run([request]).counts["on_time"] == 1 and Asked.views >= 2


def test_a_pool_has_room_as_long_as_no_span_is_asked_for_too_much():
    room = Room()
    assert room.has(0.0, 1.0, 9.0)  # nobody is there: it goes alone
    room.add(0.0, 10.0, 6.0)
    assert room.has(0.0, 10.0, 4.0) and not room.has(0.0, 10.0, 4.1)
    assert room.has(10.0, 12.0, 2.0) and not room.has(8.0, 9.0, 1.1)
    room.add(2.0, 4.0, 2.0)
    assert not room.has(3.0, 4.0, 0.5) and room.has(4.0, 10.0, 1.0)
