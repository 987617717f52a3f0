"""Files that commands write are checked before the work begins; results may go to stdout alone."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from toys import TESTS, command, squash, toy

from neustream import cli
from neustream.commands import outputs
from neustream.commands.outputs import append_line, check_outputs, write_text
from neustream.errors import ConfigError


@pytest.fixture
def idle(monkeypatch):
    """To begin with the work fails the test."""
    for name, work in (
        ("simulate", "prepare"),
        ("run", "Session"),
        ("sweep", "run_units"),
        ("profile", "measure_experiment"),
    ):
        monkeypatch.setattr(
            importlib.import_module(f"neustream.commands.{name}"), work, lambda *args: pytest.fail("it began to work")
        )


PLACES = {
    "a folder": ("folder", "is a directory"),
    "under a file": ("file/x.json", "file is not a directory"),
    "far under a file": ("file/a/b/x.json", "file is not a directory"),
    "a long name": ("x" * 300, "file name too long"),
    "read-only": ("/proc/version/x", "not a directory"),
    "nowhere": ("/proc/nowhere/x", "no such file or directory"),
    "a loop": ("loop/x", "ymlink"),
    "a pipe that nobody reads": ("pipe", "is a named pipe, which waits for a reader"),
}
OPTIONS = {
    "simulate --json": ["simulate", "toy.yaml", "--json"],
    "simulate --trace": ["simulate", "toy.yaml", "--trace"],
    "run --json": ["run", "toy.yaml", "--json"],
    "run --trace": ["run", "toy.yaml", "--trace"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_that_cannot_be_written_is_told_first(here, idle, option, place):
    path, why = PLACES[place]
    done = command(*OPTIONS[option], path)
    assert done.status == 2 and done.out == ""
    assert f"{option.split()[1]} {path}: " in done.err and why in done.err.lower()
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "toy.yaml", "--over", "workload.rate", "--values", "1", "--out"],
        ["run", "toy.yaml", "--out"],
        ["profile", "toy.yaml", "--out"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(
    ("out", "why"), [("file", "is no folder"), ("file/deep", "ot a directory"), ("-", "give a fo")]
)
def test_a_folder_that_cannot_be_made_is_told_first(here, idle, arguments, out, why):
    done = command(*arguments, out)
    assert done.status == 2 and "--out " in done.err and why in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["report.json", "served.png", "trace.json"])
def test_a_folder_in_the_place_of_a_file(here, idle, name):
    (here / "out" / name).mkdir(parents=True)
    done = command("run", "toy.yaml", "--out", "out")
    assert done.status == 2 and f"out/{name}: is a directory" in done.err


def test_two_options_do_not_go_to_one_file(here, idle):
    done = command("simulate", "toy.yaml", "--json", "x.json", "--trace", "folder/../x.json")
    assert done.status == 2 and "--trace folder/../x.json: --json goes to the same file" in done.err
    check_outputs([("--json", here / "/dev/null"), ("--trace", here / "/dev/null")])


def test_checking_leaves_no_file_behind_and_changes_none(here):
    (here / "old.json").write_text("old")
    check_outputs([("--json", here / "old.json"), ("--trace", here / "new/deep/x.json")])
    assert (here / "old.json").read_text() == "old"
    assert list((here / "new/deep").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_write_protected(here):
    (here / "old.json").touch(0o400)
    (here / "folder").chmod(0o500)
    for path in (here / "old.json", here / "folder/x.json"):
        with pytest.raises(ConfigError, match="permission denied"):
            check_outputs([("--json", path)])


def test_a_file_is_replaced_in_one_go_and_links_stay(here):
    (here / "link.json").symlink_to("folder/real.json")
    write_text(here / "link.json", "one")
    write_text(here / "link.json", "two")
    assert (here / "folder/real.json").read_text() == "two"
    assert (here / "link.json").is_symlink()
    assert len(list((here / "folder").iterdir())) == 1


# -- results on stdout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simulate", "run"])
def test_results_on_stdout_are_alone_there(tmp_path, name):
    (tmp_path / "chatty.py").write_text(
        "import os\nfrom neustream import FCFS\n"
        "print('from Python'); os.write(1, b'from below\\n')\n"
        "class Chatty(FCFS):\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    asked = [sys.executable, "-m", "neustream", name, str(toy(tmp_path)), "-p", "chatty:Chatty", "--json", "-"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert [entry["policy"] for entry in json.loads(done.stdout)] == ["chatty:Chatty"]
    for text in ("from Python", "from below", "toy: gamma 200 req/s"):
        assert text in done.stderr


def test_only_results_go_to_stdout(here):
    done = command("simulate", "toy.yaml", "--json", "-")
    assert done.status == 0
    assert json.loads(done.out)[0]["policy"] == "fcfs"
    assert squash("toy: gamma 200 req/s") in squash(done.err)
    done = command("simulate", "toy.yaml", "--trace", "-")
    assert done.status == 2 and "--trace -: only --json can go to stdout" in done.err


def test_an_error_leaves_stdout_empty(here):
    done = command("simulate", "toy.yaml", "-p", "fcsf", "--json", "-")
    assert (done.status, done.out) == (2, "")


def test_a_reader_that_has_seen_enough(tmp_path):
    asked = f"{sys.executable} -m neustream simulate {toy(tmp_path)} --json - | head -c 1"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[" and "Traceback" not in done.stderr


def test_ctrl_c_while_modules_are_imported_is_one_word(monkeypatch, capsys):
    def pressed(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "application", pressed)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line(here):
    done = command("simulate", "toy.yaml", "--json", "/dev/full")
    assert done.status == 2 and "/dev/full: No space left on device" in done.err
    assert "goodput" in done.out, "the table is shown first"


def test_a_full_disk_is_told_before_the_work_begins(tmp_path):
    """A limit on the size of files stands for a disk on which nothing more fits."""
    (tmp_path / "old.json").write_text("what was there")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("new.json", "old.json"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            with pytest.raises(ConfigError, match=f"--out .*{name}: file too large"):
                check_outputs([("--out", tmp_path / name)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "what was there"


def test_lines_that_are_added_at_the_same_time_are_all_there(tmp_path):
    path = tmp_path / "new" / "all.json"
    lines = [str(at) * 20_000 for at in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda line: append_line(path, line), lines))
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "all.json"
    path.write_text("{}")  # whose line does not end
    append_line(path, "[1]")
    write, calls = os.write, []

    def short(number, data):
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(number, data[:2])

    monkeypatch.setattr(outputs.os, "write", short)
    with pytest.raises(OSError, match="No space left") as error:
        append_line(path, "[2, 3]")
    monkeypatch.undo()
    assert len(calls) == 2 and error.value.filename == str(path) and path.read_text() == "{}\n[1]\n"
