"""What steps of language models are learnt to take, beside a measured profile."""

from __future__ import annotations

import numpy as np
import pytest

from neustream import LinearProfile
from neustream.core.learnt_steps import LearntSteps
from neustream.core.many_decodes import decode_seconds
from neustream.core.steps import PrefillTable, Step, StepProfile

PREFILL = PrefillTable("prefill", [1, 100, 1000], [0.01, 0.02, 0.11], (0.01, 1e-4, 0.0))
BASE = StepProfile("llm", PREFILL, LinearProfile("decode", base=0.01, per_job=3e-4, per_size=1e-6, max_batch=400))
DECODE, PROMPT, MIXED = Step(decodes=4, context=400.0), Step(1, 200.0, 4e4), Step(1, 100.0, 1e4, 8, 900.0)


def steps_like_served(count, seed=0):
    """Decodes of some requests, now and then a prompt, alone or beside them."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        decodes = int(draw.integers(1, 9))
        context = float(decodes * draw.integers(10, 400))
        tokens = float(draw.integers(10, 300))
        kind = draw.random()
        if kind < 0.85:
            yield Step(decodes=decodes, context=context)
        elif kind < 0.92:
            yield Step(1, tokens, tokens**2)
        else:
            yield Step(1, tokens, tokens**2, decodes, context)


def taught(took, count=600, seed=0, learnt=None):
    """Steps that took `took(step, at)` times what is profiled, `at` seconds after the first began."""
    learnt, now = learnt or LearntSteps(BASE), 0.0
    for step in steps_like_served(count, seed):
        seconds = BASE.seconds(step) * took(step, now)
        learnt.observe(step, seconds)
        now += seconds
    return learnt


def off(learnt, truth=lambda step: 1.0):
    """By how much what is learnt misses what steps take, at most."""
    return max(abs(learnt.seconds(step) / (truth(step) * BASE.seconds(step)) - 1) for step in (DECODE, PROMPT, MIXED))


def test_steps_as_profiled_teach_nothing_to_the_bit():
    learnt = taught(lambda step, at: 1.0 + 1e-12)
    assert [learnt.seconds(step) for step in steps_like_served(50)] == [
        BASE.seconds(step) for step in steps_like_served(50)
    ]
    batch, context = np.array([3.0, 50.0]), np.array([100.0, 9e3])
    assert decode_seconds(learnt, batch, context).tolist() == decode_seconds(BASE, batch, context).tolist()


def test_a_decode_alone_follows_what_is_learnt_as_those_of_many_do():
    learnt, alone = LearntSteps(BASE), Step(decodes=1, context=300.0)
    before = [learnt.seconds(alone) for _ in range(2)]
    taught(lambda step, at: 1.5 + step.context * 1e-4, learnt=learnt)
    expected = decode_seconds(learnt, np.array([1.0]), np.array([300.0])).tolist()
    assert before == 2 * [BASE.seconds(alone)]
    assert [learnt.seconds(alone) for _ in range(2)] == 2 * expected
    assert expected[0] > 1.3 * before[0]


@pytest.mark.parametrize("times", [2, 3])
def test_slow_phases_are_none_of_what_is_learnt(times):
    """Neither as the factor of all steps, nor as what prompts or large batches cost more."""
    assert off(taught(lambda step, at: times if at % 1.7 < 0.5 else 1.0)) < 0.08


@pytest.mark.parametrize("times", [0.67, 1.5, 2.0, 8.0])
def test_a_profile_wrong_throughout_is_learnt(times):
    learnt = taught(lambda step, at: times, count=60)
    assert off(learnt, lambda step: times) < 0.01 and learnt.profiled(DECODE) == BASE.seconds(DECODE)
    assert learnt.error < 0.01, "single steps miss nothing"


def test_a_device_that_is_slower_for_good_is_followed():
    learnt = taught(lambda step, at: 1.0)
    assert off(taught(lambda step, at: 1.5, 60, 1, learnt)) < 0.01, "it may be a phase"
    assert off(taught(lambda step, at: 1.5, 60, 2, learnt), lambda step: 1.5) < 0.01, "it lasts"


def added(decodes, prompts):
    """Decodes take `decodes` times what is profiled, what prompts add to them `prompts` times."""

    def truth(step):
        alone = BASE.seconds(Step(decodes=step.decodes, context=step.context)) if step.decodes else 0.0
        whole = BASE.seconds(step)
        return (decodes * alone + prompts * (whole - alone)) / whole

    return truth


@pytest.mark.parametrize(("decodes", "prompts"), [(1.5, 1.0), (1.0, 1.8), (0.7, 1.2)])
def test_what_only_some_steps_take_longer_is_of_those_steps(decodes, prompts):
    truth = added(decodes, prompts)
    learnt = taught(lambda step, at: truth(step), 3000)
    assert off(learnt, truth) < 0.17
    assert off(learnt) > 0.17


@pytest.mark.parametrize("prompts", [3.0, 6.0])
def test_slow_prompts_make_the_decodes_beside_them_no_slower(prompts):
    """Also where none was seen beside a prompt yet."""
    truth, learnt = added(1.0, prompts), LearntSteps(BASE)
    for step in [DECODE, DECODE, PROMPT] * 10:
        learnt.observe(step, BASE.seconds(step) * truth(step))
    assert off(learnt, truth) < 0.1


def test_noise_teaches_no_shape():
    draw = np.random.default_rng(3)
    learnt = taught(lambda step, at: float(draw.lognormal(0.0, 0.3)), 1000)
    assert off(learnt, lambda step: float(np.exp(0.3**2 / 2))) < 0.1
    assert learnt.error == pytest.approx(0.2, abs=0.04), "the median distance of a log-normal to its median"


def test_stalls_are_no_more_than_two_usual_steps():
    draw = np.random.default_rng(4)
    assert off(taught(lambda step, at: 10.0 if draw.random() < 0.02 else 1.0)) < 0.05


class Own:
    """A profile of a user's own."""

    name, device = "own", "here"

    def seconds(self, step):
        return 1e-3 * max(step.decodes, 1)


def test_a_profile_of_ones_own_need_not_say_whether_it_learns():
    learnt = LearntSteps(Own())
    assert learnt.seconds(Step(decodes=1, context=10.0)) == 1e-3
    assert learnt.seconds(Step(decodes=3, context=10.0)) == 3e-3


def test_steps_that_took_what_was_expected_may_be_taken_in_later(monkeypatch):
    at_once, later = LearntSteps(BASE), LearntSteps(BASE)
    monkeypatch.setattr(at_once, "_as_measured", lambda: False)
    for learnt in (at_once, later):
        taught(lambda step, now: 1.0, count=7000, learnt=learnt)
        assert learnt.seconds(MIXED) == BASE.seconds(MIXED)
        taught(lambda step, now: 1.3 if step.prefills else 1.0, count=900, seed=1, learnt=learnt)
    assert later.seconds(DECODE) == pytest.approx(at_once.seconds(DECODE), rel=1e-9)
    assert later.seconds(MIXED) == pytest.approx(at_once.seconds(MIXED), rel=1e-9)
    assert later.seconds(MIXED) > 1.02 * BASE.seconds(MIXED)
