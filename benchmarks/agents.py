"""MatPlotAgent, the paper's agents: ours beside other rules, simulated.

    python benchmarks/agents.py [--quick] [--jobs N] [--seeds N] [--rule NAME ...] [--over KEY ...] [--out FOLDER]
                                [--fresh]

Simulates the artifact's sweeps (configs/paper/matplotagent_rtx4090.yaml has the set-up, and says what is assumed;
`--seeds` adds others than its seeds, for confidence) under each rule. Every finished run is added to
out/agents/work.jsonl, so a run that was stopped goes on where it was. A result's key has the version of neustream, but
not its code: after a change of that give `--fresh`, or another `--out`. At the end, and if it is stopped by ctrl-c,
benchmarks/results/agents.{json,md,png} get the points that all rules have. Counted are

* requests: the share that ended in time (ours);
* tokens: tokens in time per second of the artifact's window, from 30 s behind the first arrival on, for 300 / rate s;
* prefills, decodes: calls per second of that window whose first token was in time, and whose tokens all were.

A token of a call is due as there: what the calls before it were promised (`scale` times what they take alone, 2.5 s for
the executor), its prefill and the decodes so far, each `scale` times what it takes alone, from arrival on. So time that
a call saved goes to those behind it. `--quick` simulates 60 requests of one point and writes nothing.

Rules (agent_rules.py has the first two): `vllm` prefills first, in order of arrival, and gives up nobody; `artifact`
hands on what a call saved, and ends who is late at one; `fcfs` and `edf` decide pool by pool and give up who cannot be
in time; `priced` is ours. `bound` is no rule: no scheduler that knew all lengths could have more requests in time
(`neustream simulate --bound`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agent_rules import Budgets, Call, PrefillFirst
from arguments import at_least_one
from kept_results import keep, kept
from matplotagent import workload
from rich.progress import Progress

from neustream import __version__
from neustream.analysis.headroom import bound_of
from neustream.core.events import Emitted
from neustream.core.policies import EDF, FCFS, Priced
from neustream.core.policy import Policy
from neustream.core.types import TICK
from neustream.engine.events import Record

RESULTS = Path(__file__).parent / "results"
RULES = ("vllm", "fcfs", "edf", "artifact", "priced")
SWEEPS: dict[str, tuple[float, ...]] = {
    "rate": (0.6, 0.7, 0.8, 0.9, 1.0),
    "cv": (1, 2, 3, 4),
    "scale": (1.2, 1.4, 1.6, 1.8),
}
USUAL: dict[str, float] = {"rate": 0.7, "cv": 1, "scale": 1.8}
REQUESTS = 300
WARM_UP_S = 30.0
WINDOW = 300
"""Requests that the window is as long as."""
NUMBERS = ("requests", "tokens", "prefills", "decodes")
BOUND = "bound"
"""What stands among the rules for the most requests in time that there could be."""
BOUND_S = 30.0
"""Seconds that a bound is improved for."""


class Task(NamedTuple):
    """A run: a rule at one point of the sweeps. `seed` 0 is the artifact's."""

    rate: float
    cv: float
    scale: float
    seed: int
    rule: str
    requests: int = REQUESTS

    @property
    def key(self) -> str:
        """What its numbers are kept under."""
        setting = f"rate {self.rate:g}, cv {self.cv:g}, scale {self.scale:g}, seed {self.seed}"
        return f"{setting}, {self.requests} requests: {self.rule}, neustream {__version__}"


@dataclass
class Counts:
    """What the artifact counts of a run, told of each output."""

    calls: Mapping[str, Sequence[Call]]
    start: float
    end: float
    tokens: int = 0
    prefills: int = 0
    decodes: int = 0
    _done: dict[str, tuple[int, int, bool]] = field(default_factory=dict)

    def __call__(self, record: Record) -> None:
        if not isinstance(record, Emitted):
            return
        number, index, in_time = self._done.get(record.id, (0, 0, True))
        call = self.calls[record.id][number]
        here = self.start <= record.at < self.end
        now = record.at <= call.due(index) + TICK
        in_time = in_time and now
        self.tokens += here and now
        self.prefills += here and now and index == 0
        index += 1
        if index == call.outputs:
            self.decodes += here and in_time
            number, index, in_time = number + 1, 0, True
        self._done[record.id] = number, index, in_time


