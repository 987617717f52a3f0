"""The grid of benchmarks/policies.py: its points, the keys of results, what is kept, and the summary."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from neustream.core.policies import Priced
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.experiment import prepare

MODULES = ("capacity", "digests", "plan", "policies", "runs", "summary")


@pytest.fixture(scope="module")
def grid(root):
    """The modules of benchmarks/grid by name, and the command."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(root / "benchmarks")
        found = {name: importlib.import_module(f"grid.{name}") for name in MODULES}
        yield SimpleNamespace(**found, command=importlib.import_module("policies"))
        for name in set(sys.modules) - before:
            if name == "policies" or name.partition(".")[0] == "grid":
                del sys.modules[name]


def group(grid, **other):
    return grid.plan.Group(**{"name": "g", "configs": ["sd15_256_rtx4090"], "set": {"workload.requests": 9}, **other})


def one(grid, kind="images", **other):
    return next(iter(grid.plan.of_group(kind, group(grid, **other))))


def row(grid, on_time, **given):
    about = {"kind": "images", "group": "g", "config": "c", "seed": 0, "condition": {"load": 1.0}, "requests": 100.0}
    return grid.summary.Row(**{**about, "on_time": on_time, **given})


# -- points -----------------------------------------------------------------------------------------


def test_no_point_is_there_twice(grid):
    for kind in grid.plan.KINDS:
        names = [
            (
                group.name,
                [part.config for part in parts.values()],
                {axis: name for axis, (name, _) in choices.items()},
                seed,
            )
            for group in grid.plan.grid(kind).groups
            for parts, choices, seed in grid.plan.combinations(group)
        ]
        assert len({str(name) for name in names}) == len(names), kind


def test_quick_has_some_points_of_every_group(grid):
    for kind in grid.plan.KINDS:
        groups = grid.plan.grid(kind).groups
        few = grid.plan.points([kind], quick=True)
        assert {point.group for point in few} == {group.name for group in groups}
        assert len(few) < 0.15 * sum(len(list(grid.plan.combinations(group))) for group in groups) + 5


def test_a_quick_point_is_one_of_all(grid):
    load = grid.plan.Group(name="load", configs=["sd15_256_rtx4090"], vary={"load": [0.5, 1, 2, 3]}, quick=2)
    every, few = (list(grid.plan.of_group("images", load, quick)) for quick in (False, True))
    assert few == [point for point in every if point.quick] and len(few) == 2


def test_loads_reach_from_light_to_three_times_capacity(grid):
    for kind in ("images", "texts"):
        (load,) = (group for group in grid.plan.grid(kind).groups if group.name == "load")
        assert min(load.vary["load"]) <= 0.3 and max(load.vary["load"]) == 3


def test_a_combination_is_all_values_of_all_axes(grid):
    axes = {"load": [0.5, 1], "promises": {"tight": {"slo.scale": 1.2}, "loose": {"slo.scale": 9}}}
    points = list(grid.plan.of_group("images", group(grid, vary=axes, seeds=[3, 4])))
    assert [(p.seed, *p.condition.values()) for p in points[:3]] == [
        (3, 0.5, "tight"),
        (3, 0.5, "loose"),
        (3, 1, "tight"),
    ]
    assert len(points) == 8
    assert [p.parts[""].slo.scale for p in points[:2]] == [1.2, 9]
    assert points[2].parts[""].workload.rate == pytest.approx(2 * points[0].parts[""].workload.rate)


def test_at_capacity_batches_of_the_best_size_fill_the_device(grid):
    setting = one(grid).parts[""]
    prepared, overhead = prepare(setting), setting.simulation.handover_s or 0.0
    profiles = {**prepared.profiles, **prepared.truth}
    busy, rate = 0.0, grid.capacity.capacity(setting)
    for name, calls in {"clip": 1, "unet": 40, "vae": 1}.items():
        sizes = range(1, min(setting.stages[name].max_batch, profiles[name].max_batch) + 1)
        busy += rate * calls * min((profiles[name].latency(b) + overhead) / b for b in sizes)
    assert busy == pytest.approx(1)
    more = one(grid, set={"pools.gpu.workers": 3}).parts[""]
    assert grid.capacity.capacity(more) == pytest.approx(3 * rate)


