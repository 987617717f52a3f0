"""Every policy on the six paper settings under many conditions, in simulation.

    python benchmarks/policies.py [--quick] [--jobs N] [--policy NAME ...] [--bounds artifact|all|none] [--fresh]

Conditions, each for every config in configs/paper (the points of a group share its name in the results):

* sweeps: rate, cv and SLO scale as in the config (500 requests); the artifact's seed 0, and seeds 1 to 3;
* mixed SLOs: five classes of SLO scale 1.2 to 5 in equal shares, at 0.5 to 2 times capacity;
* load: 0.3 to 3 times capacity at SLO scales 1.5 and 3;
* two models: two settings of one device in one pool, each at 0.6 to 1.5 times half of its capacity;
* burst: 50 requests ten times as fast, at the config's rate and at half of it;
* latency noise, profile error, slowdown: every second rate of the artifact's sweep once more, on a
  device that is not what its profile says: steps spread by sigma 0.05 or 0.15; all steps 1.1 times as long as profiled
  (`latency_scale` 1.1: the profile is too fast) or 1 / 1.1 times (0.909: it is too slow); steps 1.5
  times as long for ten seconds from the arrival of the middle request on.

Capacity is the rate at which each stage's batches at their best size would fill the device. Mixes,
loads, pairs and bursts have 300 requests a point (pairs 600 together); mixes, pairs and bursts run
with seeds 0 and 1, the others with seed 0. `serial` and `static`, which know no deadlines, are left
out unless asked for by --policy (repeatable). `--quick` is three points a sweep, one of each other
group, seed 0, the policies that matter most, and two bounds.

What is counted is weight on time, here the number of requests. A bound (what no scheduler could
exceed, neustream.analysis.bounds) is computed once a point, for the artifact's seed or for all points
whose device is deterministic (`--bounds all`). A point is contended if its bound is below 99 percent
of its requests, or the best baseline below 98.5 percent of the bound (of the requests where there is
no bound). Baselines are all policies but ours; a policy is beaten at a point, contended or not, where
the best baseline has over 1 percent of the requests more on time.

Output, in benchmarks/results (in out/policies with --quick or --policy, which leave things out):
policies.json, one line a point: condition, on time by policy, bound, hindsight (the best schedule
that was found knowing the future); policies.md, summaries over contended points; policies_bound.png,
the mean share of the bound by setting; policies_load.png, goodput against load.

Every finished simulation or bound is appended to out/policies/work.jsonl, so a run that was stopped
goes on where it was. The key of a result is a digest of what it depends on: requests, latencies,
pools, how the device differs, the policy's parameters, and the code of the policy (of the bound) and
of everything in the library that it imports, comments and docstrings aside. A policy whose file
changed is simulated again, the others are not. `--fresh` forgets all.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from rich.progress import MofNCompleteColumn, Progress

from neustream import __version__
from neustream.analysis.bounds import Bound
from neustream.analysis.headroom import bound_of
from neustream.analysis.hindsight import hindsight
from neustream.analysis.plots import COLOURS, MARKS
from neustream.config import Burst, Simulation, Slo, SloClass, Slowdown, StagesExperiment, load_experiment
from neustream.config.fields import Between, Choices
from neustream.core.policies import POLICIES
from neustream.core.profile import LatencyProfile
from neustream.engine.report import Report
from neustream.experiment import Prepared, StagesPipeline, merge, prepare, simulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "out/policies"

OURS = "priced"
RULE = "neustream"
COMPARED = ("clockwork", "fcfs", "edf", "least_laxity", "symphony", "slack_ranked", RULE, OURS)
QUICK = ("clockwork", "symphony", "slack_ranked", RULE, OURS)

ARTIFACT, SEEDS = "sweeps, artifact's seed", "sweeps, other seeds"
MIX, LOAD, PAIR, BURST = "mixed SLOs", "load", "two models", "burst"
NOISE, ERROR, SLOW = "latency noise", "profile error", "slowdown"
GROUPS = (ARTIFACT, SEEDS, MIX, LOAD, PAIR, BURST, NOISE, ERROR, SLOW)

SWEEPS = ("workload.rate", "workload.cv", "slo.scale")
SIDE_REQUESTS = 300
SWEEP_SEEDS, SIDE_SEEDS = (0, 1, 2, 3), (0, 1)
SCALES = (1.2, 1.5, 2.0, 3.0, 5.0)
MIX_LOADS = (0.5, 1.0, 1.5, 2.0)
FAIR_LOAD = 1.5
LOADS = (0.3, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
LOAD_SCALES = (1.5, 3.0)
PAIR_LOADS = (0.6, 1.0, 1.5)
PAIRS = (("dit_s2_256_rtx4090", "sd15_256_rtx4090"), ("dit_xl2_256_rtx4090", "palette_256_rtx4090"))
SLOW_S = 10.0
DISTURBANCES = {NOISE: ("noise", (0.05, 0.15)), ERROR: ("latency", (1.1, 1 / 1.1)), SLOW: ("slowdown", (1.5,))}
"""By group the name of what is wrong with the device, and how much of it."""

BOUND, HINDSIGHT = EXTRA = ("bound", "hindsight")
BOUND_LIMIT_S, HINDSIGHT_LIMIT_S = 20.0, 60.0
HINDSIGHT_SCALE = 1.5
QUICK_BOUNDS = ("palette_256_rtx4090", "sd15_256_rtx4090")

# -- conditions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A workload on a device, for every policy to be tried on."""

    group: str
    condition: Mapping[str, float]
    seed: int
    experiments: tuple[StagesExperiment, ...]

    @property
    def config(self) -> str:
        return " + ".join(experiment.name for experiment in self.experiments)

    @property
    def bounded(self) -> bool:
        """Whether it is known how long steps take at least."""
        return all(experiment.simulation.latency_noise == 0 for experiment in self.experiments)

    def prepared(self) -> Prepared:
        if len(self.experiments) == 1:
            return prepare(self.experiments[0])
        return merge([prepare(experiment, prefix=f"{at}-") for at, experiment in enumerate(self.experiments)])


