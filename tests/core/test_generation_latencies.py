"""Step latencies of language models: measured, and learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from generations import STEPS, ask, scheduler_of
from hand import Hand

from neustream import (
    Decision,
    ProfileError,
)
from neustream.core.learnt_steps import LearntSteps
from neustream.core.steps import DecodeGrid, PhaseProfile, PrefillTable, Step, StepProfile

# -- latencies --------------------------------------------------------------------------------------


def test_a_prefill_table_has_a_floor_interpolates_and_goes_on_with_its_fit():
    table = PrefillTable("p", [10, 20], [0.1, 0.3], (0.0, 0.02, 1e-3))
    assert table.latency(1, 1, 1) == 0.1
    assert table.latency(1, 15, 225) == pytest.approx(0.2)
    assert table.latency(1, 30, 900) == pytest.approx(0.3 + 0.2 + 0.5)


def test_a_decode_grid_is_bilinear_inside_and_linear_outside():
    grid = DecodeGrid("d", [1, 3], [10, 30], [[1.0, 2.0], [3.0, 6.0]], (0.0, 0.5, 0.01))
    assert grid.latency(1, 10) == 1.0
    assert grid.latency(2, 40) == pytest.approx(3.0)
    assert grid.latency(5, 150) == pytest.approx(6.0 + 0.5 * 2 + 0.01 * 60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefillTable("p", [2, 1], [1.0, 2.0], (0, 0, 0)), "tokens must rise"),
        (lambda: PrefillTable("p", [1], [-1.0], (0, 0, 0)), "greater than 0"),
        (lambda: PrefillTable("p", [], [], (0, 0, 0)), "not empty"),
        (lambda: DecodeGrid("d", [1, 2], [1], [[1.0]], (0, 0, 0)), "2 rows"),
        (lambda: DecodeGrid("d", [1], [1], [[math.nan]], (0, 0, 0)), "finite"),
        (lambda: LearntSteps(None, guess_s=0), "guess_s"),
    ],
)
def test_malformed_latencies_are_errors(make, message):
    with pytest.raises(ProfileError, match=message):
        make()


def test_a_mixed_step_is_dearer_than_either_part_and_cheaper_than_both():
    parts = STEPS.seconds(Step(1, 200, 4e4)), STEPS.seconds(Step(decodes=4, context=400))
    mixed = STEPS.seconds(Step(1, 200, 4e4, 4, 400))
    assert max(parts) < mixed < sum(parts)
    apart = StepProfile("llm", STEPS.prefill, STEPS.decode, mixed=1.5, sequential=True)
    assert apart.seconds(Step(1, 200, 4e4, 4, 400)) == pytest.approx(1.5 * sum(parts))


def test_a_mixed_step_takes_the_same_whatever_was_asked_before():
    steps = [Step(1, 50.0, 2500.0, decodes, context) for decodes in (1, 8) for context in (100.0, 900.0)]

    def fresh():
        return StepProfile("llm", STEPS.prefill, STEPS.decode)

    apart = [fresh().seconds(step) for step in steps]
    assert len(set(apart)) == 4
    profile = fresh()
    assert [profile.seconds(step) for step in (*steps, *steps[::-1])] == apart + apart[::-1]


def truth(step):
    return 0.005 + 1e-4 * step.tokens + (0.002 if step.prefills else 0) + 3e-4 * step.decodes + 1e-6 * step.context


def random_step(draw):
    prompts, decodes = draw.integers(0, 3), draw.integers(0, 9)
    tokens = float(draw.integers(1, 300) * prompts)
    return Step(int(prompts), tokens, tokens**2, int(decodes), float(decodes * draw.integers(10, 400)))


@pytest.mark.parametrize("base", [None, STEPS])
def test_steps_are_learnt_from_nothing_and_from_a_wrong_profile(base):
    draw = np.random.default_rng(0)
    learnt = LearntSteps(base, guess_s=0.5)
    assert learnt.learns and learnt.error == 0.0
    for _ in range(400):
        some = random_step(draw)
        if some.prefills or some.decodes:
            learnt.observe(some, truth(some) * float(draw.lognormal(0, 0.02)))
    errors = [abs(learnt.seconds(some) / truth(some) - 1) for some in (random_step(draw) for _ in range(100))]
    assert float(np.median(errors)) < 0.08 and learnt.error < 0.08


def test_a_stall_does_not_spoil_what_was_learnt():
    learnt = LearntSteps()
    for _ in range(64):
        learnt.observe(Step(decodes=4, context=400), 0.01)
    learnt.observe(Step(decodes=4, context=400), 10.0)
    for _ in range(16):
        learnt.observe(Step(decodes=4, context=400), 0.01)
    assert learnt.seconds(Step(decodes=4, context=400)) < 0.013


def test_the_scheduler_teaches_the_profile_that_learns():
    learnt = LearntSteps()
    scheduler = scheduler_of(Hand(lambda view: Decision(view.jobs)), steps=learnt)
    scheduler.submit(ask("a", 20, 40), 0.0)
    now = 0.0
    for _ in range(40):
        batch = scheduler.next_batch("gpu", now)
        now += 0.03
        scheduler.finish(batch, [{}], now)
    assert learnt.observed == 40
    assert PhaseProfile(learnt, "decode", max_batch=8).latency(1, 30) == pytest.approx(0.03, rel=0.1)
