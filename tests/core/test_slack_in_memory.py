"""Who waits for whom where memory is short: those with slack for those without; who comes back, and when."""

from __future__ import annotations

import numpy as np
import pytest
from hand import Hand, ids, seen
from texts_by_hand import ask, decided, scheduler_with

from neustream import Decision
from neustream.core.policies.model_queues import model_queues, one_model
from neustream.core.policies.on_time import Outlook, expectations
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policies.token_step import StepPlan


def test_those_who_have_slack_leave_the_memory_to_a_newcomer_that_has_none():
    """There is memory for fewer than one to the end: taking turns, it would not keep its pace."""
    running = [ask(f"r{at}", prompt=30, most=400, first=20.0, step=0.03) for at in range(4)]
    new = ask("new", prompt=30, most=400, arrival=0.1, first=0.5, step=0.03)
    scheduler = scheduler_with(running, [new], now=0.1, ends=[390] * 500, blocks=20)
    assert "new" in decided(scheduler, 0.1)[0]


def test_slack_is_nothing_to_those_who_were_promised_their_end_too():
    running = [ask(f"r{at}", prompt=30, most=400, first=20.0, step=0.03, total=50.0) for at in range(4)]
    new = ask("new", prompt=30, most=400, arrival=0.1, first=0.5, step=0.03)
    scheduler = scheduler_with(running, [new], now=0.1, ends=[390] * 500, blocks=20)
    assert "new" not in decided(scheduler, 0.1)[0]


def test_steps_take_turns_with_those_whose_slack_is_used_up_by_then():
    lax = [ask(f"lax{at}", prompt=30, most=400, first=5.0, step=0.1) for at in range(9)]
    hurried = ask("hurried", prompt=30, most=400, first=1.0, step=0.1)
    model = model_queues(seen(scheduler_with([*lax, hurried], ends=[400] * 50), 0.0), "llm")

    def spent(paces):
        horizon = expectations(model, 400, margin=0.0, units=320.0, block=16, paces=paces)
        return horizon.points, Outlook(horizon, model.decodes).spent

    points, together = spent(None)
    _, by_slack = spent(np.array([[5.0, 0.1]] * 9 + [[1.0, 0.1]]))
    used_up = 1.0 + 0.1 * points >= 5.0
    assert 0 < used_up.sum() < len(points) - 1
    each, alone = np.diff(together), np.diff(by_slack)
    assert (alone[~used_up[1:]] < each[~used_up[1:]]).all()  # one has the memory for itself
    assert alone[used_up[:-1]] == pytest.approx(each[used_up[:-1]])  # all of ten take turns


def test_deadlines_that_are_tightened_do_not_make_all_wait_for_themselves():
    """With `steady` all are due at their pace; their slack is that of what was promised all the same."""
    running = [ask(f"r{at}", prompt=30, most=400, first=20.0, step=0.03) for at in range(20)]
    new = ask("new", prompt=30, most=400, arrival=0.1, first=30.0, step=0.03)
    scheduler = scheduler_with(running, [new], now=0.1, ends=[390] * 500, blocks=60)
    view = seen(scheduler, 0.1)
    paces = []
    for steady in (False, True):
        plan = StepPlan(view, one_model(view), TokenDeadlines(steady=steady))
        plan.keep()
        paces.append(sorted(plan._paces(400).tolist()))
    assert paces[0] == paces[1]


@pytest.mark.parametrize(("spare", "first", "back"), [(0, 5, False), (3, 5, False), (4, 5, True), (0, 0.15, True)])
def test_who_lost_its_memory_comes_back_once_it_keeps_it_or_when_it_cannot_wait(spare, first, back):
    """There is room for its prompt and for `spare` blocks more. Six that decode are expected to need four until one
    more of them has made up for it; another one would lose its memory before it."""
    slack = [*([1.0] * 5), 9.0]
    running = [ask(f"a{at}", 46, first=time, step=0.1) for at, time in enumerate(slack)]
    running += [ask("r", 16 * (spare + 1), first=1.0, step=0.1), ask("u", 32, first=first, step=0.1)]
    scheduler = scheduler_with(running, ends=[100] * 50, blocks=21 + spare)
    order = Hand(lambda view: Decision(sorted(view.jobs, key=lambda job: job.id)))
    batch = scheduler.next_batch("gpu", 0.0, instead=order)
    assert ids(batch.jobs) == [f"a{at}" for at in range(6)] + ["r"]  # u lost its blocks to them
    scheduler.finish(batch, [{"ended": job.id == "r"} for job in batch.jobs], 0.02)
    assert ("u" in decided(scheduler, 0.02)[0]) == back


def test_a_total_leaves_no_time_to_wait_for_memory_that_the_outputs_up_to_its_maximum_take():
    """As above, with room for its prompt alone: 30 outputs take half a second beside six others."""

    def back(total):
        running = [ask(f"a{at}", 46, first=1.0, step=0.1) for at in range(5)]
        running += [ask("z", 46, first=9.0, step=0.1), ask("r", 16, first=1.0, step=0.1)]
        scheduler = scheduler_with([*running, ask("u", 32, 30, total=total)], ends=[30] * 50, blocks=21)
        order = Hand(lambda view: Decision(sorted(view.jobs, key=lambda job: (job.id == "u", job.id))))
        batch = scheduler.next_batch("gpu", 0.0, instead=order)
        assert "u" not in ids(batch.jobs)  # it lost its blocks to them
        scheduler.finish(batch, [{"ended": job.id == "r"} for job in batch.jobs], 0.02)
        return "u" in decided(scheduler, 0.02)[0]

    assert back(0.7)
    assert not back(5.0)


@pytest.mark.parametrize(
    ("promised", "leaves"),
    [({"total": 60.0}, 6), ({"first": 20.0, "step": 0.1}, 0), ({"first": 20.0}, 0)],
    ids=["its end", "a pace, which it has to keep soon", "its first output: it may lose its memory then"],
)
def test_a_newcomer_who_would_lose_its_memory_next_leaves_a_block_for_each_who_decodes(promised, leaves):
    """Six hold two blocks each, and its prompt takes as many."""

    def taken(spare):
        running = [ask(f"r{at}", prompt=30, most=200, first=1.0, step=0.5) for at in range(6)]
        new = ask("new", prompt=30, most=200, arrival=0.1, **promised)
        scheduler = scheduler_with(running, [new], now=0.1, ends=[100] * 50, blocks=14 + spare)
        return "new" in decided(scheduler, 0.1)[0]

    assert [taken(spare) for spare in (-1, *range(7))] == [False] + [spare >= leaves for spare in range(7)]


@pytest.mark.parametrize("steps", [-0.5, 0.0, 0.25])
def test_memory_grows_by_nothing_in_less_than_a_step(steps):
    """Beside decodes a prompt may take no time, by a profile that was measured."""
    running = [ask(f"r{at}", prompt=30, most=400, first=20.0, step=0.03) for at in range(4)]
    model = model_queues(seen(scheduler_with(running, ends=[390] * 50), 0.0), "llm")
    outlook = Outlook(expectations(model, 400, margin=0.0, units=320.0, block=16), model.decodes)
    assert 0.0 <= outlook.growth(steps) <= 4 * 16
    assert outlook.growth(100.0) > outlook.growth(steps)