def test_a_text_takes_its_prefill_and_its_part_of_decodes(grid):
    keys = {"workload.requests": 2, "workload.prompt": 16, "workload.output": 11, "llm.memory.tokens": 54}
    setting = one(grid, "texts", configs=["no_gain_text"], set=keys).parts[""]
    prefills = min((0.002 + 0.004 * b) / b for b in (4, 128))  # the largest step that is looked at
    decodes = min((0.001 + 0.004 * b + 1e-6 * 21 * b) / b for b in (1, 2))  # as many as memory holds
    assert 1 / grid.capacity.capacity(setting) == pytest.approx(prefills + 10 * decodes, rel=0.05)


def test_several_models_share_the_load_and_come_for_as_long(grid):
    models = {"a": {"config": "sd15_256_rtx4090", "share": 3}, "b": {"config": "dit_s2_256_rtx4090"}}
    keys = {"load": 1, "workload.requests": 500, "models.b.slo.scale": 7}
    pair = one(grid, configs=[], models=models, set=keys)
    a, b = pair.parts.values()
    alone = [one(grid, configs=[e.name], set={"load": 1}).parts[""].workload.rate for e in (a, b)]
    assert [a.workload.rate / alone[0], b.workload.rate / alone[1]] == pytest.approx([0.75, 0.25])
    assert a.workload.requests / a.workload.rate == pytest.approx(b.workload.requests / b.workload.rate, rel=0.05)
    assert (a.slo.scale, b.slo.scale, b.workload.seed - a.workload.seed) == (3, 7, 100)
    assert len(pair.prepared().pools) == 1


def test_a_device_is_slow_time_and_again_or_once(grid):
    keys = {"workload.requests": 40}
    often = one(grid, set={**keys, "slow": {"factor": 3, "lasts": 10, "every": 100}}).parts[""].simulation.slowdowns
    once = one(grid, set={**keys, "slow": {"factor": 2, "lasts": 10}}).parts[""]
    (slow,) = once.simulation.slowdowns
    assert often[1].start_s == pytest.approx(10 * often[0].duration_s) == pytest.approx(10 * slow.duration_s)
    arrivals = [request.arrival for request in grid.plan.prepare(once).requests]
    assert arrivals[0] < slow.start_s < arrivals[-1] <= often[-1].start_s * 1.01


def test_there_is_a_bound_only_where_the_library_has_one(grid):
    assert one(grid).bounded and one(grid, set={"pools.gpu.workers": 2}).bounded
    for keys in ({"simulation.latency_noise": 0.1}, {"devices": 2}):
        assert not one(grid, set=keys).bounded
    two = {"a": {"config": "opt_13b_a6000"}, "b": {"config": "opt_13b_a6000"}}
    assert not one(grid, "texts", configs=[], models=two).bounded


# -- keys -------------------------------------------------------------------------------------------


def test_keys_follow_what_results_depend_on(grid):
    def keys(**given):
        return grid.digests.keys(one(grid, **given), ["fcfs", "neustream", "priced"])

    before = keys()
    assert keys() == before and len(set(before.values())) == 4
    other = keys(set={"workload.requests": 9, "policies.neustream.step_delta": 0.5})
    assert {name for name, key in other.items() if key != before[name]} == {"neustream"}
    assert not set(keys(seeds=[1]).values()) & set(before.values())
    slower = keys(set={"workload.requests": 9, "simulation.latency_scale": 1.1})
    assert not set(slower.values()) & set(before.values())
    assert set(keys(hindsight=1)) - set(before) == {"hindsight"}


def test_a_policy_is_known_by_its_parameters_and_those_of_the_rules_inside(grid):
    rules = [Priced(), Priced(tokens=TokenDeadlines(margin=0.1)), Priced(gain=0.3), Priced()]
    first, inner, outer, again = map(grid.digests.rule, rules)
    assert first == again and len({first, inner, outer}) == 3