def task_at(over: str, value: float, seed: int, rule: str) -> Task:
    """The run of a rule at one value of what is swept."""
    at = {**USUAL, over: value}
    return Task(at["rate"], at["cv"], at["scale"], seed, rule)


def tasks(sweeps: Sequence[str], rules: Sequence[str], seeds: int) -> list[Task]:
    """Every run once: the sweeps have a point in common."""
    every = [
        task_at(over, value, seed, rule)
        for seed in range(seeds)
        for over in sweeps
        for value in SWEEPS[over]
        for rule in rules
    ]
    return list(dict.fromkeys(every))


def rows_of(
    known: Mapping[str, Mapping[str, float]], sweeps: Sequence[str], rules: Sequence[str], seeds: int
) -> list[dict[str, Any]]:
    """The points that all rules have: their numbers."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for over in sweeps:
            for value in SWEEPS[over]:
                runs = {rule: task_at(over, value, seed, rule).key for rule in rules}
                if all(key in known for key in runs.values()):
                    point = {"over": over, "value": value, "seed": seed}
                    rows += [{**point, "rule": rule, **known[key]} for rule, key in runs.items()]
    return rows


def run(task: Task) -> dict[str, float]:
    """What a rule reaches at one point."""
    given = workload(
        rate=task.rate,
        cv=task.cv,
        scale=task.scale,
        count=task.requests,
        seed=100 + task.seed if task.seed else None,
    )
    if task.rule == BOUND:
        return {"requests": bound_of(given.prepared, BOUND_S, known=()).value / task.requests}
    start = given.requests[0].arrival + WARM_UP_S
    span = WINDOW / task.rate
    counts = Counts(given.calls, start, start + span)
    policies: dict[str, Policy] = {
        "vllm": PrefillFirst(),
        "fcfs": FCFS(),
        "edf": EDF(),
        "artifact": Budgets(given.calls, task.scale),
        "priced": Priced(),
    }
    report = given.simulate(policies[task.rule], [counts])
    return {
        "requests": report.attainment,
        "tokens": counts.tokens / span,
        "prefills": counts.prefills / span,
        "decodes": counts.decodes / span,
    }


def finished(todo: Sequence[Task], work: Path, jobs: int) -> None:
    """Simulate what the work file lacks, and keep each run there as soon as it is over."""
    known = kept(work)
    missing = [task for task in todo if task.key not in known]
    print(f"{len(todo)} runs, {len(missing)} of them to simulate, kept in {work}")
    if not missing:
        return
    with Progress() as progress, ProcessPoolExecutor(jobs) as pool:
        under_way = {pool.submit(run, task): task for task in missing}
        try:
            for done in progress.track(as_completed(under_way), total=len(under_way), description="simulating"):
                keep(work, under_way[done].key, done.result())
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("stopped: the next run goes on from here")


def told(rows: Sequence[dict[str, Any]], number: str) -> str:
    """The mean over seeds, and how far single ones are from it."""
    values = [row[number] for row in rows]
    digits = 1 if number == "tokens" else 3
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each sweep and number."""
    lines = ["# MatPlotAgent on four RTX 4090, simulated", ""]
    seeds = [len({row["seed"] for row in rows if _point(row) == point}) for point in dict.fromkeys(map(_point, rows))]
    many = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) < max(seeds) else f"{seeds[0]} seed(s)"
    lines += [f"The mean of {many}, ± their standard deviation.", ""]
    for over in dict.fromkeys(row["over"] for row in rows):
        some = [row for row in rows if row["over"] == over]
        for number in NUMBERS:
            if any(number in row for row in some):  # the bound alone has requests, and no tokens
                lines += [f"## {over}: {number}", "", *table(some, number), ""]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]], number: str) -> list[str]:
    """The lines of one sweep and number: a rule a row, a value a column."""
    rows = [row for row in rows if number in row]
    values = list(dict.fromkeys(row["value"] for row in rows))
    lines = ["| rule | " + " | ".join(f"{value:g}" for value in values) + " |", "|" + "---|" * (len(values) + 1)]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        at = [[row for row in rows if (row["rule"], row["value"]) == (rule, value)] for value in values]
        lines.append(f"| {rule} | " + " | ".join(told(each, number) for each in at) + " |")
    return lines