def all_points(quick: bool) -> list[Point]:
    """All points; `quick`: three a sweep, the middle of what else is varied, and seed 0 alone."""
    every = [load_experiment(path) for path in sorted((ROOT / "configs/paper").glob("*.yaml"))]
    settings = [setting for setting in every if isinstance(setting, StagesExperiment)]  # the others: benchmarks/llm.py
    sweep_seeds, side_seeds = ((0,), (0,)) if quick else (SWEEP_SEEDS, SIDE_SEEDS)
    points: list[Point] = []
    for setting in settings:
        for seed in sweep_seeds:
            for over in SWEEPS:
                values = setting.sweeps[over].values
                points += sweep(setting, over, values[1::3] if quick else values, seed)
        for seed in side_seeds:
            points += mixes(setting, middle(MIX_LOADS) if quick else MIX_LOADS, seed)
            points += bursts(setting, seed)[: 1 if quick else None]
        points += loads(setting, middle(LOADS) if quick else LOADS)
        rates = setting.sweeps["workload.rate"].values
        points += disturbed(setting, middle(rates) if quick else rates[::2])
    by_name = {setting.name: setting for setting in settings}
    for seed in side_seeds:
        for names in PAIRS:
            points += pairs([by_name[name] for name in names], middle(PAIR_LOADS) if quick else PAIR_LOADS, seed)
    return sorted(points, key=lambda point: GROUPS.index(point.group))


