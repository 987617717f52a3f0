"""Benchmarks of agents go on where they were, draw the same for a seed, and count every point once."""

from __future__ import annotations

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

NUMBERS = {"requests": 0.5, "tokens": 10.0, "prefills": 0.1, "decodes": 0.1}


@pytest.fixture
def scripts(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    names = ("agents", "drawn_agents", "kept_results")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def test_results_added_at_the_same_time_are_all_kept(scripts, tmp_path):
    _, _, kept_results = scripts
    work = tmp_path / "work.jsonl"
    work.write_text('{"key": "cut o')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: kept_results.keep(work, f"run {at}", {"value": [at] * 500}), range(64)))
    assert kept_results.kept(work) == {f"run {at}": {"value": [at] * 500} for at in range(64)}


def test_runs_that_are_kept_are_not_simulated_again(scripts, tmp_path, monkeypatch, capsys):
    agents, _, kept_results = scripts
    todo = agents.tasks(["rate", "scale"], ["edf", "priced"], 1)
    assert len(todo) == len(set(todo)) == 2 * (len(agents.SWEEPS["rate"]) + len(agents.SWEEPS["scale"]) - 1)
    work, ran = tmp_path / "work.jsonl", []

    class Here:
        """Processes that are none, of which the third run is stopped."""

        def __init__(self, jobs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, call, task):
            ran.append(task)
            return task

        def shutdown(self, cancel_futures):
            assert cancel_futures

    monkeypatch.setattr(agents, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(agents.Task, "result", lambda task: stopped(), raising=False)
    monkeypatch.setattr(agents, "as_completed", list)
    count = 0

    def stopped():
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return NUMBERS

    agents.finished(todo, work, 1)
    assert len(ran) == len(todo) and "goes on from here" in capsys.readouterr().out
    assert set(kept_results.kept(work)) == {task.key for task in todo[:2]}
    rows = agents.rows_of(kept_results.kept(work), ["rate"], ["edf", "priced"], 1)
    assert [(row["value"], row["rule"]) for row in rows] == [(0.6, "edf"), (0.6, "priced")]
    ran.clear()
    agents.finished(todo, work, 1)
    assert ran == todo[2:] and set(kept_results.kept(work)) == {task.key for task in todo}
    assert len(agents.rows_of(kept_results.kept(work), ["rate", "scale"], ["edf", "priced"], 1)) == 2 * (5 + 4)


def test_a_quick_look_at_no_rule_but_the_bound_is_refused(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["agents.py", "--quick", "--rule", "bound"])
    with pytest.raises(SystemExit, match="2"):
        scripts[0].main()
    assert "'bound' alone is no rule; allowed: vllm," in capsys.readouterr().err


def test_the_page_says_of_how_many_seeds_its_points_are(scripts):
    agents, _, _ = scripts
    rows = [{"over": "rate", "value": 0.6, "seed": seed, "rule": "edf", **NUMBERS} for seed in range(2)]
    assert "The mean of 2 seed(s)" in agents.markdown(rows)
    assert "The mean of 1 to 2 seeds" in agents.markdown([*rows, {**rows[0], "value": 0.7}])


def test_the_bound_alone_has_tables_of_requests_and_none_that_are_empty(scripts):
    agents, _, _ = scripts
    rows = [{"over": "rate", "value": 0.6, "seed": 0, "rule": "bound", "requests": 0.9}]
    page = agents.markdown(rows)
    assert [line for line in page.splitlines() if line.startswith("#")][1:] == ["## rate: requests"]
    assert "| bound | 0.900 |" in page
    assert "## rate: tokens" in agents.markdown([*rows, {**rows[0], "rule": "edf", **NUMBERS}])


def test_agents_drawn_at_random_are_the_same_for_a_seed_and_are_simulated(scripts, tmp_path, monkeypatch, capsys):
    _, drawn_agents, kept_results = scripts
    kinds = len(drawn_agents.KINDS)
    some = list(drawn_agents.drawn(5, kinds, 4))
    assert some == list(drawn_agents.drawn(5, 2 * kinds, 4))[:kinds] and some != list(drawn_agents.drawn(6, kinds, 4))
    assert [given.kind for given in some] == list(drawn_agents.KINDS)
    assert all(0.3 <= given.load <= 3 for given in some)
    options = ["--seed", "5", "--count", str(kinds), "--requests", "4", "--policy", "edf", "priced"]
    monkeypatch.setattr(sys, "argv", ["drawn_agents.py", *options, "--out", str(tmp_path)])
    drawn_agents.main()
    found = kept_results.kept(tmp_path / "work.jsonl")
    assert len(found) == 2 * kinds and all(0 <= result["on_time"] <= 4 for result in found.values())
    assert "behind the best other rule at" in capsys.readouterr().out
    monkeypatch.setattr(drawn_agents, "in_time", lambda *given: pytest.fail(f"simulated again: {given}"))
    drawn_agents.main()
    assert json.dumps(found) == json.dumps(kept_results.kept(tmp_path / "work.jsonl"))
