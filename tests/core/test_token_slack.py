"""What is kept of a step of decodes so that its noise makes few outputs late."""

from __future__ import annotations

from dataclasses import replace
from math import erf, sqrt

import pytest
from hand import seen
from texts_by_hand import ask, scheduler_with

from neustream.core.observed import Spread
from neustream.core.policies import TokenDeadlines
from neustream.core.policies.model_queues import one_model
from neustream.core.policies.token_noise import safe
from neustream.core.policies.token_step import StepPlan

NORMAL = 0.67449
"""Median of the absolute value of a normal error, in standard deviations."""


@pytest.mark.parametrize("decodes", [3, 4, 5])
@pytest.mark.parametrize("error", [0.01, 0.1])
def test_half_an_output_is_late_by_the_noise_of_a_step(error, decodes):
    deviation = error / NORMAL
    longer = (1 - erf(safe(error, decodes) / deviation / sqrt(2))) / 2
    assert decodes * longer == pytest.approx(0.5, rel=1e-3)


def test_more_is_kept_the_more_decode_from_once_to_twice_the_error():
    kept = [safe(0.1, decodes) for decodes in (0, 1, 2, 3, 4, 5, 50, 500)]
    assert kept == sorted(kept)
    assert kept[:3] == pytest.approx([0.1] * 3)
    assert kept[-2:] == pytest.approx([0.2] * 2)
    assert kept[2] < kept[3] < kept[4] < kept[5] < kept[6]


def test_nothing_is_kept_where_steps_take_what_is_expected():
    assert [safe(0.0, decodes) for decodes in (0, 1, 100)] == [0.0] * 3


def test_two_fifths_of_a_step_are_kept_at_most():
    assert safe(0.3, 1) == pytest.approx(0.3)
    assert safe(0.3, 100) == safe(0.9, 1) == safe(5.0, 100) == pytest.approx(0.4)


@pytest.mark.parametrize(("decodes", "times"), [(1, 1.0), (10, 2.0)])
def test_a_step_leaves_as_much_as_those_who_decode_in_it_need(decodes, times):
    running = [ask(str(number), first=10, step=0.1) for number in range(decodes)]
    view = replace(seen(scheduler_with(running)), spread={"llm.decode": Spread(error=0.1)})
    plan = StepPlan(view, one_model(view), TokenDeadlines())
    plan.keep()
    assert plan.margin == pytest.approx(1 + 0.1 * times)
