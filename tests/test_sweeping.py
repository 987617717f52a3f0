"""Sweeps on several processes: the same results, kept as they come, used again where nothing has changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_foreign_code import command_interrupted
from toys import TESTS, command, results, toy, write_profile

import neustream.experiment.sweeping
from neustream import NeustreamError
from neustream.config import load_experiment
from neustream.engine.trace import EventLog
from neustream.experiment.sweeping import Batches, Kept, Point, Unit, batches_of, fingerprint, run_units

VALUES = ["--over", "workload.rate", "--values", "50,100,400"]


def sweep(path, out, *more, jobs=1):
    done = command("sweep", path, *VALUES, "--out", out, "--jobs", jobs, *more)
    assert done.status == 0, done.err
    return done


def timeless(entries):
    return [{key: value for key, value in entry.items() if key != "decision_us"} for entry in entries]


def reused(done):
    line = next((line for line in done.err.splitlines() if "are reused" in line), "0 of")
    return int(line.split()[0])


def test_processes_do_not_change_the_results(tmp_path):
    path = toy(tmp_path, policies={"fcfs": {}, "toys:Newest": {"max_batch": 2}})
    sweep(path, tmp_path / "one")
    sweep(path, tmp_path / "two", jobs=2)
    one, two = (results(tmp_path / name / "sweep.json") for name in ("one", "two"))
    assert timeless(one) == timeless(two)
    assert [(entry["value"], entry["policy"]) for entry in two] == [
        (value, policy) for value in (50, 100, 400) for policy in ("fcfs", "toys:Newest")
    ]


def test_a_second_sweep_simulates_only_what_is_new(tmp_path):
    path, out = toy(tmp_path), tmp_path / "out"
    assert reused(sweep(path, out)) == 0
    before = results(out / "sweep.json")
    assert reused(sweep(path, out)) == 3
    assert results(out / "sweep.json") == before, "to the microsecond: they are the same ones"
    assert reused(sweep(path, out, "-p", "fcfs", "-p", "serial")) == 3
    assert "reused" not in sweep(path, out, "--fresh").err
    done = command("sweep", path, "--over", "workload.rate", "--values", "50,7", "--out", out, "--jobs", 1)
    assert reused(done) == 1 and "1 of 2 points are reused" in done.err


@pytest.mark.parametrize(
    "change",
    [["-s", "workload.seed=1"], ["-s", "slo.total_s=9"], ["-s", "policies.fcfs.drop_hopeless=false"], ["--bound"]],
    ids=lambda change: change[-1],
)
def test_another_config_is_not_mixed_with_old_points(tmp_path, change):
    path, out = toy(tmp_path), tmp_path / "out"
    sweep(path, out)
    assert reused(sweep(path, out, *change)) == 0
    assert reused(sweep(path, out)) == 3, "those of the first config are still there"


def test_what_a_fingerprint_depends_on(tmp_path, monkeypatch):
    path = toy(tmp_path, workload={"trace": "t.csv"})
    (tmp_path / "t.csv").write_text("arrival_s\n1\n")
    (tmp_path / "own_rule.py").write_text("from toys import Newest\n")
    monkeypatch.syspath_prepend(tmp_path)

    def name(*settings, policy="fcfs"):
        neustream.experiment.sweeping._digest.cache_clear()
        return fingerprint(Unit(load_experiment(path, settings), "slo.scale", 1.0, (policy,)), policy)

    first = name()
    assert name() == first
    assert name("about=words", "backend=null", "sweeps={slo.scale: {values: [1]}}", "policies.edf={}") == first
    own = name(policy="own_rule:Newest")
    for change in (
        lambda: write_profile(tmp_path / "profiles/draw.json", "draw", [1, 2, 4], [0.002, 0.0025, 0.0031]),
        lambda: (tmp_path / "t.csv").write_text("arrival_s\n2\n"),
    ):
        change()
        assert name() != first
        first, own = name(), name(policy="own_rule:Newest")
    truth = "simulation.truth={draw: [real]}"
    write_profile(tmp_path / "profiles/real.json", "draw", [1, 4], [0.002, 0.003])
    true = name(truth)
    write_profile(tmp_path / "profiles/real.json", "draw", [1, 4], [0.002, 0.004])
    assert len({name(truth), true, first}) == 3
    (tmp_path / "own_rule.py").write_text("from toys import Newest  # otherwise\n")
    assert name() == first and name(policy="own_rule:Newest") != own


def test_points_of_another_sweep_at_the_same_config_are_not_mixed_in(tmp_path):
    path, out = toy(tmp_path, slo={"scale": 2}), tmp_path / "out"
    common = ["--out", out, "--jobs", 1]
    assert command("sweep", path, "--over", "workload.rate", "--values", "50,200", *common).status == 0
    done = command("sweep", path, "--over", "slo.scale", "--values", "2,4", *common)
    assert done.status == 0 and reused(done) == 0
    entries = results(out / "sweep.json")
    assert [(entry["over"], entry["value"]) for entry in entries] == [("slo.scale", 2), ("slo.scale", 4)]


def test_points_are_kept_by_the_code_of_the_whole_library(tmp_path, monkeypatch):
    module = neustream.experiment.sweeping
    for file in ("__init__.py", "core/policies/fcfs.py"):
        copy = tmp_path / "neustream" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    monkeypatch.setattr(neustream, "__file__", str(tmp_path / "neustream/__init__.py"))
    first = module._code.__wrapped__()
    assert module._code.__wrapped__() == first
    (tmp_path / "neustream/core/policies/fcfs.py").write_text("PATIENCE = 2\n")
    assert module._code.__wrapped__() != first


def test_lines_that_are_cut_off_are_simulated_again(tmp_path):
    path, out = toy(tmp_path), tmp_path / "out"
    sweep(path, out)
    before = results(out / "sweep.json")
    kept = out / "points.jsonl"
    kept.write_text(kept.read_text()[:-100])
    assert reused(sweep(path, out)) == 2
    assert timeless(results(out / "sweep.json")) == timeless(before)
    assert reused(sweep(path, out)) == 3


@pytest.mark.parametrize("text", ["", "\n", "[]\n", '{"key": 1}\n', '{"key": []}\n', "null\n3\n", "\0\n"])
def test_a_file_of_points_that_holds_something_else(tmp_path, text):
    path = tmp_path / "points.jsonl"
    path.write_text(text)
    kept = Kept(path)
    kept.add("a", Point({"x": 1}, Batches([0.0], [1], 2.0)))
    assert Kept(path).find("a", True) == Point({"x": 1}, Batches([0.0], [1], 2.0))


def test_batches_over_time():
    log = EventLog()
    steps = [(0, 1, 2), (1, 2, 2), (2.5, 3.5, 1), (6, 7, 1)]  # the third follows closely, the last after a pause
    log.steps = [{"stage": "s", "start": a, "end": b, "jobs": list(range(n))} for a, b, n in steps]
    log.steps.insert(1, {"stage": "other", "start": 0, "end": 9, "jobs": []})
    assert batches_of(log, "s") == Batches([0, 2.5, 3.5, 6, 7], [2, 1, 0, 1, 0], 0.0)


# -- what goes wrong ------------------------------------------------------------------------------------


class Dies:
    """A policy that takes its process with it, where that is not the one of the tests."""

    def decide(self, view):
        os._exit(3)


class Raises:
    """A policy that breaks at the highest rate."""

    def decide(self, view):
        if view.now < 0.01:
            raise KeyError("too early")
        from neustream import FCFS

        return FCFS().decide(view)


def test_a_process_that_dies_is_told(tmp_path):
    experiment = load_experiment(toy(tmp_path))
    units = [Unit(experiment, "workload.rate", value, ("test_sweeping:Dies",)) for value in (1.0, 2.0)]
    with pytest.raises(NeustreamError, match="a process of the sweep died"):
        list(run_units(units, 2))


class Presses:
    """A policy that pretends that somebody pressed Ctrl-C."""

    def decide(self, view):
        raise KeyboardInterrupt


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_policy_does_not_press_control_c(tmp_path, jobs):
    done = command(
        "sweep", toy(tmp_path), *VALUES, "--out", tmp_path / "out", "--jobs", jobs, "-p", "test_sweeping:Presses"
    )
    assert done.status == 2 and "a policy raised KeyboardInterrupt, without Ctrl-C" in done.err


def test_an_error_in_a_process_is_one_line_and_keeps_the_other_points(tmp_path):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 10, "requests": 10, "steps": 3})
    asked = ["--over", "workload.rate", "--values", "10,20,400", "--out", tmp_path / "out", "--jobs", 2]
    done = command("sweep", path, *asked, "-p", "test_sweeping:Raises")
    assert done.status == 2
    assert "PolicyError: policy 'test_sweeping:Raises': decide raised KeyError: 'too early'" in done.err
    assert "Traceback" not in done.err and not (tmp_path / "out/sweep.json").exists()


SLOW = """
import os, pathlib, time
from dataclasses import dataclass
from neustream import FCFS
@dataclass(frozen=True)
class Slow(FCFS):
    def decide(self, view):
        if view.now < 0.01 and not pathlib.Path("go").exists():
            pathlib.Path("marker").write_text(str(os.getpid()))
            for _ in range(1200):  # a signal just before a sleep is heard when that ends
                time.sleep(0.05)
        return super().decide(view)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_control_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, jobs):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 10, "requests": 10, "steps": 3})
    (tmp_path / "slow_rule.py").write_text(SLOW)
    asked = ["sweep", path, "--over", "workload.rate", "--values", "10,400,20", "--out", "out", "--jobs", jobs]
    status, out, err = command_interrupted(*asked, "-p", "slow_rule:Slow", folder=tmp_path, marker="out/points.jsonl")
    assert status == 130 and out == ""
    kept = len((tmp_path / "out/points.jsonl").read_text().splitlines())
    assert 1 <= kept <= 2
    assert f"interrupted: {kept} of 3 points are kept in out/points.jsonl" in err
    (tmp_path / "go").touch()
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    again = [sys.executable, "-m", "neustream", *map(str, asked), "-p", "slow_rule:Slow"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{kept} of 3 points are reused" in done.stderr
    assert [entry["value"] for entry in results(tmp_path / "out/sweep.json")] == [10, 400, 20]


def test_processes_end_with_the_command_even_if_it_is_killed(tmp_path):
    path = toy(tmp_path)
    (tmp_path / "slow_rule.py").write_text(SLOW)
    asked = ["sweep", path, *VALUES, "--out", "out", "--jobs", 2, "-p", "slow_rule:Slow"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    running = subprocess.Popen([sys.executable, "-m", "neustream", *map(str, asked)], cwd=tmp_path, env=environment)
    marker = tmp_path / "marker"
    while not (worker := marker.read_text() if marker.exists() else ""):  # each worker empties it, and writes
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    for _ in range(1000):
        if not alive(worker):
            return
        time.sleep(0.01)
    pytest.fail(f"process {worker} is still there")


def alive(process):
    """Whether a process runs: not gone, nor dead and waiting to be noticed."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before, or between opening and reading
        return False


def test_values_that_cannot_be(tmp_path):
    path = toy(tmp_path)
    for values in ("", "x", "1,", "nan", "inf", "1e308", "-1", "1e-300", "9" * 5000):
        done = command("sweep", path, "--over", "workload.rate", "--values", values, "--out", tmp_path / "o")
        assert done.status == 2 and done.err.count("\n") == 1 and len(done.err) < 300, values
    for jobs in ("0", "-1", "1000000", "x"):
        done = command("sweep", path, *VALUES, "--out", tmp_path / "o", "--jobs", jobs)
        assert done.status == 2 and "--jobs" in done.err


def test_what_a_sweep_holds_may_be_anything_that_set_takes(tmp_path):
    at = {"workload.steps": {"min": 2, "max": 2}, "workload.burst": None, "slo.total_s": 1.5}
    path = toy(tmp_path, sweeps={"workload.rate": {"values": [50, 50.0, 60], "at": at}})
    done = command("sweep", path, "--over", "workload.rate", "--out", tmp_path / "o", "--jobs", 1)
    assert done.status == 0, done.err
    assert [entry["value"] for entry in results(tmp_path / "o/sweep.json")] == [50, 60]
    assert yaml.safe_load(path.read_text())["sweeps"]["workload.rate"]["at"] == at
