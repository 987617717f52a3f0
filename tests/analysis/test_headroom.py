"""policy <= hindsight <= bound, and what the command says of them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from random import Random
from unittest import mock

import pytest
from toys import command, toy, write_profile

from neustream import ConfigError
from neustream.analysis import plots
from neustream.analysis.headroom import bound_of, headroom, true_profiles, weight_on_time
from neustream.analysis.hindsight import STARTS, VARIANTS, hindsight
from neustream.config import load_experiment
from neustream.experiment import prepare, simulate

BUSY = ["workload.rate=2000", "workload.requests=12", "slo={scale: 2}"]


@pytest.fixture
def busy(tmp_path):
    """More than the toy can serve."""
    return prepare(load_experiment(toy(tmp_path), BUSY))


@pytest.fixture
def ticking(monkeypatch):
    """A stopwatch that is a second further each time that it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr("neustream.analysis.hindsight.stopwatch", lambda: float(next(ticks)))


def test_policies_hindsight_and_bound_are_in_order(busy, ticking):
    best, most = hindsight(busy, 100), bound_of(busy, 5)
    values = {name: weight_on_time(simulate(busy, name)) for name in STARTS}
    assert 0 < max(values.values()) <= best.value <= most.value < 12
    assert best.tried > len(STARTS)


def test_what_hindsight_found_is_a_schedule(busy, ticking):
    found = hindsight(busy, 100)
    assert found.value == len(found.served) <= 12
    rules = [*STARTS, "default"]
    alone = replace(busy, requests=[request for request in busy.requests if request.id in found.served])
    assert max(weight_on_time(simulate(alone, rule)) for rule in rules) > 0.8 * found.value


def test_hindsight_with_no_time_is_the_first_schedule(busy):
    found = hindsight(busy, 1e-9, policies=["edf"])
    assert (found.value, found.tried) == (weight_on_time(simulate(busy, "edf")), 2)


def test_a_search_goes_on_after_a_draw_that_changes_nothing(busy, ticking):
    odd = next(seed for seed in range(9) if Random(seed).randrange(2) == 1)  # all requests are in stretch 0
    found = hindsight(busy, 20, policies=["fcfs"], seed=odd)
    assert found.tried > 1 + len(VARIANTS) + 2, "the starts, the best of them again, and changes"


def test_a_search_ends_where_nothing_is_left_to_change(tmp_path, ticking):
    lost = prepare(load_experiment(toy(tmp_path), [*BUSY, "slo={total_s: 1e-6}"]))
    found = hindsight(lost, 1e6, policies=["fcfs"])
    assert (found.value, found.tried) == (0, 1 + len(VARIANTS) + 1)


def test_where_everything_is_served_nothing_is_searched(tmp_path):
    easy = prepare(load_experiment(toy(tmp_path), ["workload.rate=0.1", "slo={scale: 5}"]))
    found = hindsight(easy, 60.0, policies=["fcfs"])
    assert (found.value, bound_of(easy).value) == (10.0, 10.0)
    assert found.seconds < 10


def test_the_truth_is_the_profile_with_what_the_simulation_does_to_it(tmp_path):
    overrides = ["simulation.latency_scale=1.5", "simulation.handover_s=0.25"]
    slower = prepare(load_experiment(toy(tmp_path), overrides))
    for name, profile in true_profiles(slower).items():
        assert profile.latency(1) == 1.5 * slower.profiles[name].latency(1) + 0.25
    lull = "simulation.slowdowns=[{start_s: 0, duration_s: 1, factor: 0.5}, {start_s: 0, duration_s: 1, factor: 3}]"
    mixed = prepare(load_experiment(toy(tmp_path), [lull]))
    for name, profile in true_profiles(mixed).items():
        assert profile.latency(1) == 0.5 * mixed.profiles[name].latency(1)


