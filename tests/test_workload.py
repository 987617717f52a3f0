"""Workloads: arrivals and step counts bit for bit, promises."""

from __future__ import annotations

import numpy as np
import pytest
from toys import toy

from neustream import ConfigError, alone_s
from neustream.config import load_experiment
from neustream.experiment import prepare
from neustream.workload import constant_arrivals, gamma_arrivals, with_burst

STEP, DECODE = 0.002, 0.001  # solo latencies of the toy profiles


def requests_of(path, *overrides):
    return prepare(load_experiment(path, overrides)).requests


def arrivals_of(requests):
    return [request.arrival for request in requests]


def steps_of(requests):
    return [request.params["steps"] for request in requests]


def totals_of(requests):
    return [request.slo.total for request in requests]


# -- arrivals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "cv"), [(4.0, 2), (0.4, 2.0), (1.25, 0.5), (2, 4)])
def test_gamma_arrivals_are_the_artifacts_bit_for_bit(rate, cv):
    np.random.seed(0)
    gaps = np.random.gamma(1 / cv**2, cv**2 / rate, 500)
    assert (gamma_arrivals(500, rate=rate, cv=cv, seed=0) == np.cumsum(gaps)).all()


def test_gamma_arrivals_have_their_rate_and_burstiness():
    gaps = np.diff(gamma_arrivals(40_000, rate=5.0, cv=2.0, seed=1))
    assert gaps.min() >= 0
    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gaps_of_twenty_seeds_are_of_their_law(cv):
    """By Kolmogorov's and Smirnov's test; their means are within three sigma."""
    stats = pytest.importorskip("scipy.stats", reason="needs the extra 'analysis'")
    law = stats.gamma(1 / cv**2, scale=cv**2 / 5.0)
    gaps = [np.diff(gamma_arrivals(2000, rate=5.0, cv=cv, seed=seed), prepend=0.0) for seed in range(20)]
    assert min(stats.kstest(each, law.cdf).pvalue for each in gaps) > 0.001
    assert stats.kstest(np.concatenate(gaps), law.cdf).pvalue > 0.05
    assert max(abs(each.mean() - law.mean()) for each in gaps) < 3 * law.std() / 2000**0.5


def test_arrivals_leave_numpys_global_generator_alone():
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    gamma_arrivals(10, rate=1.0, cv=1.0, seed=0)
    assert np.random.random() == expected


def test_constant_arrivals():
    assert constant_arrivals(4, rate=2.0).tolist() == [0.5, 1.0, 1.5, 2.0]


# -- bursts -----------------------------------------------------------------------------------------------


def test_a_burst_divides_its_gaps_and_keeps_the_others():
    arrivals = np.array([1.0, 3.0, 7.0, 9.0, 12.0, 16.0])
    assert with_burst(arrivals, after=2, requests=2, factor=4).tolist() == [1.0, 3.0, 4.0, 4.5, 7.5, 11.5]
    assert with_burst(arrivals, after=0, requests=2, factor=2).tolist() == [0.5, 1.5, 5.5, 7.5, 10.5, 14.5]
    assert with_burst(arrivals, after=4, requests=9, factor=2).tolist() == [1.0, 3.0, 7.0, 9.0, 10.5, 12.5]
    assert with_burst(arrivals, after=1, requests=1, factor=0.5).tolist() == [1.0, 5.0, 9.0, 11.0, 14.0, 18.0]
    assert arrivals.tolist() == [1.0, 3.0, 7.0, 9.0, 12.0, 16.0]


def test_a_burst_leaves_what_comes_before_it_bit_for_bit_and_never_goes_back():
    for seed in range(20):
        arrivals = gamma_arrivals(200, rate=3.0, cv=4.0, seed=seed)  # with gaps down to 1e-30
        burst = with_burst(arrivals, after=50, requests=70, factor=7.3)
        assert (burst[:50] == arrivals[:50]).all()
        assert (np.diff(burst) >= 0).all()
        gaps, before = np.diff(burst), np.diff(arrivals)
        assert gaps[49:119] == pytest.approx(before[49:119] / 7.3, abs=1e-9)
        assert gaps[119:] == pytest.approx(before[119:], abs=1e-9)


def test_no_burst_after_the_last_arrival():
    arrivals = constant_arrivals(3, rate=1.0)
    assert with_burst(arrivals, after=3, requests=2, factor=9).tolist() == arrivals.tolist()


def test_the_burst_of_a_config(tmp_path):
    path, burst = toy(tmp_path), "workload.burst={after: 4, requests: 3, factor: 10}"
    plain, surge = arrivals_of(requests_of(path)), arrivals_of(requests_of(path, burst))
    assert surge == with_burst(np.array(plain), after=4, requests=3, factor=10).tolist()
    assert surge == arrivals_of(requests_of(path, burst))
    assert steps_of(requests_of(path)) == steps_of(requests_of(path, burst))
    even = arrivals_of(requests_of(path, burst, "workload.arrivals=constant", "workload.rate=1"))
    assert even == pytest.approx([1, 2, 3, 4, 4.1, 4.2, 4.3, 5.3, 6.3, 7.3])


