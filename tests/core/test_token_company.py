"""Prompts whose steps cost much whatever is in them: taken in together, or later."""

from __future__ import annotations

import pytest
from hand import Hand, ids, seen
from texts_by_hand import STAGES, ask

from neustream import Decision, LinearProfile, Pool, Priced, Scheduler
from neustream.core.policies import token_step
from neustream.core.policies.model_queues import one_model
from neustream.core.policies.token_admission import Worth
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policies.token_step import StepPlan
from neustream.core.steps import PrefillTable, StepProfile
from neustream.graphs import llm_profiles

DEAR = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 10, 1000], [0.01, 0.11, 0.16], (0.11, 5e-5, 0.0)),
    LinearProfile("decode", base=0.01, per_job=0.0001, max_batch=999),
    sequential=True,
)
"""Any prompt adds 0.1 s to a step; ten tokens more next to nothing."""
CHEAP = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 1000], [0.01, 1.01], (0.01, 1e-3, 0.0)),
    LinearProfile("decode", base=0.01, per_job=0.0001, max_batch=999),
)


def running_beside(waiting, spare, steps=DEAR):
    """Four that decode, whose next output is due in `spare` seconds, then each 30 ms; lengths of 50 were seen."""
    scheduler = Scheduler([Pool("gpu", STAGES)], Hand(), llm_profiles("llm", steps, 64))
    lengths = scheduler.recent.lengths_of("llm")
    for _ in range(50):
        for outputs in range(1, 51):
            lengths.reached(outputs)
        lengths.ended(50, 100)
    for at in range(4):
        scheduler.submit(ask(f"r{at}", first=spare - 0.03, step=0.03), 0.0)
    batch = scheduler.next_batch("gpu", 0.0, instead=Hand(lambda view: Decision(view.jobs)))
    scheduler.finish(batch, [{"ended": False}] * 4, 0.0)
    for request in waiting:
        scheduler.submit(request, 0.0)
    return scheduler


def taken(scheduler):
    return sorted(id for id in ids(Priced().decide(seen(scheduler)).jobs) if id.startswith("w"))


def prompts(*tokens, first=1.0):
    return [ask(f"w{at}", prompt=size, first=first, step=0.05) for at, size in enumerate(tokens)]


def test_what_any_prompt_adds_is_charged_once():
    """Ten prompts add 0.15 s, where each alone adds 0.1: of a second nobody but the first would be taken in."""
    assert taken(running_beside(prompts(*[20] * 10), spare=0.5)) == [f"w{at}" for at in range(10)]


@pytest.mark.parametrize(("steps", "saved"), [(DEAR, 0.1), (CHEAP, 0.0)])
def test_what_is_saved_is_what_any_prompt_adds(steps, saved, monkeypatch):
    monkeypatch.setattr(token_step, "calm", lambda plan: False)  # else nobody asks
    scheduler = running_beside(prompts(*[20] * 5), 0.5, steps)
    view = seen(scheduler)
    plan = StepPlan(view, one_model(view), TokenDeadlines())
    plan.keep()
    assert Worth(plan)._saved(plan.waiting) == pytest.approx(saved, abs=0.015)


def test_a_small_prompt_waits_for_slack_for_the_others_too():
    """There is slack for ten tokens. A few decodes on there is for all, and not for the others behind the first."""
    waiting = prompts(10, *[150] * 4, first=0.25)
    assert taken(running_beside(waiting, 0.123)) == []
    assert taken(running_beside(waiting, 0.5)) == [f"w{at}" for at in range(5)]


@pytest.mark.parametrize("first", [0.13, 0.5])
def test_nobody_waits_where_the_others_are_late_or_in_time_all_the_same(first):
    assert taken(running_beside(prompts(10, *[150] * 4, first=first), 0.123)) == ["w0"]


def test_nobody_waits_where_each_token_costs_as_much():
    waiting = prompts(100, 100, 100, first=0.5)
    assert taken(running_beside(waiting, 0.125, CHEAP)) != []
