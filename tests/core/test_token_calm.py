"""Where nobody can be late whatever is decided, texts are decided without anybody's chances, as with them."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest
from hand import ids, seen
from texts_by_hand import CHAT, STAGES, STEPS, ask, scheduler_with

from neustream import SLO, Engine, Member, Pool, Priced, ProfiledExecutor, Request, Scheduler, VirtualClock
from neustream.core.kv_cache import KVCache
from neustream.core.policies import token_step
from neustream.core.policies.model_queues import one_model
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policies.token_step import StepPlan
from neustream.graphs import llm_profiles

LAX = {"first": 2.0, "step": 0.05}


def planned(scheduler, now=0.0, policy=None):
    """A plan with all prompts chosen."""
    view = seen(scheduler, now)
    plan = StepPlan(view, one_model(view), policy or TokenDeadlines())
    plan.keep()
    plan.admit()
    return plan


def asks(name, count, **slo):
    return [ask(f"{name}{at}", **slo) for at in range(count)]


def test_where_all_have_time_nobody_s_chances_are_computed(monkeypatch):
    monkeypatch.setattr(StepPlan, "outlook", None)
    plan = planned(scheduler_with(asks("r", 3, **LAX), asks("w", 4, **LAX)))
    assert plan.calm and plan.few is None
    assert sorted(ids(plan.part.chosen)) == ["w0", "w1", "w2", "w3"]


@pytest.mark.parametrize(
    "less",
    [{"step": 0.015}, {"step": 0.018}, {"total": 1.5}],
    ids=["a pace that a step of all is too long for", "just so", "an end that comes before its last output may"],
)
def test_one_who_may_be_late_is_enough_for_chances(less):
    """A decode of eight takes 18 ms, and a tenth more is kept free: 19.8 ms."""
    many = asks("r", 3, **LAX)
    assert planned(scheduler_with(many, asks("w", 5, **LAX))).calm
    slow = scheduler_with([*many, ask("slow", **{**LAX, **less})], asks("w", 4, **LAX))
    assert not planned(slow).calm


def test_a_next_output_that_is_due_before_a_decode_of_all_is_over_is_enough():
    scheduler = scheduler_with([ask("r0", first=0.5, step=0.05)], asks("w", 2, **LAX))
    assert planned(scheduler, 0.51).calm
    assert not planned(scheduler, 0.537).calm


@pytest.mark.parametrize(("blocks", "fits"), [(60, True), (40, False)])
def test_memory_has_to_suffice_for_all_that_they_may_become(blocks, fits):
    """Five texts of up to 120 tokens, in blocks of 16, and one block more for each."""
    assert planned(scheduler_with(asks("r", 2, **LAX), asks("w", 3, **LAX), blocks=blocks)).calm is fits


def test_more_than_have_seats_are_not_all_taken():
    assert planned(scheduler_with(waiting=asks("w", 32, **LAX))).calm
    assert not planned(scheduler_with(asks("r", 33, **LAX), asks("w", 32, **LAX))).calm
    assert not planned(scheduler_with(waiting=asks("w", 33, **LAX))).calm


PROMISES = {
    "paces": [SLO(first=0.4, step=0.03), SLO(first=1.0, step=0.06)],
    "ends": [SLO(total=2.0), SLO(total=4.0)],
    "first outputs": [SLO(first=0.3)],
    "all kinds": [SLO(first=0.4, step=0.04), SLO(total=3.0), SLO(first=0.5)],
}


class Twice:
    """A rule that decides with chances wherever it was calm, and compares."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._rule = Priced()
        self.calm = 0

    def decide(self, view):
        asked = []

        def noted(plan):
            asked.append(token_calm(plan))
            return asked[-1]

        decision = self._with(noted, view)
        if any(asked):
            self.calm += 1
            full = self._with(lambda plan: False, view)
            assert replace(decision, until=full.until) == full
        return decision

    def _with(self, calm, view):
        with self._monkeypatch.context() as patched:
            patched.setattr(token_step, "calm", calm)
            return self._rule.decide(view)


token_calm = token_step.calm


@pytest.mark.parametrize("blocks", [None, 120])
@pytest.mark.parametrize("promised", PROMISES)
def test_decisions_are_those_with_chances(promised, blocks, monkeypatch):
    draw = np.random.default_rng([5, len(promised)])
    slos = islice(cycle(PROMISES[promised]), 60)
    arrivals = np.cumsum(draw.exponential(0.15, 60)).tolist()
    requests = [
        Request(f"r{at}", CHAT, arrival, slo, {"prompt_tokens": int(draw.integers(5, 90)), "max_tokens": 60})
        for at, (arrival, slo) in enumerate(zip(arrivals, slos, strict=True))
    ]
    ends = {request.id: int(draw.integers(1, 60)) for request in requests}
    caches = {} if blocks is None else {"llm": KVCache(blocks, 16)}
    rule = Twice(monkeypatch)
    scheduler = Scheduler([Pool("gpu", STAGES, kv_caches=caches)], rule, llm_profiles("llm", STEPS, 64))
    executor = ProfiledExecutor(
        stretch=lambda batch: float(np.exp(draw.normal(0, 0.2))),
        outcome=lambda batch: [{"ended": job.call_outputs + 1 >= ends[job.id]} for job in batch.jobs],
    )
    Engine(Member(scheduler, {"gpu": executor}), VirtualClock()).run(requests)
    assert rule.calm > 20