# -- what a config draws ----------------------------------------------------------------------------------


def test_the_paper_workload_is_the_artifacts_bit_for_bit(root):
    requests = requests_of(root / "configs/paper/dit_s2_256_rtx4090.yaml")
    np.random.seed(0)
    assert steps_of(requests) == np.random.randint(200, 250, 500).tolist()
    np.random.seed(0)
    assert arrivals_of(requests) == np.cumsum(np.random.gamma(1 / 2**2, 2**2 / 4.0, 500)).tolist()
    assert len({request.id for request in requests}) == 500


def test_steps_are_one_number_a_range_or_a_choice(tmp_path):
    path = toy(tmp_path)
    assert steps_of(requests_of(path, "workload.steps=7")) == [7] * 10
    between = steps_of(requests_of(path, "workload.requests=300", "workload.steps={min: 2, max: 4}"))
    assert set(between) == {2, 3, 4}
    chosen = steps_of(requests_of(path, "workload.requests=300", "workload.steps={choices: [1, 9]}"))
    assert set(chosen) == {1, 9}
    assert 100 < chosen.count(9) < 200


def test_the_seed_seeds_each_draw(tmp_path):
    path = toy(tmp_path)
    first, again, other = (requests_of(path, f"workload.seed={seed}") for seed in (3, 3, 4))
    assert arrivals_of(first) == arrivals_of(again) != arrivals_of(other)
    assert steps_of(first) == steps_of(again) != steps_of(other)


def test_a_seed_keeps_the_steps_when_the_rate_changes(tmp_path):
    path = toy(tmp_path)
    slow, fast = requests_of(path, "workload.rate=1"), requests_of(path, "workload.rate=2")
    assert steps_of(slow) == steps_of(fast)
    assert arrivals_of(slow) == pytest.approx([2 * at for at in arrivals_of(fast)])


def test_constant_arrivals_of_a_config(tmp_path):
    requests = requests_of(toy(tmp_path), "workload.arrivals=constant", "workload.rate=4")
    assert arrivals_of(requests) == [at / 4 for at in range(1, 11)]


def test_load_is_a_multiple_of_what_one_after_the_other_can_be_served_at(tmp_path):
    load = {"arrivals": "constant", "load": 2.0, "requests": 40, "steps": {"min": 1, "max": 9}}
    requests = requests_of(toy(tmp_path, workload=load))
    mean = np.mean([steps * STEP + DECODE for steps in steps_of(requests)])
    assert arrivals_of(requests)[-1] == pytest.approx(40 * mean / 2.0)


def test_a_loop_that_no_parameter_counts_is_an_error(tmp_path):
    stages = {"draw": {"times": "rounds", "max_batch": 4}, "decode": {"max_batch": 2}}
    with pytest.raises(ConfigError, match="'rounds' is what a stage's `times` ask for"):
        requests_of(toy(tmp_path, stages=stages))


# -- promises ---------------------------------------------------------------------------------------------


def test_a_scale_is_a_multiple_of_each_requests_own_solo_latency(tmp_path):
    prepared = prepare(load_experiment(toy(tmp_path, slo={"scale": 3, "extra_s": 0.5})))
    for request in prepared.requests:
        solo = alone_s(prepared.graph, request.params, prepared.profiles)
        assert solo == pytest.approx(request.params["steps"] * STEP + DECODE)
        assert request.slo.total == pytest.approx(3 * (solo + 0.5))


def test_an_absolute_promise_is_the_same_for_all(tmp_path):
    requests = requests_of(toy(tmp_path, slo={"total_s": 1.5}))
    assert set(totals_of(requests)) == {1.5}
    assert {request.slo.name for request in requests} == {""}


def test_classes_are_drawn_by_share_and_carry_weight_and_promise(tmp_path):
    classes = [
        {"name": "gold", "share": 1, "weight": 10, "total_s": 0.5},
        {"name": "plain", "share": 3, "scale": 4},
    ]
    load = {"arrivals": "constant", "rate": 10, "requests": 2000, "steps": 5}
    requests = requests_of(toy(tmp_path, slo={"classes": classes}, workload=load))
    gold = [request for request in requests if request.slo.name == "gold"]
    plain = [request for request in requests if request.slo.name == "plain"]
    assert len(gold) + len(plain) == 2000
    assert len(gold) / 2000 == pytest.approx(0.25, abs=0.03)
    assert {(request.slo.weight, request.slo.total) for request in gold} == {(10.0, 0.5)}
    assert {request.slo.weight for request in plain} == {1.0}
    assert totals_of(plain) == pytest.approx([4 * (5 * STEP + DECODE)] * len(plain))
    again = requests_of(tmp_path / "toy.yaml")
    assert [request.slo.name for request in again] == [request.slo.name for request in requests]