def middle(values: Sequence[float]) -> Sequence[float]:
    return [values[len(values) // 2]]


def changed(experiment: StagesExperiment, keys: Mapping[str, Any]) -> StagesExperiment:
    """The experiment with other values at dotted keys."""
    for key, value in keys.items():
        section, _, name = key.partition(".")
        part = getattr(experiment, section).model_copy(update={name: value})
        experiment = experiment.model_copy(update={section: part})
    return experiment


def sweep(setting: StagesExperiment, over: str, values: Sequence[float], seed: int) -> Iterator[Point]:
    group = ARTIFACT if seed == 0 else SEEDS
    for value in values:
        keys = {**setting.sweeps[over].at, over: value, "workload.seed": seed}
        yield Point(group, {over: value}, seed, (changed(setting, keys),))


def mixes(setting: StagesExperiment, loads: Sequence[float], seed: int) -> Iterator[Point]:
    classes = [SloClass(name=f"{scale:g}", scale=scale) for scale in SCALES]
    mixed = setting.model_copy(update={"slo": Slo(classes=classes, extra_s=setting.slo.extra_s)})
    for load in loads:
        yield Point(MIX, {"load": load}, seed, (loaded(mixed, load, seed),))


def loads(setting: StagesExperiment, loads: Sequence[float]) -> Iterator[Point]:
    for scale in LOAD_SCALES:
        for load in loads:
            experiment = changed(loaded(setting, load, 0), {"slo.scale": scale})
            yield Point(LOAD, {"load": load, "slo.scale": scale}, 0, (experiment,))


def bursts(setting: StagesExperiment, seed: int) -> list[Point]:
    burst = Burst(after=100, requests=50, factor=10)
    points = []
    for rate in (setting.workload.rate, setting.workload.rate / 2):
        keys = {"rate": rate, "burst": burst, "seed": seed, "requests": SIDE_REQUESTS}
        experiment = changed(setting, {f"workload.{key}": value for key, value in keys.items()})
        points.append(Point(BURST, {"workload.rate": rate, "burst": burst.factor}, seed, (experiment,)))
    return points


def pairs(settings: Sequence[StagesExperiment], loads: Sequence[float], seed: int) -> Iterator[Point]:
    """Two models, each at `load` times half of its capacity for as long as the other; their seeds differ."""
    rates = [capacity(setting) / 2 for setting in settings]
    for load in loads:
        experiments = []
        for at, (setting, rate) in enumerate(zip(settings, rates, strict=True)):
            requests = round(2 * SIDE_REQUESTS * rate / sum(rates))
            keys = {"rate": load * rate, "seed": seed + 100 * at, "requests": requests}
            experiments.append(changed(setting, {f"workload.{key}": value for key, value in keys.items()}))
        yield Point(PAIR, {"load": load}, seed, tuple(experiments))


def disturbed(setting: StagesExperiment, rates: Sequence[float]) -> Iterator[Point]:
    """The artifact's rate sweep on devices that are not what their profile says."""
    for point in sweep(setting, "workload.rate", rates, 0):
        (experiment,) = point.experiments
        for group, (what, amounts) in DISTURBANCES.items():
            for amount in amounts:
                bad = experiment.model_copy(update={"simulation": bad_device(experiment, what, amount)})
                yield Point(group, {**point.condition, what: amount}, 0, (bad,))


def bad_device(experiment: StagesExperiment, what: str, amount: float) -> Simulation:
    update: dict[str, Any]
    match what:
        case "noise":
            update = {"latency_noise": amount}
        case "latency":
            update = {"latency_scale": amount}
        case _:
            start = prepare(experiment).requests[experiment.workload.requests // 2].arrival
            update = {"slowdowns": [Slowdown(start_s=start, duration_s=SLOW_S, factor=amount)]}
    return experiment.simulation.model_copy(update=update)


def loaded(setting: StagesExperiment, load: float, seed: int) -> StagesExperiment:
    """The setting at `load` times its capacity."""
    rate = load * capacity(setting)
    return changed(setting, {"workload.rate": rate, "workload.seed": seed, "workload.requests": SIDE_REQUESTS})


def capacity(setting: StagesExperiment) -> float:
    """Requests per second that one worker serves if every step has the batch that costs least a job.

    Steps take what the profile says and the simulation's overhead; request lengths are the mean.
    """
    profiles, overhead = StagesPipeline(setting).load_profiles(), setting.simulation.handover_s or 0.0
    seconds = 0.0
    for name, stage in setting.stages.items():
        sizes = range(1, min(stage.max_batch, profiles[name].max_batch) + 1)
        calls = 1.0 if stage.times is None else mean_steps(setting.workload.steps)
        seconds += calls * min((profiles[name].latency(size) + overhead) / size for size in sizes)
    return 1 / seconds


def mean_steps(steps: int | Between | Choices) -> float:
    if isinstance(steps, Between):
        return (steps.min + steps.max) / 2
    return fmean(steps.choices) if isinstance(steps, Choices) else float(steps)


# -- what is computed at a point --------------------------------------------------------------------


def compute(point: Point, what: str) -> dict[str, Any]:
    """The result of a policy at a point, or its bound or hindsight."""
    began = time.perf_counter()
    prepared = point.prepared()
    if what == BOUND:
        bound = bound_of(prepared, BOUND_LIMIT_S)
        result: dict[str, Any] = {"value": bound.value, "relaxed": bound.relaxed, "method": bound.method}
        result["classes"] = served_classes(prepared, bound)
    elif what == HINDSIGHT:
        best = hindsight(prepared, HINDSIGHT_LIMIT_S)
        result = {"value": best.value, "tried": best.tried}
    else:
        result = counts(simulate(prepared, what))
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def served_classes(prepared: Prepared, bound: Bound) -> dict[str, tuple[float, int]]:
    """How many of each SLO class the bound's own solution serves, and of how many."""
    found: dict[str, tuple[float, int]] = {}
    for request in prepared.requests:
        served, of = found.get(request.slo.name, (0.0, 0))
        found[request.slo.name] = served + bound.shares[request.id], of + 1
    return found


def counts(report: Report) -> dict[str, Any]:
    """Weight on time, of how much, by SLO class and by range of steps (shortest first)."""
    shares = report.classes.values()
    return {
        "on_time": sum(share.weight_on_time for share in shares),
        "of": sum(share.weight for share in shares),
        "classes": {name: [share.on_time, share.submitted] for name, share in report.classes.items()},
        "steps": [[part["on_time"], part["submitted"]] for part in report.by_steps.ranges()],
    }


# -- keys: what a result depends on -----------------------------------------------------------------


def keys(point: Point, policies: Sequence[str]) -> dict[str, str]:
    """The key of each result at a point: by policy, bound and hindsight where they are valid."""
    prepared = point.prepared()
    inputs = digest(
        [[r.graph.name, r.arrival, repr(r.slo), r.params] for r in prepared.requests],
        {name: latencies(profile) for name, profile in prepared.profiles.items()},
        [repr(pool) for pool in prepared.pools],
        [[repr(experiment.stages), repr(experiment.simulation)] for experiment in point.experiments],
    )
    found = {}
    for name in policies:
        policy: Any = next(iter(prepared.scheduler(name).policies.values()))
        parameters = {field.name: getattr(policy, field.name) for field in fields(policy)}
        found[name] = digest(inputs, parameters, simulator(), code(type(policy).__module__))
    if point.bounded:
        found[BOUND] = digest(inputs, BOUND_LIMIT_S, code("neustream.analysis.bounds.graphs.upper"))
        if not set(point.condition) & {what for what, _ in DISTURBANCES.values()}:
            found[HINDSIGHT] = digest(inputs, HINDSIGHT_LIMIT_S, code("neustream.analysis.hindsight"))
    return found


def digest(*parts: Any) -> str:
    text = json.dumps(parts, default=plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def plain(value: Any) -> Any:
    """What JSON can tell of a policy's parameter, or of a profile."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return latencies(value)


def latencies(profile: LatencyProfile) -> list[float]:
    return [profile.latency(batch) for batch in range(1, profile.max_batch + 1)]


@cache
def simulator() -> str:
    """A digest of what simulates: the engine and `experiment`, without the policies that this imports."""
    return digest(code("neustream.engine.engine"), parsed("neustream.experiment")[0])


@cache
def code(*modules: str) -> str:
    """A digest of modules of the library and of all in it that they import."""
    reached: dict[str, str] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in reached and source(module) is not None:
            reached[module], imported = parsed(module)
            todo += imported
    return digest(reached)


def source(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def parsed(module: str) -> tuple[str, list[str]]:
    """The code of a module without comments and docstrings, and names that may be modules it imports."""
    path = source(module)
    assert path is not None, module
    tree = ast.parse(path.read_text("utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree), [name for name in imported if name.startswith("neustream.")]


# -- running ----------------------------------------------------------------------------------------

Keyed = tuple[Point, dict[str, str]]


def known_results(path: Path) -> dict[str, dict[str, Any]]:
    """What a work file holds, by key; a line that was cut off when a run was killed is no result."""
    found = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry["result"]
    return found


def missing(plan: Sequence[Keyed], known: Mapping[str, Any], bounds: str, quick: bool) -> dict[str, tuple[Point, str]]:
    """What is to be computed, by key: policies first, then bounds, then hindsight."""
    todo: dict[str, tuple[Point, str]] = {}
    for point, names in plan:
        for what, key in names.items():
            if key not in known and (what not in EXTRA or with_bound(point, what, bounds, quick)):
                todo.setdefault(key, (point, what))
    return dict(sorted(todo.items(), key=lambda item: EXTRA.index(item[1][1]) if item[1][1] in EXTRA else -1))


def with_bound(point: Point, what: str, bounds: str, quick: bool) -> bool:
    """Whether a bound (hindsight) is asked for at a point; `quick`: two bounds and no hindsight."""
    if quick:
        rates = point.experiments[0].sweeps["workload.rate"].values
        few = point.config in QUICK_BOUNDS and point.condition == {"workload.rate": rates[len(rates) // 2]}
        return what == BOUND and few and bounds != "none"
    if what == HINDSIGHT:
        return bounds != "none" and point.group == ARTIFACT and searched(point)
    return bounds == "all" or (bounds == "artifact" and (point.group == ARTIFACT or is_fair(point)))


def is_fair(point: Point) -> bool:
    """Whether it is looked at who is served there."""
    return point.group == MIX and point.condition["load"] == FAIR_LOAD


def searched(point: Point) -> bool:
    """Whether hindsight is asked for: the highest rate and one SLO of each setting (it takes a minute each)."""
    highest = max(point.experiments[0].sweeps["workload.rate"].values)
    return point.condition in ({"workload.rate": highest}, {"slo.scale": HINDSIGHT_SCALE})


def run(todo: Mapping[str, tuple[Point, str]], path: Path, jobs: int) -> None:
    """Compute what is missing and append each result to the work file as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    interruptible = (signal.SIGINT, signal.SIG_DFL)  # workers end at once with Ctrl-C, and say nothing
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(*columns) as progress,
        ProcessPoolExecutor(jobs, initializer=signal.signal, initargs=interruptible) as pool,
    ):
        file.write("\n")  # ends a line that was cut off
        futures = {pool.submit(compute, *task): (key, *task) for key, task in todo.items()}
        try:
            for future in progress.track(as_completed(futures), total=len(futures), description="computing"):
                key, point, what = futures[future]
                about = {"what": what, "group": point.group, "config": point.config, "seed": point.seed}
                entry = {"key": key, **about, "condition": point.condition, "result": future.result()}
                file.write(json.dumps(entry) + "\n")
                file.flush()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# -- results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is known of a point."""

    group: str
    config: str
    seed: int
    condition: Mapping[str, float]
    requests: float
    on_time: Mapping[str, float]
    bound: float | None
    hindsight: float | None
    shares: Mapping[str, Mapping[str, Any]]  # by policy, where fairness is looked at

    @property
    def best(self) -> float:
        """What the best baseline serves on time."""
        return max(value for policy, value in self.on_time.items() if policy != OURS)

    @property
    def contended(self) -> bool:
        if self.bound is not None and self.bound < 0.99 * self.requests:
            return True
        return self.best < 0.985 * (self.requests if self.bound is None else self.bound)

    def beaten(self, policy: str) -> bool:
        """Whether some baseline has more than a percent of the requests more on time."""
        return self.best - self.on_time[policy] > 0.01 * self.requests

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {value:.4g}" for key, value in self.condition.items())

    @property
    def impossible(self) -> bool:
        """Whether somebody exceeds the bound: then the bound is wrong."""
        reached = [*self.on_time.values(), self.hindsight or 0.0]
        return self.bound is not None and max(reached) > self.bound + 1e-6

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in vars(self).items() if value is not None and value != {}})


def row(point: Point, names: Mapping[str, str], known: Mapping[str, dict[str, Any]]) -> Row:
    extra = {what: known.get(names.get(what, ""), {}).get("value") for what in EXTRA}
    results = {what: known[key] for what, key in names.items() if what not in EXTRA}
    shares = {policy: {key: result[key] for key in ("classes", "steps")} for policy, result in results.items()}
    if solved := known.get(names.get(BOUND, "")):
        shares[BOUND] = {"classes": solved["classes"]}
    return Row(
        group=point.group,
        config=point.config,
        seed=point.seed,
        condition=point.condition,
        requests=next(iter(results.values()))["of"],
        on_time={policy: result["on_time"] for policy, result in results.items()},
        bound=extra[BOUND],
        hindsight=extra[HINDSIGHT],
        shares=shares if is_fair(point) else {},
    )


Table = list[list[str]]


def markdown(rows: Sequence[Row], command: str) -> str:
    policies = list(rows[0].on_time)
    lines = ["# Policies under many conditions, simulated", "", f"`{command}`", ""]
    about = "Requests on time; means over contended points, `beaten` counts all."
    lines += [f"{about} The docstring of the script says what the words mean.", ""]
    lines += section("All groups", summary(rows, policies))
    for group in dict.fromkeys(row.group for row in rows):
        lines += section(group[0].upper() + group[1:], summary([row for row in rows if row.group == group], policies))
    if OURS in policies:
        title = f"Points where a baseline has over 1 percent of the requests more on time than `{OURS}`"
        lines += section(title, beaten_table(rows))
    lines += section("On time relative to the same points on the device that was profiled: mean (worst)", cliff(rows))
    lines += section(f"Share on time by SLO scale, mixed SLOs at {FAIR_LOAD:g} times capacity", fairness(rows, classes))
    lines += section("The same by number of steps, fifths of the range, fewest first", fairness(rows, steps))
    return "\n".join(lines)


def section(title: str, table: Table) -> list[str]:
    head, *body = table
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in body), ""]


