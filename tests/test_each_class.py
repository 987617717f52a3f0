"""The runner of the sweeps over classes: what is said of each, what is kept, what is tried again."""

from __future__ import annotations

import json
import multiprocessing
import sys

import pytest
import toy_checks

OUTCOMES = {
    "shared": "batched",
    "apart": "exact",
    "refused": "refused",
    "other_alone": "wrong",
    "other_together": "wrong",
    "nan": "wrong",
    "late": "hung",
    "fails": "crashed",
    "dies": "crashed",
    "unbuildable": "not built",
    "broken": "not built",
    "stock_dies": "not built",
}


@pytest.fixture(scope="module")
def runner(root):
    sys.path.insert(0, str(root / "benchmarks"))
    import each_class

    yield each_class
    sys.path.remove(str(root / "benchmarks"))


@pytest.fixture
def sweep(runner, tmp_path):
    def make(*names, **about):
        return runner.Sweep("Toys", "python toys.py", toy_checks.check, names, about, tmp_path / "out" / "toys")

    return make


def test_every_outcome_is_told_from_the_others_and_written(runner, sweep, tmp_path):
    rows = runner.run(sweep(*OUTCOMES), jobs=3)
    assert {name: row.outcome for name, row in rows.items()} == OUTCOMES
    assert rows["broken"].detail == "build: ValueError: a bad configuration"
    assert rows["refused"].detail == "its cache is none"
    assert rows["dies"].detail.startswith("serve: the process died with 4")
    assert rows["shared"].batch == 2.5
    kept = json.loads((tmp_path / "out/toys.json").read_text())
    assert kept["counts"] == {
        "batched": 1,
        "exact": 1,
        "refused": 1,
        "wrong": 3,
        "hung": 1,
        "crashed": 2,
        "not built": 3,
    }
    table = (tmp_path / "out/toys.md").read_text()
    assert "| other_together | wrong | 2.0e-03 | 2.00 |" in table
    assert "12 of 12 classes tried, 9 built" in table


def test_what_is_known_is_not_tried_again_unless_asked_for(runner, sweep, capsys):
    runner.run(sweep("apart", "fails"))
    capsys.readouterr()
    rows = runner.run(sweep("apart", "fails", "refused"), again=["crashed"])
    assert set(rows) == {"apart", "fails", "refused"}
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["fails:", "refused:"]
    runner.run(sweep("apart", "fails"), only=["apart"])
    assert capsys.readouterr().out.startswith("1/1 apart: exact")


def test_results_of_other_versions_are_not_mixed_with_new_ones(runner, sweep, capsys):
    runner.run(sweep("apart", versions="1"))
    rows = runner.run(sweep("apart", "refused", versions="2"), only=["refused"])
    assert set(rows) == {"refused"}
    assert "is of another sweep" in capsys.readouterr().err


def test_a_hang_in_our_part_is_ours(runner, sweep, tmp_path):
    context = multiprocessing.get_context("forkserver")
    one = runner._Try(sweep("hangs"), "hangs", context, tmp_path)
    while one.phase != "serve":
        assert one.poll() is None
    one.limit_s = 0.0  # its time is up
    row = one.poll()
    assert (row.outcome, row.detail) == ("hung", "serve: not done in 0 s")
    assert not one.process.is_alive()


def test_a_hang_of_the_outside_world_is_not(runner, sweep, tmp_path):
    context = multiprocessing.get_context("forkserver")
    one = runner._Try(sweep("hangs"), "hangs", context, tmp_path)
    one.limit_s = 0.0
    one.pipe.poll = lambda: False  # nothing heard of it yet
    assert one.poll().outcome == "not built"


def test_names_and_outcomes_are_checked_first(runner, sweep):
    with pytest.raises(ValueError, match="no class 'aprat' in this sweep of 1"):
        runner.run(sweep("apart"), only=["aprat"])
    with pytest.raises(ValueError, match="no outcome 'hang'; there are batched, exact"):
        runner.run(sweep("apart"), again=["hang"])
