"""Policies and backends of somebody else that raise, in whatever way and place: one line and exit code 2."""

from __future__ import annotations

import os
import sys

import pytest
from processes import interrupted
from toys import TESTS, adds_up, command, results, toy

from neustream import Decision, PolicyError
from neustream.config import load_experiment
from neustream.experiment import prepare, simulate

RAISES = [
    "raise SystemExit(0)",
    "raise SystemExit('enough')",
    "raise KeyboardInterrupt",
    "raise RecursionError('too deep')",
    "raise MemoryError",
    "raise KeyError('x')",
    "raise Exception",
    "raise OSError(2, 'not here', 'file')",
    "def f(): f()\n    f()",
    "import os; os.nothing",
    "import nothing_of_this_name",
    "assert False",
    "1 / 0",
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'no')",
    "raise ValueError('several\\nlines\\n' * 100)",
]
IDS = range(len(RAISES))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    toy(tmp_path)
    return tmp_path


def refused(*arguments, names):
    done = command(*arguments)
    assert done.status == 2, done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err and len(done.err) < 700
    assert names in done.err
    return done.err


def module(folder, request, text):
    """Write a module of a name that no other test uses."""
    name = f"foreign_{abs(hash(request.node.nodeid))}"
    (folder / f"{name}.py").write_text(text)
    return name


@pytest.mark.parametrize("statement", RAISES, ids=IDS)
def test_a_policy_whose_module_raises(folder, request, statement):
    name = module(folder, request, f"if True:\n    {statement}\n")
    refused("simulate", "toy.yaml", "-p", f"{name}:Policy", names=f"policy '{name}:Policy'")


@pytest.mark.parametrize(
    "text", ["def f(:\n", "\0", "# coding: nothing\n", "x = 'unclosed", "\tif x:\n y", "ü = \udcff"]
)
def test_a_policy_whose_module_is_no_python(folder, request, text):
    name = module(folder, request, "")
    (folder / f"{name}.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused("simulate", "toy.yaml", "-p", f"{name}:Policy", names=f"policy '{name}:Policy'")


@pytest.mark.parametrize("statement", RAISES, ids=IDS)
def test_a_policy_whose_constructor_raises(folder, request, statement):
    name = module(
        folder, request, f"class Policy:\n  def __init__(self):\n    {statement}\n  def decide(self, view): 0\n"
    )
    refused("simulate", "toy.yaml", "-p", f"{name}:Policy", names=f"{name}:Policy")


@pytest.mark.parametrize("name", ["simulate", "run"])
@pytest.mark.parametrize("statement", RAISES, ids=IDS)
def test_a_policy_whose_decide_raises(folder, request, statement, name):
    if "KeyboardInterrupt" in statement and name == "run":
        pytest.skip("an engine that serves takes it for Ctrl-C")
    foreign = module(folder, request, f"class Policy:\n  def decide(self, view):\n    {statement}\n")
    message = refused(
        name, "toy.yaml", "-p", f"{foreign}:Policy", names="KeyboardInterrupt" if "Keyb" in statement else foreign
    )
    assert "decide raised" in message or "KeyboardInterrupt" in statement


@pytest.mark.parametrize(
    "returned", ["None", "3", "[1]", "view.jobs[0]", "object()", "Decision(3)", "Decision([None])"]
)
def test_a_policy_whose_decide_returns_something_else(folder, request, returned):
    text = f"from neustream import Decision\nclass Policy:\n  def decide(self, view):\n    return {returned}\n"
    name = module(folder, request, text)
    refused("simulate", "toy.yaml", "-p", f"{name}:Policy", names="olicy")


def test_what_is_no_policy(folder):
    for path in ("os:nothing", "os:path", "os:sep", "math:pi", "a.b.c:D", "..:x", "a/b:C", ":", "os:", "os:path:join"):
        refused("simulate", "toy.yaml", "-p", path, names="polic")


@pytest.mark.parametrize("statement", RAISES, ids=IDS)
@pytest.mark.parametrize("place", ["import", "make"])
def test_a_backend_that_raises(folder, request, statement, place):
    text = f"if True:\n    {statement}\n" if place == "import" else f"def make(options, device):\n    {statement}\n"
    name = module(folder, request, text)
    kind = f"backend={{kind: '{name}:make'}}"
    refused("run", "toy.yaml", "--set", kind, names="KeyboardInterrupt" if "Keyb" in statement else f"{name}:make")


def test_the_line_in_which_decide_raised_is_named(tmp_path):
    class Divides:
        def decide(self, view):
            return Decision([view.jobs[1 // (view.now - view.now)]])

    with pytest.raises(
        PolicyError, match=r"^policy 'Divides': decide raised ZeroDiv.* \(test_foreign_code\.py, line \d+\)$"
    ):
        simulate(prepare(load_experiment(toy(tmp_path))), Divides())


def test_results_of_other_policies_are_shown_all_the_same(folder):
    done = command("simulate", "toy.yaml", "-p", "fcfs", "-p", "test_cli:Stuck", "-p", "edf", "--json", "r.json")
    assert done.status == 2 and "waiting for ever" in done.err
    assert [entry["policy"] for entry in results(folder / "r.json")] == ["fcfs"]
    assert "fcfs" in done.out


@pytest.mark.parametrize("place", ["load", "step"])
@pytest.mark.parametrize("name", ["profile", "run"])
def test_a_stream_module_that_raises_before_the_work(folder, request, name, place):
    text = f"""
import toy_backend
def make(options, device):
    toy = toy_backend.make(options, device)
    def broken(*args): raise KeyError("broken")
    toy.modules["draw"].{place} = broken
    return toy
"""
    foreign = module(folder, request, text)
    kind = f"backend={{kind: '{foreign}:make'}}"
    refused(
        name,
        "toy.yaml",
        "--set",
        kind,
        *(["--out", "o"] if name == "profile" else []),
        names="raised KeyError: 'broken'",
    )


# -- Ctrl-C ---------------------------------------------------------------------------------------------


def command_interrupted(*arguments, folder, marker):
    """Run the command, press Ctrl-C once there is something in the file `marker`, and return what came of it."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    file = folder / marker
    done = interrupted(
        [sys.executable, "-m", "neustream", *arguments],
        lambda: file.exists() and file.stat().st_size > 0,
        cwd=folder,
        env=environment,
    )
    assert "Traceback" not in done.err
    return done


SLOW = """
import pathlib, time
from neustream import FCFS
class Slow(FCFS):
    def decide(self, view):
        pathlib.Path("marker").write_text("here")
        for _ in range(1200):  # a signal just before a sleep is heard when that ends
            time.sleep(0.05)
"""


def test_control_c_in_simulate_keeps_what_is_done(folder):
    (folder / "slow_policy.py").write_text(SLOW)
    asked = ["simulate", "toy.yaml", "-p", "fcfs", "-p", "slow_policy:Slow", "--json", "r.json"]
    status, out, err = command_interrupted(*asked, folder=folder, marker="marker")
    assert status == 130 and "1 of 2 policies are done" in err
    [entry] = results(folder / "r.json")
    assert entry["policy"] == "fcfs" and adds_up(entry["counts"]) and "fcfs" in out


def test_control_c_before_anything_is_done(folder):
    (folder / "slow_module.py").write_text(
        "import pathlib, time\npathlib.Path('marker').write_text('here')\nfor _ in range(1200): time.sleep(0.05)\n"
    )
    asked = ["simulate", "toy.yaml", "-p", "slow_module:P"]
    status, out, err = command_interrupted(*asked, folder=folder, marker="marker")
    assert (status, out, err.splitlines()[-1]) == (130, "", "interrupted")
