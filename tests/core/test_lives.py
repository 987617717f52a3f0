"""Random lives on a scheduler: each change of status is allowed, each record is a value, each end comes once."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
from hand import Hand, free_blocks, live_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import (
    SLO,
    Decision,
    Graph,
    KVCache,
    LinearProfile,
    PolicyError,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    StageFailed,
    seq,
)
from neustream.core.entry import TRANSITIONS, Entry
from neustream.core.events import Ended, Given
from neustream.core.job import Job
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile("llm", LinearProfile("p", base=0.25, max_batch=8), LinearProfile("d", base=0.25, max_batch=8))
DRAW, TOOL = Stage("draw", max_batch=2), Stage("tool", max_batch=2)
CHAT = llm("llm", max_batch=4)
GRAPHS = [Graph("plain", seq(DRAW, CHAT)), Graph("agent", seq(CHAT, TOOL, DRAW))]
ONE = LinearProfile("one", base=0.5, max_batch=2)
BLOCKS = 6
OVER = ("done", "dropped", "failed", "cancelled", "gone")


@contextlib.contextmanager
def changes_of_status():
    """All changes of status meanwhile, each checked against the table."""
    slot, seen = Job.status, Counter()

    def change(job, status):
        with contextlib.suppress(AttributeError):  # it is new
            before = slot.__get__(job)
            if before != status:
                assert status in TRANSITIONS[before], f"{before} became {status}"
                seen[before, status] += 1
        slot.__set__(job, status)

    Entry.status = property(slot.__get__, change)
    try:
        yield seen
    finally:
        del Entry.status


class Life:
    """A scheduler to which all that can happen happens, as numbers say."""

    def __init__(self):
        pool = Pool("gpu", ("llm.prefill", "llm.decode", "draw"), workers=1, kv_caches={"llm": KVCache(BLOCKS, 4)})
        profiles = {**llm_profiles("llm", STEPS, 4), "draw": ONE}
        self.number = 0
        self.some = Scheduler([pool], Hand(self.choose), profiles, away={"tool": ONE})
        self.now, self.made, self.running = 0.0, 0, []
        self.ended, self.records, self.given = Counter(), [], []

    def choose(self, view):
        n, stages = self.number, sorted(view.queues)
        queue = view.queues[stages[n % len(stages)]]
        drop = {job: "unlucky" for job in view.jobs if n % 11 == 0 and job not in queue}
        jobs = queue[: 1 + n % min(2, view.limit(queue[0].stage.name))]
        parts = {job: 1 + n % 3 for job in jobs if n % 2 and job.stage.phase == "prefill"}
        return Decision(jobs, drop, sizes=parts)

    def act(self, kind, number):
        self.now += 0.25
        self.number = number
        with contextlib.suppress(RequestError):
            getattr(self, kind)(number)
        events = self.some.pop_events()
        self.records += events
        self.ended += Counter(event.id for event in events if isinstance(event, Ended))
        held = sum(job.num_blocks for job in self.some.jobs.values())
        assert held == BLOCKS - free_blocks(self.some)

    def any_id(self, number):
        ids = list(self.some.jobs) or ["nobody"]
        return ids[number % len(ids)]

    def submit(self, number):
        graph, params = GRAPHS[number % 2], {"prompt_tokens": 1 + number % 13, "max_tokens": 1 + number % 5}
        self.made += 1
        self.some.submit(Request(f"r{self.made}", graph, self.now, SLO(), params), self.now)

    def step(self, number):
        if not self.running and (batch := self.some.next_batch("gpu", self.now)) is not None:
            self.running.append(batch)

    def finish(self, number):
        if self.running:
            batch = self.running.pop()
            updates = [StageFailed("broken") if number % 9 == 0 else {"ended": number % 4 == 0} for _ in batch.jobs]
            self.some.finish(batch, updates[1:] if number % 13 == 0 else updates, self.now)

    def fail(self, number):
        if self.running:
            self.some.fail(self.running.pop(), ValueError("out of luck"), self.now)

    def requeue(self, number):
        if self.running:
            self.some.requeue(self.running.pop(), self.now, ("nothing", "cache", "state")[number % 3])

    def cancel(self, number):
        self.some.cancel(self.any_id(number), self.now)

    def hold(self, number):
        self.some.hold(self.any_id(number), self.now)

    def resume(self, number):
        self.some.resume(self.any_id(number))

    def give(self, number):
        with contextlib.suppress(PolicyError):  # it may be in a step
            self.given.append(self.some.give(self.any_id(number), self.now))

    def take(self, number):
        if self.given:
            carry = self.given.pop()
            graph = next(graph for graph in GRAPHS if graph.name == carry.graph)
            self.some.take(carry, graph, self.now)


KINDS = ("submit", "step", "finish", "fail", "requeue", "cancel", "hold", "resume", "give", "take")
OFTEN = ("submit", "step", "finish", "step", "finish", "step", "finish")
actions = st.lists(st.tuples(st.sampled_from(OFTEN + KINDS), st.integers(0, 999)), min_size=10, max_size=80)


def live(actions):
    """A life of these actions: what came of it, and the changes of status that there were."""
    with changes_of_status() as seen:
        life = Life()
        for kind, number in actions:
            life.act(kind, number)
    return life, seen


@settings(max_examples=200, derandomize=True, deadline=None)
@given(actions=actions)
def test_statuses_change_along_the_table_and_records_are_values(actions):
    life, _ = live(actions)
    assert all(count == 1 for count in life.ended.values())
    assert [part for record in life.records for part in live_parts(record)] == []
    assert all(job.status not in OVER for job in life.some.jobs.values())
    gone = {record.id for record in life.records if isinstance(record, Given)}
    assert not set(life.ended) & set(life.some.jobs)
    assert len(life.ended) + len(life.some.jobs) + len(gone) >= life.made


WAY = [
    *[("submit", 0), ("hold", 0), ("resume", 0), ("hold", 0), ("give", 0), ("take", 0), ("cancel", 0)],  # held
    *[("submit", 0), ("hold", 0), ("cancel", 0)],  # from held
    *[("submit", 1), ("step", 0), ("finish", 4), ("cancel", 0)],  # one token, then away
    *[("submit", 1), ("step", 0), ("finish", 4), ("give", 0), ("take", 0), ("give", 0)],  # away and gone
    *[("submit", 0), ("step", 0), ("finish", 1), ("step", 0), ("finish", 4)],  # done
    *[("submit", 0), ("step", 0), ("fail", 0), ("submit", 0), ("give", 0)],
    *[("submit", 1), ("submit", 0), ("step", 11)],  # one is dropped
]


def test_a_life_has_every_kind_of_change():
    _, seen = live(WAY)
    assert set(seen) == {
        *[("waiting", status) for status in ("running", "held", "away", "gone", "done", "dropped", "failed")],
        *[("running", "waiting"), ("held", "waiting"), ("held", "gone"), ("held", "cancelled")],
        *[("away", "gone"), ("away", "cancelled"), ("waiting", "cancelled")],
    }


def test_a_change_that_the_table_does_not_have_is_an_error():
    job = Entry(Request("r", GRAPHS[0]))
    job.become("done")
    for status in TRANSITIONS:
        with pytest.raises(PolicyError, match=f"request 'r' is done and cannot become {status}"):
            job.become(status)


def test_the_table_leads_only_to_statuses_that_it_has():
    assert {status for following in TRANSITIONS.values() for status in following} <= set(TRANSITIONS)
    assert {status for status, following in TRANSITIONS.items() if not following} == set(OVER)
