"""Few texts are weighed as if steps went on to take what they take now; nobody looks further ahead."""

from __future__ import annotations

import pytest
from hand import seen
from texts_by_hand import ask, decided, scheduler_with

from neustream.core.policies import token_step
from neustream.core.policies.model_queues import one_model
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policies.token_few import FEW, Few
from neustream.core.policies.token_step import StepPlan

TIGHT = {"first": 0.53, "step": 0.0195}
"""Nine decode within that pace, in 19 ms, and ten do not."""


def kept(scheduler, now=0.0):
    view = seen(scheduler, now)
    plan = StepPlan(view, one_model(view), TokenDeadlines())
    plan.keep()
    return plan


def tight_ones(count):
    return [ask(f"r{at}", **TIGHT) for at in range(count)]


def never(*args, **kwargs):
    raise AssertionError("somebody looked ahead")


def test_nobody_looks_ahead_where_few_are_there(monkeypatch):
    monkeypatch.setattr(token_step, "Outlook", never)
    new = ask("new", arrival=0.5, first=1.0, step=0.05)
    chosen, _ = decided(scheduler_with(tight_ones(8), [new], now=0.5), 0.5)
    assert "new" in chosen
    many = scheduler_with(tight_ones(FEW), [new], now=0.5)
    with pytest.raises(AssertionError, match="looked ahead"):
        decided(many, 0.5)


@pytest.mark.parametrize(("blocks", "enough"), [(80, True), (60, False)])
def test_memory_has_to_suffice_for_all_maxima(blocks, enough):
    """Nine texts of up to 120 tokens, in blocks of 16, and one block more for each."""
    waiting = [ask("new", arrival=0.5, first=1.0, step=0.05)]
    plan = kept(scheduler_with(tight_ones(8), waiting, now=0.5, blocks=blocks), 0.5)
    assert not plan.calm and (plan.few is not None) == enough


@pytest.mark.parametrize(("weight", "taken"), [(0.02, True), (3.0, False)])
def test_a_newcomer_that_costs_more_than_it_adds_is_not_taken_in(weight, taken):
    """With it a decode takes 21 ms: the tight ones are late after some outputs, and most get 100."""
    running = [ask(f"r{at}", weight=weight, **TIGHT) for at in range(10)]
    new = ask("new", prompt=10, arrival=0.5, first=1.0, step=0.05)
    scheduler = scheduler_with(running, [new], now=0.5, ends=[90] * 50)
    assert kept(scheduler, 0.5).few is not None
    assert ("new" in decided(scheduler, 0.5)[0]) == taken


@pytest.mark.parametrize(
    ("slo", "steps"),
    [
        ({"first": 0.55, "step": 0.02}, 8),  # 0.04 s in hand at the next output, 5 ms less with each
        ({"total": 0.76}, 10),
        ({"first": 0.55, "step": 0.02, "total": 0.64}, 4),
        ({"first": 0.55, "step": 0.03}, None),
        ({"first": 0.55}, None),
    ],
    ids=["a pace", "an end", "both", "a pace that is kept", "nothing more"],
)
def test_a_chance_is_that_of_ending_before_the_time_is_used_up(slo, steps):
    scheduler = scheduler_with([ask("r", **slo)], ends=[*range(2, 60, 3)] * 5)
    plan = kept(scheduler)
    [job] = plan.model.decodes
    over = (job.due_next if slo.get("step") else 0.55) - 0.04
    over = 0.51 if slo.get("step") is None else over
    chance = Few(plan).chance(job, over, 0.025)
    left = scheduler.recent.lengths_of("llm").curve(plan.most())
    assert chance == pytest.approx(1.0 if steps is None else 1 - left[1 + steps] / left[1])
    assert 0 < chance < 1 or steps is None


def test_it_is_hopeful_only_if_all_have_a_chance_at_the_dearest_step():
    ends = [*range(2, 60, 3)] * 5
    slow = scheduler_with(tight_ones(12), [ask("new", first=1.0, step=0.05)], ends=ends)
    assert kept(slow, 0.4).few.hopeful()
    late = kept(slow, 0.525)  # a decode of twelve takes 22 ms
    late.promised = late.model.decodes
    assert not Few(late).hopeful()


@pytest.mark.parametrize(("late", "cost"), [(1, False), (4, True)])
def test_late_ones_cost_something_where_steps_get_longer_than_the_pace(late, cost):
    """Eight and one of them decode in 19 ms; beside twelve the others are late in the end."""
    plan = kept(
        scheduler_with([*tight_ones(8), *[ask(f"l{at}", first=1.0) for at in range(late)]], ends=[90] * 50), 0.5
    )
    others = [job for job in plan.model.decodes if job.id.startswith("l")]
    plan.promised = [job for job in plan.alive if job not in others]
    assert Few(plan).costs(others) == cost
    assert not Few(plan).costs([])


@pytest.mark.parametrize(("share", "chance"), [(1.1, 1.0), (1.0, 0.5), (0.9, 0.0)])
def test_the_last_output_is_in_time_half_of_the_time_where_it_is_due_just_then(share, chance):
    """99 outputs are left, nobody ends earlier; `share` of the time that they take."""
    scheduler = scheduler_with([ask("r", total=share * 99 * 0.01)])
    few = Few(kept(scheduler, 0.0))
    few.__dict__["_left"] = [1.0] * 101
    [job] = few._plan.model.decodes
    assert few.chance(job, 0.0, 0.01) == pytest.approx(chance)


def test_prompts_of_those_who_come_make_an_end_later_and_no_pace():
    waiting = [ask(f"w{at}", arrival=0.01 * at, total=9.0) for at in range(5)]
    running = [ask("end", total=0.5), ask("pace", first=0.06, step=0.01)]
    few = Few(kept(scheduler_with(running, waiting, 0.05, ends=[*range(2, 60, 3)] * 5), 0.05))
    assert few._prompt_s > 0
    end, pace = few._plan.model.decodes
    before = few.chance(end, 0.06, 0.02), few.chance(pace, 0.06, 0.02)
    few.__dict__["_prompt_s"] = 0.02
    assert few.chance(end, 0.06, 0.02) < before[0] and few.chance(pace, 0.06, 0.02) == before[1]