def test_the_bound_is_of_what_steps_really_take(busy, tmp_path):
    write_profile(tmp_path / "profiles/fast.json", "draw", [1, 4], [0.0005, 0.001])
    faster = prepare(load_experiment(toy(tmp_path), [*BUSY, "simulation.truth={draw: [fast]}"]))
    true = true_profiles(faster)
    assert true["draw"].latency(1) == faster.truth["draw"].latency(1) < faster.profiles["draw"].latency(1)
    assert true["decode"].latency(1) == faster.profiles["decode"].latency(1)
    assert bound_of(faster, 5).value > bound_of(busy, 5).value


def test_noise_has_no_bound_and_no_hindsight(tmp_path):
    noisy = prepare(load_experiment(toy(tmp_path), ["simulation.latency_noise=0.1"]))
    with pytest.raises(ConfigError, match=r"no bound under simulation\.latency_noise"):
        bound_of(noisy)
    with pytest.raises(ConfigError, match="without latency_noise"):
        hindsight(noisy)


def test_ratios_count_weight(busy):
    report, most = simulate(busy, "edf"), bound_of(busy, 5)
    said = headroom(busy, report, most, None)
    assert said["bound_ratio"] == weight_on_time(report) / most.value
    assert said["bound"]["goodput_rps"] == most.value / busy.requests[-1].arrival
    assert "hindsight" not in said


def test_simulate_prints_and_writes_bound_and_hindsight(tmp_path):
    path, out = toy(tmp_path), tmp_path / "out.json"
    sets = [part for setting in BUSY for part in ("--set", setting)]
    done = command("simulate", path, *sets, "-p", "fcfs", "-p", "default", "--bound", "--hindsight", 1, "--json", out)
    assert done.status == 0
    assert "of bound" in done.out and "the most that any scheduler could serve" in " ".join(done.out.split())
    assert max(len(line) for line in done.out.splitlines()) <= 80
    for entry in json.loads(out.read_text()):
        assert entry["bound"].keys() == {"value", "relaxed", "proven", "method", "seconds", "goodput_rps", "weight"}
        assert entry["bound_ratio"] == entry["counts"]["on_time"] / entry["bound"]["value"]
        assert entry["counts"]["on_time"] <= entry["hindsight"]["value"] <= entry["bound"]["value"]


def test_sweep_draws_the_bound(tmp_path):
    done = command("sweep", toy(tmp_path), "--over", "workload.rate", "--values", "100,1000", "-p", "default",
                   "--bound", "--out", tmp_path / "out")  # fmt: skip
    assert done.status == 0 and "bound" in done.out
    entries = json.loads((tmp_path / "out/sweep.json").read_text())
    assert all(entry["counts"]["on_time"] <= entry["bound"]["value"] for entry in entries)
    assert (tmp_path / "out/goodput.png").exists()


def test_a_bound_of_weights_is_no_line_among_counts_of_requests(tmp_path):
    classes = [{"name": "gold", "total_s": 30}, {"name": "plain", "total_s": 30, "weight": 0.125}]
    args = ["--over", "workload.rate", "--values", "50,100", "--bound", "--jobs", 1]
    labels = []
    for at, slo in enumerate(({"total_s": 30}, {"classes": classes})):
        folder = tmp_path / str(at)
        folder.mkdir()
        done = command("sweep", toy(folder, slo=slo), *args, "--out", folder / "out")
        assert done.status == 0, done.err
        assert ("bound (weight)" in done.out) == bool(at)
        points = json.loads((folder / "out/sweep.json").read_text())
        with mock.patch.object(plots, "_saved", lambda figure, path: figure):
            figures = plots.plot_sweep(points, "workload.rate", ["fcfs"], "toy", folder)
        labels.append([[line.get_label() for line in figure.axes[0].lines] for figure in figures])
        for figure in figures:
            plots.plt.close(figure)
    assert labels == [[["fcfs", "bound"]] * 2, [["fcfs"]] * 2]