def summary(rows: Sequence[Row], policies: Sequence[str]) -> Table:
    some = [row for row in rows if row.contended]
    headings = ["share of bound", "worst", "share of hindsight", f"to {RULE}", "to best baseline", "worst", "beaten"]
    table = [[f"{len(some)} of {len(rows)} points", *headings]]
    for policy in policies:
        bound = ratios(some, policy, lambda row: row.bound)
        best = ratios(some, policy, lambda row: row.best)
        means = [
            mean(ratios(some, policy, lambda row: row.hindsight)),
            mean(ratios(some, policy, lambda row: row.on_time.get(RULE))),
            mean(best),
        ]
        beaten = sum(row.beaten(policy) for row in rows)
        table.append([f"`{policy}`", mean(bound), worst(bound), *means, worst(best), str(beaten)])
    return table


def ratios(rows: Sequence[Row], policy: str, of: Callable[[Row], float | None]) -> list[float]:
    """What a policy serves over something, where that is known and not 0."""
    return [row.on_time[policy] / x for row in rows if (x := of(row))]


def mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else "-"


def worst(values: Sequence[float]) -> str:
    return f"{min(values):.3f}" if values else "-"


def beaten_table(rows: Sequence[Row]) -> Table:
    """Where ours is beaten, the worst first: by whom, and by how many of how many requests."""
    table = [["group", "config", "condition", "seed", "on time", "better"]]
    for row in sorted(rows, key=lambda row: (row.on_time[OURS] - row.best) / row.requests):
        if row.beaten(OURS):
            ours = row.on_time[OURS]
            least = ours + 0.01 * row.requests
            better = sorted((-value, policy) for policy, value in row.on_time.items() if value > least)
            by = ", ".join(f"{policy} +{-value - ours:g}" for value, policy in better)
            table.append([row.group, row.config, row.label, str(row.seed), f"{ours:g} of {row.requests:g}", by])
    return table


