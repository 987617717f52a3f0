"""What all commands share: quiet, JSON on stdout, exit codes; and `models`, which only one has."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from toys import TESTS, command, squash, toy

from neustream.cli import COMMANDS
from neustream.commands import printing

TRACE = "arrival_s,steps\n0,2\n1,3\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy(tmp_path, slo={"scale": 3})
    (tmp_path / "t.csv").write_text(TRACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALLS = {
    "simulate": ["simulate", "toy.yaml", "--trace", "new/trace.json"],
    "sweep": ["sweep", "toy.yaml", "--over", "slo.scale", "--values", "2,6", "--jobs", "1", "--out", "new"],
    "plan": ["plan", "toy.yaml", "--set", "cluster={instances: 2}", "--figure", "new/plan.png"],
    "models": ["models", "toy.yaml"],
    "profile": ["profile", "toy.yaml", "--repeats", "3", "--warmup", "0", "--out", "new"],
    "trace": ["trace", "t.csv", "--out", "new/t.jsonl"],
    "run": ["run", "toy.yaml", "--out", "new"],
}


def test_each_command_is_tried():
    assert set(CALLS) == set(COMMANDS) - {"serve", "client", "cluster", "bench"}, (
        "those have tests/server/ and tests/bench/"
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", CALLS)
def test_quiet_prints_nothing_and_writes_the_same_files(here, name):
    loud = command(*CALLS[name])
    assert loud.status == 0 and loud.out
    written = names(here / "new")
    for path in (here / "new").glob("*"):
        path.unlink()
    done = command(*CALLS[name], "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert names(here / "new") == written
    assert not printing.console.quiet and not printing.notes.quiet


@pytest.mark.parametrize("name", CALLS)
def test_json_on_stdout_is_alone_there(here, name):
    done = command(*CALLS[name], "--json", "-")
    assert done.status == 0, done.err
    said = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert said and done.err
    quiet = command(*CALLS[name], "--json", "-", "-q")
    assert quiet.err == "" and type(json.loads(quiet.out)) is type(said)


def test_quiet_tells_what_is_wrong(here):
    done = command("simulate", "toy.yaml", "-q", "--set", "workload.rate=-1")
    assert done.status == 2 and done.out == "" and "workload.rate" in done.err


def test_json_of_a_sweep_and_of_a_profile_is_what_the_files_hold(here):
    sweep = json.loads(command(*CALLS["sweep"], "--json", "-", "-q").out)
    assert sweep == json.loads((here / "new/sweep.json").read_text())
    profile = json.loads(command(*CALLS["profile"], "--json", "-", "-q").out)
    assert [one.pop("file") for one in profile] == ["new/draw.json", "new/decode.json"]
    assert profile == [json.loads((here / f"new/{name}.json").read_text()) for name in ("draw", "decode")]


def test_a_sweep_says_the_unit_of_what_it_varies(here):
    done = command("sweep", "toy.yaml", "--over", "workload.rate", "--values", "9", "--out", "new")
    assert "workload.rate, requests/s" in done.out


# -- exit codes -------------------------------------------------------------------------------------


def test_the_exit_codes_are_in_every_help():
    for arguments in ([], *([name] for name in COMMANDS)):
        done = command(*arguments, "--help")
        assert done.status == 0
        for code in ("0 all went well", "1 a fault", "2 wrong arguments", "130 interrupted", "141 whoever"):
            assert squash(code) in squash(done.out), arguments


def test_a_fault_of_the_library_is_status_1_with_its_traceback(here):
    code = (
        "import sys; sys.argv = ['neustream', 'simulate', 'toy.yaml']\n"
        "import neustream.commands.simulate as it\n"
        "it.prepare = lambda experiment: 1 / 0\n"
        "from neustream.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_reader_that_has_seen_enough_is_status_141(here):
    script = f"{sys.executable} -m neustream trace t.csv --json - | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 141 and "Traceback" not in done.stderr


# -- models -----------------------------------------------------------------------------------------


def test_models_says_what_is_measured_and_what_is_missing(here):
    done = command("models", "toy.yaml", "--json", "out.json")
    assert done.status == 0, done.err
    assert "toy: draw x steps -> decode" in done.out
    assert "weights: what backend 'toy_backend:make' builds is its own" in done.out
    (model,) = json.loads((here / "out.json").read_text())
    assert (model["name"], model["kind"], model["instances"]) == ("toy", "stages", 1)
    draw, decode = model["stages"]
    assert (draw["stage"], draw["max_batch"], draw["pool"], draw["missing"]) == ("draw", 4, "gpu", [])
    assert draw["latency_s"] == {"1": 0.002, "2": 0.0025, "4": 0.003} and draw["device"] == "toy device"
    (here / "profiles/decode.json").unlink()
    done = command("models", "toy.yaml", "--json", "out.json")
    assert done.status == 0 and "missing in profiles: decode; `neustream profile CONFIG" in done.out
    draw, decode = json.loads((here / "out.json").read_text())[0]["stages"]
    assert draw["latency_s"] and decode["latency_s"] == {} and decode["missing"] == ["profiles/decode.json"]


def test_models_goes_no_further_than_the_stage_and_its_profile(here):
    done = command("models", "toy.yaml", "--set", "stages.draw.max_batch=3", "--json", "-", "-q")
    assert list(json.loads(done.out)[0]["stages"][0]["latency_s"]) == ["1", "2"]


def test_models_of_a_language_model(root):
    path = root / "configs/paper/opt_13b_a6000.yaml"
    done = command("models", path, "--set", "backend=null", "--set", "devices=2")
    assert done.status == 0, done.err
    assert "opt_13b_a6000: llm.prefill -> llm.decode until it ends, 2 instances" in done.out
    assert "KV cache of llm: 1,300 blocks of 16 tokens, 20,800 in all" in done.out
    assert "profiles of NVIDIA RTX A6000" in done.out
    (model,) = json.loads(command("models", path, "--set", "backend=null", "--json", "-", "-q").out)
    prefill, decode = model["stages"]
    assert prefill["latency_s"].keys() == {"1"} and decode["latency_s"].keys() == {"1", "256"}
    assert (prefill["size"], decode["size"]) == (70, 145)


@pytest.mark.parametrize("name", ["sd15_512_h100", "opt_66b_a6000"])
def test_the_tables_of_models_fit_a_terminal(root, name):
    done = command("models", root / f"configs/paper/{name}.yaml", "--set", "backend=null")
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_models_tells_a_profile_that_is_malformed(here):
    (here / "profiles/draw.json").write_text("{}")
    done = command("models", "toy.yaml")
    assert done.status == 2 and "ProfileError: profiles/draw.json: " in done.err