def test_one_policy_is_no_part_of_anothers_code(grid):
    def modules(*names, **other):
        return set(grid.digests.reached(*names, **other))

    priced = "neustream.core.policies.priced"
    assert priced not in modules("neustream.core.policies.fcfs")
    assert priced not in modules("neustream.engine.engine", aside=grid.digests.REGISTRY)
    assert {"neustream.core.scheduler", "neustream.engine.worker"} <= modules("neustream.engine.engine")


def test_code_is_told_apart_by_what_it_does_and_imports(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(grid.digests, "ROOT", tmp_path)
    folder = tmp_path / "neustream"
    folder.mkdir()

    def written(rule, order):
        (folder / "rule.py").write_text(rule)
        (folder / "order.py").write_text(order)
        grid.digests.parsed.cache_clear()
        grid.digests.code.cache_clear()
        return grid.digests.code("neustream.rule")

    rule = "from neustream.order import by\n"
    before = written(rule, "by = 1\n")
    assert written('"""Says more."""\n\n' + rule + "# aside\n", "by = 1\n") == before
    assert written(rule, "by = 2\n") != before
    grid.digests.parsed.cache_clear()
    grid.digests.code.cache_clear()


# -- running ----------------------------------------------------------------------------------------


def test_a_line_cut_off_is_no_result(grid, tmp_path):
    path = tmp_path / "work.jsonl"
    assert grid.command.kept(path) == {}
    line = json.dumps({"key": "a", "result": {"value": 1.0}})
    path.write_text(f"{line}\n{line[:-9]}\n\n{line.replace('a', 'b', 1)[:5]}")
    assert grid.command.kept(path) == {"a": {"value": 1.0}}


def test_bounds_are_computed_where_they_are_asked_for(grid):
    with_bound, without = one(grid, bound=True), one(grid)
    plan = [(with_bound, {"fcfs": "1", "bound": "2"}), (without, {"fcfs": "3", "bound": "4"})]

    def todo(bounds, known=()):
        return list(grid.runs.missing(plan, dict.fromkeys(known), bounds))

    assert [todo(bounds) for bounds in ("none", "grid", "all")] == [["1", "3"], ["1", "3", "2"], ["1", "3", "2", "4"]]
    assert todo("all", known=["1", "4"]) == ["3", "2"]


def test_a_rule_that_fails_is_told_and_not_kept(grid, tmp_path, monkeypatch):
    assert "ConfigError" in grid.runs.compute(one(grid, set={"devices": 2}), "bound")["error"]
    task = (one(grid), "fcfs")
    monkeypatch.setattr(grid.runs, "_results", lambda todo, jobs: [("1", task, {"error": "E: no"})])
    failed = grid.runs.run({"1": task}, tmp_path / "work.jsonl", 1)
    assert len(failed) == 1 and failed[0].endswith("fcfs: E: no")
    assert grid.command.kept(tmp_path / "work.jsonl") == {}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_goes_on_where_it_was(grid, tmp_path, monkeypatch, capsys):
    models = {"images": {"config": "sd15_256_rtx4090"}, "texts": {"config": "opt_13b_a6000"}}
    keys = {"workload.requests": 6, "load": 1, "simulation.mixed_devices": True}
    points = [one(grid, bound=True), one(grid, "both", configs=[], models=models, set=keys)]
    monkeypatch.setattr(grid.command, "points", lambda kinds, quick: points)
    monkeypatch.setattr(grid.command, "WORK", tmp_path)
    parser = argparse.ArgumentParser()
    grid.command.add_arguments(parser)
    args = parser.parse_args(["--jobs", "1", "--out", str(tmp_path), "--policy", "fcfs", "--policy", "priced"])
    grid.command.compare(["images", "both"], args, "command")
    assert "2 points; 5 results to compute" in capsys.readouterr().out
    found = json.loads((tmp_path / "policies.json").read_text())
    assert [(point["kind"], set(point["on_time"])) for point in found["points"]] == [
        ("images", {"fcfs", "priced"}),
        ("both", {"fcfs", "priced"}),
    ]
    assert found["points"][0]["bound"] <= 9 and (tmp_path / "policies.md").exists()
    grid.command.compare(["images", "both"], args, "command")
    assert "2 points; 0 results to compute" in capsys.readouterr().out


# -- summary ----------------------------------------------------------------------------------------


def test_a_point_is_contended_by_its_bound_or_by_what_baselines_leave(grid):
    assert not row(grid, {"edf": 99}).contended
    assert row(grid, {"edf": 98}).contended
    assert not row(grid, {"edf": 99}, bound=99.0).contended
    assert row(grid, {"edf": 98}, bound=98.0).contended
    assert row(grid, {"edf": 97}, bound=100.0).contended


def test_ours_is_no_baseline_and_a_bound_is_not_to_be_exceeded(grid):
    ours = grid.policies.OURS
    first = row(grid, {"edf": 90, ours: 99}, bound=95.0)
    assert first.best == 90
    assert first.behind("edf") is False and first.impossible
    other = row(grid, {"edf": 90, "fcfs": 88.5, ours: 89}, bound=95.0)
    assert [other.behind(policy) for policy in other.on_time] == [False, True, False] and not other.impossible


def test_the_summary_has_shares_and_points_behind(grid):
    ours = grid.policies.OURS
    rows = [
        row(grid, {"edf": 80, ours: 90}, bound=100.0),
        row(grid, {"edf": 60, ours: 45}, group="h", condition={"noise": 0.05, "promises": "tight"}),
    ]
    assert grid.summary.measures(rows, ours) == ["2", "0.900", "0.900", "-", "0.938", "0.750", "1 of 2"]
    assert grid.summary.points_behind(rows)[1:] == [
        ["h", "c", "noise 0.05, promises tight", "0", "45 of 100", "edf +15"]
    ]
    text = grid.summary.markdown(rows, "command")
    assert "| h | 1 | - | - | - | 0.750 | 0.750 | 1 of 1 |" in text
    assert "| **all** | 2 | 0.900 | 0.900 | - | 0.938 | 0.750 | 1 of 2 |" in text


def test_load_is_drawn_where_there_are_three(grid, tmp_path):
    figures = importlib.import_module("grid.figures")
    rows = [row(grid, {"edf": 90, "priced": 95}, condition={"load": load}) for load in (0.5, 1.0, 2.0)]
    figures.plot_load(rows[:2], tmp_path / "few.png")
    figures.plot_load(rows, tmp_path / "load.png")
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]