def cliff(rows: Sequence[Row]) -> Table:
    """Each policy against itself, with and without a disturbance of the device."""
    plain = {(row.config, row.condition["workload.rate"]): row for row in rows if is_rate_point(row)}
    names = [what for what, _ in DISTURBANCES.values()]
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in rows:
        for what in names:
            if what in row.condition:
                without = plain[row.config, row.condition["workload.rate"]]
                pairs.setdefault(f"{what} {row.condition[what]:.3g}", []).append((row, without))
    table = [["", *pairs]]
    for policy in rows[0].on_time:
        cells = []
        for both in pairs.values():
            shares = [row.on_time[policy] / x for row, without in both if (x := without.on_time[policy])]
            cells.append(f"{mean(shares)} ({worst(shares)})")
        table.append([f"`{policy}`", *cells])
    return table


def is_rate_point(row: Row) -> bool:
    return row.group == ARTIFACT and "workload.rate" in row.condition


Shares = dict[str, tuple[float, float]]


def fairness(rows: Sequence[Row], read: Callable[[Mapping[str, Any]], Shares]) -> Table:
    """The share on time of kinds of requests, seeds together: by policy, and for ours by setting."""
    fair = [row for row in rows if row.shares]
    lines = {f"`{policy}`": pooled(fair, policy, read) for policy in rows[0].on_time}
    if read is classes and all(BOUND in row.shares for row in fair):
        lines["the bound's solution"] = pooled(fair, BOUND, read)
    if OURS in rows[0].on_time:
        for config, some in groupby(fair, key=lambda row: row.config):
            lines[f"`{OURS}`, {config}"] = pooled(list(some), OURS, read)
    kinds = list(next(iter(lines.values())))
    table = [["", *kinds]]
    for name, shares in lines.items():
        table.append([name, *(f"{on_time / of:.2f}" for on_time, of in map(shares.__getitem__, kinds))])
    return table


