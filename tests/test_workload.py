"""Workloads: arrivals and step counts bit for bit, trace files with every fault, promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toys import toy

from neustream import ConfigError, alone_s
from neustream.config import load_experiment
from neustream.experiment import prepare
from neustream.workload import Row, constant_arrivals, gamma_arrivals, load_trace, with_burst

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


# -- trace files ------------------------------------------------------------------------------------------


def write(folder, name, *lines):
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_trace(tmp_path):
    path = write(tmp_path, "t.csv", "arrival_s,steps,slo_s,prompt", "0,3,1.5,a cat", "0.25,,,", "0.25,4,,a dog")
    assert load_trace(path) == [
        Row(0.0, 3, 1.5, {"prompt": "a cat"}),
        Row(0.25, None, None, {"prompt": ""}),
        Row(0.25, 4, None, {"prompt": "a dog"}),
    ]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson"])
def test_a_json_lines_trace(tmp_path, name):
    rows = [{"arrival_s": 0.5, "steps": 3, "class_label": 7}, {"arrival_s": 2, "slo_s": 0.1, "prompt": "x"}]
    path = write(tmp_path, name, json.dumps(rows[0]), "", json.dumps(rows[1]))
    assert load_trace(path) == [
        Row(0.5, 3, None, {"class_label": 7}),
        Row(2.0, None, 0.1, {"prompt": "x"}),
    ]


ROWS = [
    (["arrival_s", "-1"], "row 1: arrival_s must be a number of at least 0, got '-1'"),
    (["arrival_s", "0", "soon"], "row 2: arrival_s must be a number of at least 0, got 'soon'"),
    (["arrival_s", "nan"], "row 1: arrival_s must be a number"),
    (["arrival_s", "inf"], "row 1: arrival_s must be a number"),
    (["arrival_s", "2", "3", "1"], "row 3: arrival_s goes back from 3.0 to 1.0"),
    (["arrival,steps", "1,2"], "row 1: no column 'arrival_s'; columns: ['arrival', 'steps']"),
    (["arrival_s,steps", "1,2.5"], "row 1: steps must be a whole number, got 2.5"),
    (["arrival_s,steps", "1,-2"], "row 1: steps must be a number of at least 0, got '-2'"),
    (["arrival_s,steps", "1,many"], "row 1: steps must be a number of at least 0, got 'many'"),
    (["arrival_s,slo_s", "1,1", "2,0"], "row 2: slo_s must be a number"),
    (["arrival_s,slo_s", "1,-1"], "row 1: slo_s must be a number"),
    (["arrival_s"], "has no rows"),
]


@pytest.mark.parametrize(("lines", "message"), ROWS, ids=[message[:40] for _, message in ROWS])
def test_a_wrong_csv_trace_is_told_by_row_and_column(tmp_path, lines, message):
    path = write(tmp_path, "t.csv", *lines)
    with pytest.raises(ConfigError) as wrong:
        load_trace(path)
    assert str(path) in str(wrong.value)
    assert message in str(wrong.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"arrival_s": [1]}', "row 1: arrival_s must be a number of at least 0, got [1]"),
        ("t.jsonl", '{"arrival_s": 1, "steps": "x"}', "row 1: steps must be a number"),
        ("t.jsonl", '{"arrival_s": 1, "slo_s": NaN}', "row 1: slo_s must be a number"),
        ("t.jsonl", '{"steps": 1}', "row 1: no column 'arrival_s'; columns: ['steps']"),
        ("t.jsonl", "{not json", "Expecting property name"),
        ("t.jsonl", "", "has no rows"),
        ("t.json", "[]", "unknown kind '.json'; allowed: .csv, .jsonl, .ndjson"),
        ("trace", "", "unknown kind ''; allowed"),
    ],
)
def test_a_wrong_trace_is_told(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError) as wrong:
        load_trace(path)
    assert str(path) in str(wrong.value)
    assert message in str(wrong.value)


def test_a_missing_trace_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.csv: No such file"):
        load_trace(tmp_path / "nowhere.csv")


def with_trace(folder, *lines, name="trace.csv", **load):
    write(folder, name, *lines)
    return toy(folder, workload={"arrivals": "trace", "file": name, "steps": 2, **load}, slo={"scale": 2})


def test_a_config_takes_its_requests_from_a_trace(tmp_path):
    lines = ["arrival_s,steps,slo_s,prompt", "0.5,,,cat", "1.0,6,,dog", "1.5,,9.5,owl"]
    requests = requests_of(with_trace(tmp_path, *lines))
    assert arrivals_of(requests) == [0.5, 1.0, 1.5]
    assert steps_of(requests) == [2, 6, 2]
    assert totals_of(requests) == pytest.approx([2 * (2 * STEP + DECODE), 2 * (6 * STEP + DECODE), 9.5])
    assert [request.params["prompt"] for request in requests] == ["cat", "dog", "owl"]


def test_steps_that_a_trace_leaves_out_are_drawn(tmp_path):
    lines = ["arrival_s,steps", *(f"{at},{'' if at % 2 else 50}" for at in range(40))]
    steps = steps_of(requests_of(with_trace(tmp_path, *lines), "workload.steps={min: 1, max: 4}"))
    assert set(steps[::2]) == {50}
    assert set(steps[1::2]) <= {1, 2, 3, 4}
    np.random.seed(0)
    assert steps[1::2] == np.random.randint(1, 5, 40).tolist()[1::2]


def test_requests_takes_the_first_rows_of_a_trace(tmp_path):
    path = with_trace(tmp_path, "arrival_s", "1", "2", "3")
    assert len(requests_of(path)) == 3
    assert arrivals_of(requests_of(path, "workload.requests=2")) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"workload.requests is 4, but .*trace.csv has 3 rows"):
        requests_of(path, "workload.requests=4")


def test_a_traces_file_is_relative_to_the_config_or_to_the_working_directory(tmp_path, monkeypatch):
    path = with_trace(tmp_path, "arrival_s", "1")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "other.csv", "arrival_s", "5", "6")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert arrivals_of(requests_of(path)) == [1.0]
    assert arrivals_of(requests_of(path, "workload.file=other.csv")) == [5.0, 6.0]