def _point(row: Mapping[str, Any]) -> tuple[str, float]:
    return row["over"], row["value"]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Requests in time and tokens in time, by what is swept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sweeps = list(dict.fromkeys(row["over"] for row in rows))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), squeeze=False)
    for column, over in enumerate(sweeps):
        for line, (number, label) in enumerate((("requests", "share in time"), ("tokens", "tokens in time / s"))):
            axis = axes[line][column]
            for rule in dict.fromkeys(row["rule"] for row in rows if number in row):
                some = [row for row in rows if (row["over"], row["rule"]) == (over, rule)]
                style = ":" if rule == BOUND else "-"
                values = sorted({row["value"] for row in some})
                means = [statistics.mean(row[number] for row in some if row["value"] == value) for value in values]
                axis.plot(values, means, style, marker="o", label=rule)
            axis.set(xlabel=over, ylabel=label, ylim=(0, None), xticks=SWEEPS[over])
    axes[1][0].legend(*axes[0][0].get_legend_handles_labels(), loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """The results, as JSON, tables and a figure."""
    options = f" --seeds {args.seeds} --rule {' '.join(args.rule)} --over {' '.join(args.over)}"
    origin = {"command": f"python benchmarks/agents.py{options}", "neustream": __version__}
    origin["python"] = platform.python_version()
    RESULTS.mkdir(exist_ok=True)
    compact = ",\n  ".join(json.dumps(row) for row in rows)
    (RESULTS / "agents.json").write_text(f'{{"origin": {json.dumps(origin)}, "rows": [\n  {compact}\n]}}\n')
    (RESULTS / "agents.md").write_text(markdown(rows))
    draw(rows, RESULTS / "agents.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 requests of one point; print, write nothing")
    parser.add_argument("--jobs", type=at_least_one, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="seeds, the first the artifact's")
    parser.add_argument("--rule", nargs="+", choices=(*RULES, BOUND), default=(*RULES, BOUND))
    parser.add_argument("--over", nargs="+", choices=tuple(SWEEPS), default=tuple(SWEEPS))
    parser.add_argument("--out", type=Path, default=Path("out/agents"), help="what is kept of finished runs")
    parser.add_argument("--fresh", action="store_true", help="simulate again what is kept")
    args = parser.parse_args()
    if args.quick:
        quick = [Task(0.8, 1, 1.8, 0, rule, 60) for rule in args.rule if rule != BOUND]
        if not quick:
            parser.error(
                f"argument --rule: --quick simulates, and {BOUND!r} alone is no rule; allowed: {', '.join(RULES)}"
            )
        rows = [{"over": "rate", "value": 0.8, "seed": 0, "rule": task.rule, **run(task)} for task in quick]
        print(markdown(rows))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "work.jsonl"
    if args.fresh:
        work.unlink(missing_ok=True)
    finished(tasks(args.over, args.rule, args.seeds), work, args.jobs)
    rows = rows_of(kept(work), args.over, args.rule, args.seeds)
    if rows:
        write(rows, args)
        print(markdown(rows))


if __name__ == "__main__":
    main()