def pooled(rows: Sequence[Row], policy: str, read: Callable[[Mapping[str, Any]], Shares]) -> Shares:
    total: Shares = {}
    for row in rows:
        for kind, (on_time, of) in read(row.shares[policy]).items():
            before = total.get(kind, (0, 0))
            total[kind] = (before[0] + on_time, before[1] + of)
    return dict(sorted(total.items()))


def classes(shares: Mapping[str, Any]) -> Shares:
    return {name: (on_time, of) for name, (on_time, of) in shares["classes"].items()}


def steps(shares: Mapping[str, Any]) -> Shares:
    return {str(at): (on_time, of) for at, (on_time, of) in enumerate(shares["steps"], start=1)}


# -- figures ----------------------------------------------------------------------------------------


def plot_bound(rows: Sequence[Row], path: Path) -> None:
    """The mean share of the bound over contended points, by setting and policy."""
    some = [row for row in rows if row.contended and row.bound]
    configs = sorted({row.config for row in some})
    policies = list(rows[0].on_time)
    figure, axes = plt.subplots(figsize=(11.0, 4.0), layout="constrained")
    width = 0.85 / len(policies)
    for at, policy in enumerate(policies):
        means = [fmean(ratios([r for r in some if r.config == c], policy, lambda row: row.bound)) for c in configs]
        places = [place + width * (at - (len(policies) - 1) / 2) for place in range(len(configs))]
        axes.bar(places, means, width, label=policy, color=COLOURS[at % len(COLOURS)])
    axes.set_xticks(range(len(configs)), configs, fontsize=8)
    axes.set(ylabel="share of the bound", title="Requests on time over what no scheduler could exceed")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(ncols=len(policies), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(rows: Sequence[Row], path: Path) -> None:
    """Goodput in units of capacity against load, a column a setting, a row an SLO."""
    some = [row for row in rows if row.group == LOAD]
    configs = sorted({row.config for row in some})
    size = {"figsize": (3.0 * len(configs), 6.0), "sharex": True, "squeeze": False}
    figure, panels = plt.subplots(len(LOAD_SCALES), len(configs), layout="constrained", **size)
    for line, scale in zip(panels, LOAD_SCALES, strict=True):
        for axes, config in zip(line, configs, strict=True):
            here = [row for row in some if row.config == config and row.condition["slo.scale"] == scale]
            xs = [row.condition["load"] for row in here]
            for at, policy in enumerate(rows[0].on_time):
                ys = [x * row.on_time[policy] / row.requests for x, row in zip(xs, here, strict=True)]
                style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)], "markersize": 4}
                axes.plot(xs, ys, label=policy, **style)
            axes.set_title(f"{config}, SLO {scale:g}", fontsize=8)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("goodput / capacity")
    figure.supxlabel("load / capacity")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -- command ----------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset, in minutes; results go to out/policies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--policy", action="append", choices=sorted(POLICIES), help="only these (repeatable)")
    parser.add_argument("--bounds", choices=("artifact", "all", "none"), default="artifact", help="where to bound")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    args = parser.parse_args()
    policies = args.policy or (QUICK if args.quick else COMPARED)
    if unknown := set(policies) - set(POLICIES):
        parser.error(f"no policy {', '.join(sorted(unknown))} yet; choose others with --policy")
    if not set(policies) - {OURS}:
        parser.error("choose a baseline too, to compare with")
    args.policies = list(dict.fromkeys(policies))
    return args


