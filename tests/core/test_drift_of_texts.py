"""Steps of language models that take other times than profiled: learnt in simulations as when served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neustream.config import load_experiment
from neustream.core.learnt_steps import LearntSteps
from neustream.experiment import prepare, simulate

CONFIG = Path(__file__).parents[2] / "configs/paper/opt_13b_a6000.yaml"


def load(**settings):
    """Chats with OPT-13B; `a__b` stands for the key a.b."""
    known = {"workload__requests": 60, "workload__rate": 1, "workload__cv": 2, **settings}
    return prepare(
        load_experiment(CONFIG, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in known.items()])
    )


def phases(times):
    """A device whose steps take so many times as long for half a second, again and again."""
    return lambda batch: times if batch.started_at % 1.7 < 0.5 else 1.0


def slower_from(begin, times):
    """A device that becomes slower for good."""
    return lambda batch: times if batch.started_at > begin else 1.0


@pytest.mark.parametrize(
    ("rate", "took"),
    [(1, phases(2)), (3, phases(2)), (2, lambda batch: 1.4), (1, slower_from(30, 1.5))],
    ids=["phases", "phases at a higher load", "wrong profile", "slower for good"],
)
def test_what_is_learnt_of_texts_loses_nothing_to_plain_rules(rate, took):
    prepared = load(workload__rate=rate)
    ours, *others = [simulate(prepared, name, took=took).counts["on_time"] for name in ("priced", "fcfs", "edf")]
    assert ours >= max(others) > 0


def test_phases_of_three_times_cost_no_more_than_a_rule_that_learns_nothing():
    ours = plain = 0
    for seed in (0, 1):
        prepared = load(workload__rate=2, workload__seed=seed)
        kept = [simulate(prepared, name, took=phases(3)).counts["on_time"] for name in ("priced", "fcfs")]
        ours, plain = ours + kept[0], plain + kept[1]
    assert ours >= plain + 10 > 20


def test_steps_of_very_different_times_are_no_reason_to_refuse_most_requests():
    """With twice the usual error kept as slack a plain rule served more."""
    noisy = load(
        workload__requests=100, workload__rate=4, workload__seed=5, workload__cv=1, simulation__latency_noise=0.6
    )
    ours, plain = [simulate(noisy, name).counts["on_time"] for name in ("priced", "edf")]
    assert ours >= plain > 20


def test_learning_changes_nothing_where_steps_take_what_is_profiled():
    """To the bit: what a simulated clock adds up is no other speed of the device."""
    prepared = load(workload__rate=4)
    known = prepared.profiles["llm.decode"].steps
    expected = []

    def hear(record):
        step = getattr(record, "step", None)
        if step is not None:
            expected.append((step.expected_s, step.profiled_s))

    simulate(prepared, "priced", [hear])
    assert len(expected) > 500 and all(seconds == profiled for seconds, profiled in expected)
    assert not known.learns, "what the device takes is not learnt"


@pytest.mark.parametrize("times", [1.4, 0.7])
def test_a_simulated_device_that_differs_is_learnt_from_as_a_served_one(times):
    """By `simulation` or step by step: the same device, and the same is learnt of it."""
    served = simulate(load(), "priced", took=lambda batch: times).to_dict()
    simulated = simulate(load(simulation={"latency_scale": times, "handover_s": 0.0}), "priced").to_dict()
    for told in ("counts", "latency_s", "busy_s"):
        assert simulated[told] == served[told]


def test_the_same_steps_teach_a_simulation_what_they_teach_a_service(monkeypatch):
    """A service is given `LearntSteps` of the profile; told the same steps it expects the same of each."""
    ran, observe = [], LearntSteps.observe

    def note(learnt, step, seconds):
        ran.append((step, seconds, learnt.seconds(step)))
        observe(learnt, step, seconds)

    prepared = load(workload__requests=20)
    monkeypatch.setattr(LearntSteps, "observe", note)
    simulate(prepared, "fcfs", took=phases(3))
    served = LearntSteps(prepared.profiles["llm.decode"].steps)
    expected = []
    for step, seconds, _ in ran:
        expected.append(served.seconds(step))
        observe(served, step, seconds)
    assert len(ran) > 500 and expected == [seconds for _, _, seconds in ran]
