"""Who comes in place of those who end: steps ahead do not get shorter where requests keep coming."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hand import seen
from texts_by_hand import ask, scheduler_with

from neustream.core.demand import Calls, Demand
from neustream.core.lengths import Lengths
from neustream.core.policies import TokenDeadlines
from neustream.core.policies.coming import Coming, in_prompts
from neustream.core.policies.model_queues import one_model
from neustream.core.policies.on_time import chances
from neustream.core.policies.recent_prompts import arriving
from neustream.core.policies.token_step import StepPlan
from neustream.core.steps import Step

PROMPT = "llm.prefill"
FOUR = Step(decodes=4, context=100.0)
A_PROMPT = 0.01 * 19 / 99
"""Seconds that one of 20 tokens adds to a step, by `STEPS`."""


def came(count, every, **promised):
    """The latest requests, the last of them now."""
    calls = {PROMPT: Calls(1, False, 1, 20.0)}
    slo = {"budget": math.inf, "step": 0.05, **promised}
    return tuple(Demand(every * (at - count + 1), calls=calls, **slo) for at in range(count))


def view_of(recent, jobs=None, ends=(40,) * 30):
    jobs = jobs or [ask(str(number), first=9.0, step=0.05) for number in range(4)]
    return replace(seen(scheduler_with(jobs, ends=ends)), recent=recent)


def lengths_of(end):
    lengths = Lengths()
    for _ in range(50):
        for outputs in range(1, end + 1):
            lengths.reached(outputs)
        lengths.ended(end, 100)
    return lengths


def planned(view):
    plan = StepPlan(view, one_model(view), TokenDeadlines())
    plan.keep()
    plan.promised = plan.alive
    plan._shed_doomed()
    return plan


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 40, 300])
def test_of_generations_that_begin_one_a_step_those_are_there_that_have_not_ended(steps):
    lengths = Lengths()
    for end in (10, 25, 60) * 20:
        for outputs in range(1, end + 1):
            lengths.reached(outputs)
        lengths.ended(end, 100)
    curve = lengths.curve(100.0)
    left = [curve[min(age, len(curve) - 1)] for age in range(steps)]
    there, outputs = lengths.joined(np.array([float(steps)]), 100.0)
    assert there[0] == pytest.approx(sum(left))
    assert outputs[0] == pytest.approx(sum(age * share for age, share in enumerate(left)))


def test_those_who_come_take_the_places_of_those_who_end_and_no_more():
    coming = Coming(np.array([0.0, 2.0, 9.0]), np.array([10.0, 10.0, 20.0]))
    count = np.array([[4.0, 3.0, 1.0], [4.0, 4.0, 4.0]])
    number, context, kept = coming.beside(count, 10 * count, 10 * count, math.inf)
    assert number.tolist() == [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    assert context.tolist() == [[40.0, 40.0, 70.0], [40.0, 40.0, 40.0]]
    assert kept.tolist() == context.tolist()


def test_no_more_than_come_take_places():
    coming = Coming(np.array([0.0, 0.5]), np.array([10.0, 10.0]))
    number, _, _ = coming.beside(np.array([4.0, 1.0]), np.zeros(2), np.zeros(2), math.inf)
    assert number.tolist() == [4.0, 1.5]


def test_those_who_come_have_the_memory_that_others_leave():
    coming = Coming(np.array([0.0, 9.0]), np.array([10.0, 10.0]))
    count, kept = np.array([4.0, 1.0]), np.array([40.0, 90.0])
    number, context, kept = coming.beside(count, 10 * count, kept, 100.0)
    assert number.tolist() == [4.0, 2.0] and kept.tolist() == [40.0, 100.0] and context.tolist() == [40.0, 20.0]


def test_requests_come_as_often_as_the_latest_did():
    assert arriving(view_of(came(11, 0.1)), PROMPT) == (pytest.approx(10.0), 20.0)
    assert arriving(view_of(came(3, 0.1)), PROMPT)[0] == 0  # too few to tell
    nothing_behind = came(11, 0.1, step=math.inf, first=1.0)
    assert arriving(view_of(nothing_behind), PROMPT)[0] == 0
    assert arriving(view_of(came(11, 0.1, step=math.inf, budget=9.0)), PROMPT)[0] == pytest.approx(10.0)


def test_each_worker_has_its_share_of_those_who_come():
    view = view_of(came(50, 0.01))
    points = np.array([0.0, 8.0, 28.0])
    alone, shared = (
        Coming.to(one_model(replace(view, pool=replace(view.pool, workers=workers))), Lengths(), points, 60.0, FOUR)
        for workers in (1, 4)
    )
    assert alone.count[1] > 0 and shared.count == pytest.approx(alone.count / 4)


def test_prompts_of_nothing_take_some_memory():
    calls = {PROMPT: Calls(1, False, 1, 0.0)}
    view = view_of(tuple(Demand(0.01 * at, math.inf, calls=calls, step=0.05) for at in range(-20, 0)))
    coming = Coming.to(one_model(view), Lengths(), np.array([0.0, 8.0]), 60.0, FOUR)
    number, _, _ = coming.beside(np.array([4.0, 1.0]), np.zeros(2), np.zeros(2), 0.5)
    assert number[0] == 4 and 1 < number[1] < 4


def test_steps_ahead_get_shorter_only_where_nobody_comes_in_place_of_those_who_end():
    alone, followed = planned(view_of(())), planned(view_of(came(50, 0.01)))
    there = alone.outlook.needs[0] > 3.9  # nobody ended
    gone = alone.outlook.needs[0] < 0.1
    assert there.any() and gone.any()
    assert followed.outlook.spent[there] == pytest.approx(alone.outlook.spent[there])
    assert (followed.outlook.spent[gone] > alone.outlook.spent[gone] + 0.02).all()


def test_who_keeps_pace_only_beside_fewer_is_late_where_others_keep_coming():
    """A decode of four takes 14 ms, of two 12 ms: half end early, and the others could keep a pace of 12.5 ms then."""
    tight, lax = ask("tight", first=0.05, step=0.0125), [ask(name, first=9.0, step=0.5) for name in "abc"]
    chance = []
    for recent in ((), came(50, 0.01)):
        outlook = planned(view_of(recent, [tight, *lax], [10] * 30 + [80] * 30)).outlook
        names = [job.id for job in outlook.jobs]
        chance.append(dict(zip(names, chances(outlook.rows.limits, outlook.spent).tolist(), strict=True)))
    alone, followed = chance
    assert alone == pytest.approx(dict.fromkeys(alone, 1.0))
    assert followed["tight"] == pytest.approx(0.5, abs=0.05)
    assert [followed[name] for name in "abc"] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("every", "number"), [(0.01, 4 / 43), (1.0, 0.014)], ids=["as end", "as come"])
def test_a_step_has_as_many_prompts_as_generations_end_and_no_more_than_come(every, number):
    """Four get some 43 outputs each, as it seems; a step of them takes 14 ms."""
    seconds = in_prompts(one_model(view_of(came(50, every))), lengths_of(40), 60.0, FOUR)
    assert seconds == pytest.approx(number * A_PROMPT, rel=0.02)


@pytest.mark.parametrize(("seats", "each"), [(5, A_PROMPT), (4, A_PROMPT), (1, 0.01 + A_PROMPT)])
def test_a_prompt_costs_what_it_adds_to_as_many_decodes_as_have_seats_beside_it(seats, each):
    model = replace(one_model(view_of(came(50, 0.01))), seats=seats)
    assert in_prompts(model, lengths_of(40), 60.0, FOUR) == pytest.approx(4 / 43 * each, rel=0.02)


def test_nothing_is_known_of_prompts_where_too_few_came():
    assert in_prompts(one_model(view_of(came(3, 0.01))), Lengths(), 60.0, FOUR) == 0


def test_the_prompts_of_those_who_come_take_of_the_time_until_an_end_and_not_of_a_pace():
    jobs = [ask("end", total=9.0), ask("pace", first=9.0, step=0.5)]
    alone, followed = planned(view_of((), jobs)).outlook, planned(view_of(came(50, 0.01), jobs)).outlook
    horizon = followed.horizon
    taken = horizon.coming.prompt_s * (1 + horizon.points)
    assert taken.min() > 0
    assert followed.rows.time[0] == pytest.approx(alone.rows.time[0] - taken)
    assert followed.rows.time[1].tolist() == alone.rows.time[1].tolist()
