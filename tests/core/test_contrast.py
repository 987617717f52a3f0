"""What steps with prompts take beside the decodes around them, over what is expected of both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neustream.core.contrast import KEPT, MANY, Contrast


def told(ratios):
    """A contrast that saw steps: "p" with prompts, else a decode, and how many times as long it took."""
    contrast = Contrast()
    for kind, ratio in ratios:
        (contrast.prompt if kind == "p" else contrast.decode)(ratio)
    return contrast


@pytest.mark.parametrize("times", [0.5, 1.8, 6.0])
def test_prompts_that_take_other_times_are_known_after_a_few(times):
    assert told([("d", 1.0), ("d", 1.0), ("p", times)]).times == 1.0, "one may be anything"
    after_two = told([("d", 1.0), ("p", times)] * 2).times
    assert after_two == pytest.approx(min(max(times, 0.5), 2.0)), "at most twice of what was known"
    assert told([("d", 1.0), ("p", times)] * 20).times == pytest.approx(times)


@pytest.mark.parametrize("decodes", [0.3, 0.9])
def test_the_decodes_of_a_step_with_prompts_are_none_of_what_these_add(decodes):
    """Where the device is slower by half besides."""
    contrast, times = Contrast(), 1.5 * (decodes + 4.0 * (1 - decodes))
    for _ in range(20):
        contrast.decode(1.5)
        contrast.prompt(times, decodes)
    assert contrast.times == pytest.approx(4.0)


def test_first_calls_that_compile_do_not_make_all_prompts_hopeless():
    assert told([("d", 1.0), ("p", 500.0), ("d", 1.0), ("p", 300.0)]).times <= 2.0


@pytest.mark.parametrize("speed", [0.7, 1.0, 3.0])
def test_what_slows_all_steps_is_no_contrast(speed):
    assert told([("d", speed), ("p", speed)] * 20).times == 1.0


def test_a_slow_phase_is_none_whatever_stands_at_its_edges():
    slow = [3.0 if at // 20 % 3 == 1 else 1.0 for at in range(400)]
    steps = [("p" if at % 4 == 0 else "d", ratio) for at, ratio in enumerate(slow)]
    assert told(steps).times == pytest.approx(1.0, abs=0.05)


def test_noise_is_hardly_taken_for_one():
    draw = np.random.default_rng(1)
    found = []
    for _ in range(200):
        count = int(draw.integers(8, 60))
        steps = [("p" if draw.random() < 0.3 else "d", float(draw.lognormal(0.0, 0.3))) for _ in range(count)]
        found.append(abs(math.log(told(steps).times)))
    assert np.median(found) == 0.0
    assert np.mean(found) < 0.05


def test_what_ends_is_forgotten():
    slow = [("d", 1.0), ("p", 6.0)] * KEPT
    assert told([*slow, *[("d", 1.0), ("p", 1.0)] * KEPT]).times == 1.0


def test_without_a_decode_many_prompts_are_compared_with_what_is_expected():
    assert told([("p", 5.0)] * (MANY - 1)).times == 1.0, "it may be a phase"
    assert told([("p", 1.7)] * MANY).times == pytest.approx(1.7)
    assert told([*[("p", 3.0)] * MANY, *[("d", 3.0), ("p", 3.0)] * 2]).times == 1.0, "all steps take as long"
