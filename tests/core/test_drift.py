"""Steps that take longer than profiled, learnt from as a service does: nothing that fits is lost by it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from neustream.config import load_experiment
from neustream.experiment import prepare, simulate

CONFIG = Path(__file__).parents[2] / "configs/paper/dit_s2_256_rtx4090.yaml"


def load(**settings):
    """Short requests of DiT-S/2; `a__b` stands for the key a.b."""
    known = {"workload__requests": 150, "workload__cv": 1, "workload__steps": {"min": 20, "max": 30}, **settings}
    return prepare(
        load_experiment(CONFIG, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in known.items()])
    )


def phases(times, lasts=0.5, every=1.3):
    """A device whose steps take so many times as long for a while, again and again."""
    return lambda batch: times if batch.started_at % every < lasts else 1.0


def slow_until(end, times):
    """A device that is slow at first."""
    return lambda batch: times if batch.started_at < end else 1.0


def noisy(sigma, times, seed=7):
    """Steps of a log-normal length, `times` the profiled one in the median."""
    draw = random.Random(seed)
    return lambda batch: times * draw.lognormvariate(0.0, sigma)


def on_time(prepared, took, *policies):
    """Requests on time; `took` makes a device anew for each policy."""
    return [simulate(prepared, policy, took=took()).counts["on_time"] for policy in policies]


BASELINES = ("fcfs", "edf", "neustream")


@pytest.mark.parametrize(
    ("rate", "scale", "took"),
    [
        (15, 3, lambda: phases(2)),
        (15, 3, lambda: phases(3)),
        (20, 2, lambda: slow_until(1e9, 1.4)),
        (15, 3, lambda: noisy(0.4, 1.25)),
        (8, 3, lambda: noisy(0.2, 1.5)),
    ],
    ids=["phases of twice", "phases of three times", "wrong profile", "noise", "wrong profile and noise"],
)
def test_no_plain_rule_keeps_more_where_steps_take_longer(rate, scale, took):
    ours, *others = on_time(load(workload__rate=rate, slo__scale=scale), took, "priced", *BASELINES)
    assert ours >= max(others)


SHORT = ((15, 2, 1.5, 0.03), (15, 2, 2, 0.03), (4.35, 2, 2, 0.01), (10, 3, 3, 0.01))
"""Rate, scale, how many times as slow, and the share of the requests that may be lost: 0.01 is not
reached at all."""


@pytest.mark.parametrize(("rate", "scale", "times", "lost"), SHORT)
def test_next_to_nothing_is_lost_to_short_slow_phases(rate, scale, times, lost):
    ours = fcfs = 0
    for seed in (20, 22):
        prepared = load(workload__rate=rate, slo__scale=scale, workload__seed=seed)
        kept = on_time(prepared, lambda: phases(times), "priced", "fcfs")
        ours, fcfs = ours + kept[0], fcfs + kept[1]
    assert ours >= fcfs - lost * 300


@pytest.mark.parametrize("times", [1.4, 0.7])
def test_a_simulated_device_that_differs_is_learnt_from_as_a_served_one(times):
    """By `simulation` or step by step: the same device, and the same corrections of its profile."""
    prepared = load(workload__rate=20, slo__scale=2)
    device = {"latency_scale": times, "handover_s": 0.0}
    differs = load(workload__rate=20, slo__scale=2, simulation=device)
    served = simulate(prepared, "fcfs", took=lambda batch: times).to_dict()
    simulated = simulate(differs, "fcfs").to_dict()
    for told in ("counts", "latency_s", "busy_s"):
        assert simulated[told] == served[told]


@pytest.mark.parametrize("policy", ["priced", "fcfs"])
def test_a_device_that_was_slow_for_long_is_tried_again(policy):
    """At twice the time nobody is in time, so that only requests without hope could show that it is over."""
    prepared = load(workload__rate=4, slo__scale=1.8)
    late = [request for request in prepared.requests if request.arrival > 22]
    (served,) = on_time(prepared, lambda: slow_until(20, 2.0), policy)
    assert served >= 0.9 * len(late) > 40
