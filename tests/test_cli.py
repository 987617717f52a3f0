"""The command: tables, JSON, traces, figures, and errors of one kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import TESTS, adds_up, command, results, squash, toy, write_profile

from neustream import Decision
from neustream.config import load_experiment
from neustream.engine.trace import REQUEST_BYTES
from neustream.experiment import prepare
from neustream.workload import gamma_arrivals

PAPER = [
    path
    for path in sorted((Path(__file__).parent.parent / "configs/paper").glob("*.yaml"))
    if not path.name.startswith(("opt_", "matplotagent_"))
]
POLICIES = ["serial", "static", "fcfs", "edf", "clockwork", "neustream"]


# -- simulate -------------------------------------------------------------------------------------------


def test_simulate_prints_a_table_and_writes_json(tmp_path):
    path = toy(tmp_path, policies={name: {} for name in POLICIES}, slo={"scale": 3})
    done = command("simulate", path, "--json", tmp_path / "deep/out.json")
    assert done.status == 0
    assert "toy: gamma 200 req/s, cv 1, SLO 3x solo, seed 0" in done.out
    rows = [line.split()[0] for line in done.out.splitlines() if line.split()]
    assert [row for row in rows if row in POLICIES] == POLICIES
    assert max(len(line) for line in done.out.splitlines()) <= 80
    entries = results(tmp_path / "deep/out.json")
    assert [entry["policy"] for entry in entries] == POLICIES
    for entry in entries:
        assert {
            "policy",
            "config",
            "seed",
            "duration_s",
            "counts",
            "goodput_rps",
            "attainment",
            "latency_s",
            "batch_size",
            "decisions",
            "decision_us",
        } <= entry.keys()
        assert list(entry["counts"]) == ["submitted", "on_time", "late", "dropped", "failed", "cancelled"]
        assert list(entry["latency_s"]) == ["mean", "p50", "p90", "p99"]
        assert list(entry["decision_us"]) == ["p50", "p99"]
        assert (entry["config"], entry["seed"], entry["counts"]["submitted"]) == ("toy", 0, 10)
        assert adds_up(entry["counts"])
        assert entry["batch_size"].keys() <= {"draw", "decode"}
        assert entry["decisions"] > 0


def test_policies_come_in_the_order_asked_and_once(tmp_path):
    done = command("simulate", toy(tmp_path), "-p", "neustream", "--policy", "serial", "-p", "neustream", "--json",
                   tmp_path / "out.json")  # fmt: skip
    assert done.status == 0
    assert [entry["policy"] for entry in results(tmp_path / "out.json")] == ["neustream", "serial"]


def test_a_policy_of_ones_own_by_name(tmp_path):
    done = command("simulate", toy(tmp_path), "-p", "toys:Newest", "--json", tmp_path / "out.json")
    assert done.status == 0
    assert results(tmp_path / "out.json")[0]["policy"] == "toys:Newest"


KEYS = {
    "workload.rate": ("2.5", lambda e: e.workload.rate == 2.5),
    "workload.cv": ("3", lambda e: e.workload.cv == 3.0),
    "slo.scale": ("5", lambda e: e.slo.scale == 5.0),
    "workload.seed": ("7", lambda e: e.workload.seed == 7),
    "workload.requests": ("9", lambda e: e.workload.requests == 9),
}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_documented_keys_can_be_set_on_every_paper_config(tmp_path, path):
    for key, (value, is_set) in KEYS.items():
        setting = ["--set", "workload.requests=6", "--set", f"{key}={value}"]
        assert command("simulate", path, *setting, "-p", "fcfs", "--json", tmp_path / "out.json").status == 0
        [entry] = results(tmp_path / "out.json")
        assert entry["counts"]["submitted"] == (9 if key == "workload.requests" else 6)
        assert entry["seed"] == (7 if key == "workload.seed" else 0)
        assert is_set(load_experiment(path, [f"{key}={value}"]))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_documented_keys_have_their_effect_together(tmp_path, path):
    settings = [f"{key}={value}" for key, (value, _) in KEYS.items()]
    prepared = prepare(load_experiment(path, settings))
    arrivals = [request.arrival for request in prepared.requests]
    assert arrivals == gamma_arrivals(9, rate=2.5, cv=3.0, seed=7).tolist()
    original = prepare(load_experiment(path, ["workload.seed=7", "workload.requests=9"]))
    for ours, theirs in zip(prepared.requests, original.requests, strict=True):
        assert ours.params == theirs.params
        assert ours.slo.total == pytest.approx(theirs.slo.total * 5.0 / load_experiment(path).slo.scale)
    done = command("simulate", path, *(f"--set={setting}" for setting in settings), "--json", tmp_path / "out.json")
    assert done.status == 0
    assert [entry["policy"] for entry in results(tmp_path / "out.json")] == list(load_experiment(path).policies)


def test_a_trace_a_policy(tmp_path):
    done = command("simulate", toy(tmp_path), "-p", "fcfs", "-p", "toys:Newest", "--trace", tmp_path / "t.json")
    assert done.status == 0
    assert sorted(path.name for path in tmp_path.glob("t*.json")) == ["t-fcfs.json", "t-toys.Newest.json"]
    for path in tmp_path.glob("t*.json"):
        kinds = {event["ph"] for event in results(path)["traceEvents"]}
        assert kinds == {"M", "X", "b", "e", "C"}


@pytest.mark.parametrize("what", ["simulate", "run"])
def test_a_disk_without_room_for_traces_is_told_before_anything_is_served(tmp_path, monkeypatch, what):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=10**9, free=4 * 10**5))
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 1000, "requests": 500, "steps": 1})
    done = command(what, path, "-p", "fcfs", "-p", "serial", "--trace", tmp_path / "t.json")
    assert done.status == 2 and squash("at least 0.5 MB are needed, 0.4 MB are free") in squash(done.err), done.err
    assert not list(tmp_path.glob("t-*"))


def test_no_trace_is_smaller_than_is_thought_beforehand(tmp_path):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 1, "requests": 100, "steps": 0})
    assert command("simulate", path, "-p", "fcfs", "--trace", tmp_path / "t.json").status == 0
    assert (tmp_path / "t.json").stat().st_size > 100 * REQUEST_BYTES


def test_the_trace_of_one_policy_has_the_name_asked_for(tmp_path):
    assert command("simulate", toy(tmp_path), "--trace", tmp_path / "t.json").status == 0
    assert [path.name for path in tmp_path.glob("t*.json")] == ["t.json"]


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"slo": {"classes": [{"scale": 2}]}}, "SLO classes"),
        ({"slo": {"total_s": 0.5}}, "SLO 0.5 s"),
        ({"workload": {"load": 1.5}}, "gamma 1.5x solo load, cv 1"),
        ({"workload": {"arrivals": "constant", "rate": 7}}, "constant 7 req/s, SLO"),
        ({"workload": {"trace": "t.csv", "steps": 3}}, "toy: trace t.csv, SLO"),
        ({"workload": {"trace": "t.csv", "steps": 3, "speed": 2}}, "toy: trace t.csv at 2x speed, SLO"),
    ],
)
def test_the_title_says_what_was_run(tmp_path, changes, title):
    (tmp_path / "t.csv").write_text("arrival_s\n1\n2\n")
    done = command("simulate", toy(tmp_path, **changes))
    assert done.status == 0
    assert title in done.out


def test_the_module_can_be_run():
    asked = [sys.executable, "-m", "neustream.cli", "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    for name in ("simulate", "sweep", "profile", "run"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["[bold]x[/nope]", "[red]", ":smile:", "a: [b", "x" * 200, "ü"])
def test_a_name_is_shown_as_it_is(tmp_path, name):
    done = command("simulate", toy(tmp_path, name=name))
    assert done.status == 0, done.err
    assert squash(name) in squash(done.out)


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x1b[31mred", "\x85"])
def test_a_name_that_cannot_be_shown(tmp_path, name):
    done = command("simulate", toy(tmp_path, name=name))
    assert done.status == 2 and ": name: String should" in done.err and done.err.count("\n") == 1


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "nowhere.yaml"], "ConfigError: nowhere.yaml: No such file or directory"),
        (["simulate", "toy.yaml", "-p", "fcsf"], "ConfigError: toy.yaml: unknown policy 'fcsf'; did you mean 'fcfs'?"),
        (["simulate", "toy.yaml", "--set", "workload.ratee=1"], "ConfigError: toy.yaml: unknown key 'workload.ratee'"),
        (["simulate", "toy.yaml", "--set", "workload.rate"], "ConfigError: --set 'workload.rate': expected"),
        (["simulate", "toy.yaml", "--set", "workload.rate=x"], "ConfigError: toy.yaml: workload.rate: Input should be"),
        (["simulate", "toy.yaml", "--set", "profiles=nowhere"], "ProfileError: no profile at"),
        (["simulate", "toy.yaml", "--set", "workload.trace=t.csv"], "t.csv: No such file or directory"),
        (["simulate", "toy.yaml", "-s", "stages.draw.max_batch=9"], ""),
        (["sweep", "toy.yaml", "--over", "workload.rat", "--out", "o"], "ConfigError: cannot sweep 'workload.rat'"),
        (["sweep", "toy.yaml", "--over", "slo.scale", "--out", "o"], "ConfigError: toy.yaml has no sweep over slo.sca"),
        (
            ["sweep", "toy.yaml", "--over", "slo.scale", "--values", "2", "--out", "o"],
            "ConfigError: toy.yaml: cannot sweep slo.scale: config 'toy' does not use it",
        ),
        (
            ["sweep", "toy.yaml", "--over", "workload.rate", "--values", "1,x", "--out", "o"],
            "ConfigError: --values '1,x': expected numbers separated by commas",
        ),
        (
            ["sweep", "toy.yaml", "--over", "workload.rate", "--values", "0", "--out", "o"],
            "ConfigError: toy.yaml: cannot sweep workload.rate: rate: Input should be greater than or equal to",
        ),
        (
            ["profile", "toy.yaml", "--set", "backend=null", "--out", "o"],
            "ConfigError: toy.yaml: config 'toy' has no backend",
        ),
        (["run", "toy.yaml", "--set", "backend.reject=3"], "BackendError: request 'toy-3': number must not be 3"),
    ],
)
def test_errors_are_status_2_and_a_message(tmp_path, monkeypatch, arguments, message):
    toy(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.status == (2 if message else 0)
    assert squash(message) in squash(done.err)
    assert "Traceback" not in done.err
    if message:
        assert done.out == ""


def test_an_error_is_one_line_on_stderr(tmp_path):
    asked = [sys.executable, "-m", "neustream.cli", "simulate", "nowhere.yaml"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "ConfigError: nowhere.yaml: No such file or directory\n"


@pytest.mark.parametrize("arguments", [["simulate"], ["simulatte", "x"], ["simulate", "x", "--polcy", "y"], ["sweep"]])
def test_wrong_usage_is_status_2(arguments):
    done = command(*arguments)
    assert done.status == 2
    assert "Usage:" in done.err


# -- sweep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "values"), [("workload.rate", "50,400"), ("workload.cv", "1,3"), ("slo.scale", "2,6")]
)
def test_a_sweep_writes_its_points_and_figures(tmp_path, over, values):
    path, out = toy(tmp_path, slo={"scale": 3}), tmp_path / "new/out"
    done = command("sweep", path, "--over", over, "--values", values, "--out", out, "-p", "serial", "-p", "neustream")
    assert done.status == 0, done.err
    entries = results(out / "sweep.json")
    points = [float(value) for value in values.split(",")]
    asked = [(point, policy) for point in points for policy in ("serial", "neustream")]
    assert [(entry["value"], entry["policy"]) for entry in entries] == asked
    assert all(entry["over"] == over and adds_up(entry["counts"]) for entry in entries)
    assert entries[0]["latency_s"] != entries[2]["latency_s"] or over == "slo.scale"
    for name in ("goodput", "attainment", "batches"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert squash(f"wrote {out / name}.png") in squash(done.out)
    assert "requests on time of 10" in done.out


def test_a_sweep_of_the_configs_own_values_holds_its_other_keys(tmp_path):
    sweeps = {"workload.cv": {"values": [1, 2, 3], "at": {"workload.rate": 40}}}
    path = toy(tmp_path, sweeps=sweeps)
    assert command("sweep", path, "--over", "workload.cv", "--out", tmp_path / "a").status == 0
    own = results(tmp_path / "a/sweep.json")
    assert [entry["value"] for entry in own] == [1, 2, 3]
    assert (
        command("simulate", path, "-s", "workload.cv=3", "-s", "workload.rate=40", "--json", tmp_path / "b").status == 0
    )
    [alone] = results(tmp_path / "b")
    assert alone["latency_s"] == own[-1]["latency_s"]
    # what the caller sets goes before what the sweep holds
    assert (
        command("sweep", path, "--over", "workload.cv", "-s", "workload.rate=400", "--out", tmp_path / "c").status == 0
    )
    assert results(tmp_path / "c/sweep.json")[-1]["duration_s"] < own[-1]["duration_s"]


def test_a_sweep_of_load(tmp_path):
    path = toy(tmp_path, workload={"load": 1, "requests": 10, "steps": 3})
    done = command("sweep", path, "--over", "workload.load", "--values", "0.5,2", "--out", tmp_path / "out")
    assert done.status == 0
    slow, fast = results(tmp_path / "out/sweep.json")
    assert slow["duration_s"] > fast["duration_s"]


# -- profile and run ------------------------------------------------------------------------------------


def test_profile_and_then_run_with_what_was_measured(tmp_path):
    path = toy(tmp_path, backend={"kind": "toy_backend:make", "step_s": 0.001}, policies={"fcfs": {}, "serial": {}})
    done = command("profile", path, "--out", tmp_path / "new", "--repeats", 3, "--warmup", 1)
    assert done.status == 0, done.err
    assert "toy on toy device" in done.out and results(tmp_path / "new/draw.json")["engine"]["load_s"] > 0
    rows = [line.split()[:2] for line in done.out.splitlines() if line.split()[:1] in (["draw"], ["decode"])]
    assert rows == [["draw", "1"], ["draw", "2"], ["draw", "3"], ["draw", "4"], ["decode", "1"], ["decode", "2"]]
    done = command("run", path, "--set", f"profiles={tmp_path / 'new'}", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    assert "served/simulated" in done.out
    served = results(tmp_path / "out.json")
    assert [entry["policy"] for entry in served] == ["fcfs", "serial"]
    for entry in served:
        assert entry["counts"]["submitted"] == entry["simulated"]["counts"]["submitted"] == 10
        assert adds_up(entry["counts"])
        assert entry["simulated"]["policy"] == entry["simulated_as_observed"]["policy"] == entry["policy"]
        assert adds_up(entry["simulated_as_observed"]["counts"])
        observed = entry["simulated_as_observed"]["attainment"]
        assert entry["error_as_observed"]["points"] == 100 * (entry["attainment"] - observed)
        assert entry["error"]["points"] == 100 * (entry["attainment"] - entry["simulated"]["attainment"])
        assert entry["error"]["p50"] == entry["simulated"]["latency_s"]["p50"] / entry["latency_s"]["p50"] - 1
        assert "interrupted" not in entry
    assert "how far the simulator was off" in done.out and "serial, as observed" in done.out


def test_policies_on_one_and_the_same_device(tmp_path):
    path = toy(tmp_path, backend={"kind": "toy_backend:make", "step_s": 0.004}, policies={"fcfs": {}, "serial": {}})
    done = command("run", path, "--same-device", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    served = results(tmp_path / "out.json")
    assert [list(entry["on_time_on_device_of"]) for entry in served] == [["fcfs", "serial"]] * 2
    for entry in served:  # its own device is the one it was observed on
        observed = entry["simulated_as_observed"]["counts"]["on_time"]
        assert entry["on_time_on_device_of"][entry["policy"]] == observed
        share = sum(entry["on_time_on_device_of"].values()) / (2 * entry["counts"]["submitted"])
        assert [line.split()[-1] for line in done.out.splitlines() if line.split()[:1] == [entry["policy"]]].count(
            f"{share:.1%}"
        )
    assert "the same device for all" in done.out


def test_run_writes_a_folder_of_results(tmp_path):
    out = tmp_path / "new/out"
    done = command("run", toy(tmp_path), "-p", "fcfs", "-p", "serial", "--out", out)
    assert done.status == 0, done.err
    assert sorted(path.name for path in out.iterdir()) == [
        "report.json",
        "served.png",
        "trace-fcfs.json",
        "trace-serial.json",
    ]
    assert [entry["policy"] for entry in results(out / "report.json")] == ["fcfs", "serial"]
    assert (out / "served.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_run_refuses_a_policy_that_plans_with_other_profiles(tmp_path):
    path = toy(tmp_path)
    done = command("run", path, "-p", "clockwork", "--set", "policies.clockwork.plan={draw: [draw]}")
    assert done.status == 2
    assert "policies.clockwork.plan: profiles to plan with are for simulations" in done.err


def test_run_with_several_devices(tmp_path):
    path = toy(tmp_path, devices=["toy:0", "toy:1"])
    done = command("run", path, "--json", tmp_path / "out.json", "--trace", tmp_path / "t.json")
    assert done.status == 0, done.err
    assert results(tmp_path / "out.json")[0]["counts"]["on_time"] == 10
    steps = [event for event in results(tmp_path / "t.json")["traceEvents"] if event["ph"] == "X"]
    assert {event["name"].partition(" ")[0] for event in steps} == {"draw", "decode"}


def test_profiles_of_another_device_are_refused_unless_allowed(tmp_path):
    path = toy(tmp_path)
    for name, batch in (("draw", [1, 4]), ("decode", [1, 2])):
        write_profile(tmp_path / f"profiles/{name}.json", name, batch, [0.001, 0.002], device="a better device")
    done = command("run", path)
    assert done.status == 2
    expected = "ProfileError: profile 'draw' is of 'a better device', but cpu is 'toy device': measure it here with"
    assert squash(expected) in squash(done.err)
    done = command("run", path, "--set", "backend.allow_other_device=true", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    assert adds_up(results(tmp_path / "out.json")[0]["counts"])


def test_the_command_finds_backends_of_ones_own_on_the_path(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    asked = [sys.executable, "-m", "neustream.cli", "run", str(toy(tmp_path)), "--json", "out.json"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out.json")[0]["counts"]["submitted"] == 10


class Stuck:
    """A policy that breaks its contract."""

    def decide(self, view):
        return Decision()


def test_a_policy_that_breaks_does_not_take_the_results_of_others_with_it(tmp_path):
    path = toy(tmp_path, backend={"kind": "toy_backend:make", "step_s": 0.001})
    results = tmp_path / "r.json"
    done = command("run", path, "-p", "fcfs", "-p", "test_cli:Stuck", "-p", "edf", "--json", results)
    assert done.status == 2 and "waiting for ever" in done.err
    assert [entry["policy"] for entry in json.loads(results.read_text())] == ["fcfs"]
