"""What the shell offers when Tab is pressed, asked as shells ask; and how it is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from toys import TESTS, toy

from neustream.commands.completing import configs, sweepable
from neustream.config.schema import SWEEPABLE
from neustream.core.policies import POLICIES

MAIN = "import sys; sys.argv = ['neustream', *sys.argv[1:]]; from neustream.cli import main; main()"


def neustream(folder, *arguments, **environment):
    """Call the command in a process of its own, with no home but `folder`."""
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    more = {"HOME": str(folder), "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True, text=True, cwd=folder, env={**os.environ, **more},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def offered(folder, line):
    """What bash is told for a command line that ends where Tab is pressed."""
    words = line.split(" ")
    done = neustream(folder, _NEUSTREAM_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path):
    toy(tmp_path, policies={"fcfs": {}, "toys:Newest": {}})
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.yaml").touch()
    return tmp_path


def test_commands_and_options(folder):
    assert offered(folder, "neustream s") == ["simulate", "sweep", "serve"]
    assert "--hindsight" in offered(folder, "neustream simulate toy.yaml --h")


def test_configs(folder, monkeypatch):
    assert offered(folder, "neustream simulate ") == ["profiles/", "toy.yaml"]
    assert offered(folder, "neustream models t") == ["toy.yaml"]
    monkeypatch.chdir(folder)
    assert configs("profiles/") == [] and configs("nowhere/x") == [] and configs("toy.yaml/x") == []
    assert configs(".h") == [".hidden.yaml"] and configs(f"{folder}/t") == [f"{folder}/toy.yaml"]


def test_policies(folder):
    found = offered(folder, "neustream simulate toy.yaml -p ")
    assert set(found) == {*POLICIES, "default", "toys:Newest"}
    assert offered(folder, "neustream simulate toy.yaml --policy neu") == ["neustream", "neustream_llm"]
    assert offered(folder, "neustream simulate nowhere.yaml -p pric") == ["priced"]


def test_keys(folder):
    assert offered(folder, "neustream simulate toy.yaml --set workload.r") == ["workload.requests=", "workload.rate="]
    assert offered(folder, "neustream simulate toy.yaml -s stages.d") == ["stages.draw.", "stages.decode."]
    assert "stages.draw.max_batch=" in offered(folder, "neustream simulate toy.yaml -s stages.draw.")
    assert offered(folder, "neustream simulate toy.yaml -s workload.rate=") == []
    assert "llm." not in offered(folder, "neustream simulate toy.yaml -s l")


def test_what_may_be_swept():
    assert sweepable("") == list(SWEEPABLE) and sweepable("workload.c") == ["workload.cv"]


def test_zsh_and_fish_ask_in_another_way(folder):
    for shell in ("zsh", "fish"):
        done = neustream(
            folder, **{
                "_NEUSTREAM_COMPLETE": f"complete_{shell}",
                "_TYPER_COMPLETE_ARGS": "neustream simulate toy.yaml --policy edf",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
        )  # fmt: skip
        assert done.returncode == 0 and "edf" in done.stdout


def test_it_can_be_installed(folder):
    done = neustream(folder, "--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "bash completion installed" in done.stdout
    script = next((folder / ".bash_completions").iterdir())
    assert script.name == "neustream.sh" and "_NEUSTREAM_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (folder / ".bashrc").read_text()


def test_it_can_be_shown(folder):
    done = neustream(folder, "--show-completion", "zsh", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and "_NEUSTREAM_COMPLETE=complete_zsh" in done.stdout