def write(rows: Sequence[Row], out: Path, origin: Mapping[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    points = ",\n  ".join(row.to_json() for row in rows)
    (out / "policies.json").write_text(f'{{"origin": {json.dumps(origin)}, "points": [\n  {points}\n]}}\n')
    (out / "policies.md").write_text(markdown(rows, origin["command"]))
    plot_load(rows, out / "policies_load.png")
    if any(row.contended and row.bound for row in rows):
        plot_bound(rows, out / "policies_bound.png")


def main() -> None:
    args = arguments()
    work = WORK / "work.jsonl"
    if args.fresh:
        work.unlink(missing_ok=True)
    with Progress() as progress:
        points = progress.track(all_points(args.quick), description="reading conditions")
        plan = [(point, keys(point, args.policies)) for point in points]
    known = known_results(work)
    todo = missing(plan, known, args.bounds, args.quick)
    print(f"{len(plan)} points; {len(todo)} results to compute, kept in {work}")
    try:
        run(todo, work, args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
    known = known_results(work)
    rows = [row(point, names, known) for point, names in plan]
    options = [f"--bounds {args.bounds}"] * (args.bounds != "artifact") + ["--quick"] * args.quick
    options += [f"--policy {name}" for name in args.policy or ()]
    origin = {"command": " ".join(["python benchmarks/policies.py", *options]), "neustream": __version__}
    origin["python"] = platform.python_version()
    out = WORK if args.quick or args.policy else RESULTS
    write(rows, out, origin)
    print((out / "policies.md").read_text())
    print(f"wrote {out / 'policies.json'}, .md and figures")
    if wrong := [row.to_json() for row in rows if row.impossible]:
        raise SystemExit("\n".join(["bounds that are exceeded, so wrong:", *wrong]))


if __name__ == "__main__":
    main()