def test_a_point_without_all_of_its_results_is_left_out(grid):
    point, known = one(grid), {"1": {"on_time": 5, "of": 9}}
    assert grid.summary.row_of(point, {"fcfs": "1", "edf": "2"}, known) is None
    assert grid.summary.row_of(point, {"fcfs": "1", "bound": "2"}, known).on_time == {"fcfs": 5}


@pytest.mark.parametrize("script", ["drawn_texts", "drawn_images"])
def test_settings_drawn_by_a_seed_are_the_same_again_and_others_by_another(grid, script):
    drawn = importlib.import_module("grid.drawing").drawn
    module = importlib.import_module(script)
    families = module.KINDS, module.MORE
    kinds = [*module.KINDS, *module.MORE]
    some = list(drawn(families, 5, len(kinds), 20))
    assert [point.group for point in some] == kinds
    assert some == list(drawn(families, 5, len(kinds), 20))
    others = drawn(families, 6, len(kinds), 20)
    assert all(point.condition != other.condition for point, other in zip(some, others, strict=True))
    assert all(len(point.prepared().requests) in (20, 40, 60) for point in some)
    texts = "texts" if script == "drawn_texts" else "both"
    assert all((point.kind == texts) == ("opt" in point.config or "text" in point.config) for point in some)


def test_kinds_that_are_added_leave_the_settings_of_the_others(grid):
    drawn = importlib.import_module("grid.drawing").drawn
    module = importlib.import_module("drawn_texts")
    alone = list(drawn([module.KINDS], 5, 2 * len(module.KINDS), 20))
    both = list(drawn([module.KINDS, module.MORE], 5, 2 * (len(module.KINDS) + len(module.MORE)), 20))
    assert [point for point in both if point.group in module.KINDS] == alone
    assert len({point.seed for point in both}) == len(both)
