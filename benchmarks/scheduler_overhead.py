"""What a scheduling turn costs: `next_batch` (the policy's decide in it) plus `finish`.

    python benchmarks/scheduler_overhead.py [--turns N] [--only turns own texts small speed] [--json FILE]

Holds 64, 256 and 1,024 live jobs at a denoising loop (DiT-S/2's profile, batches of up to 20) and
takes turns under every policy: median and 99th percentile in microseconds, as a multiple of `fcfs`
at 64 jobs, and as a share of that model's fastest step (8.6 ms). The last column is the growth from
64 to 1,024 jobs beside that of n log n. (Whole-request policies are measured in the middle of a
batch, which is where nearly all of their turns are.) Then the same for decisions alone as they come in
DiT-S/2's own workload, at rate 4 and twice that (overload), where `priced` has jobs to turn away:
median and p99, and the median as a share of the fastest step. Then decisions about texts: 240 generations of OPT-13B
that run and 16 prompts that wait, by what they were promised; each is made three times and the quickest counts, since
its inputs are at hand when it is made for real. Then those about the small OPT of `configs/demo/opt_tiny.yaml`, whose
steps take 5 ms on a CPU, in its workload, simulated with a noise of 5 percent, at half, all and 2.5 times of what one
request after the other can be served at: by what they are about, beside the number of steps. At last: how much faster
than the trace it replays the simulator is, for 500 requests of DiT-S/2 at rate 4 (seed 0), as the median of five runs.
All of it is CPU time, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from arguments import at_least_one
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from neustream import (
    POLICIES,
    SLO,
    Batch,
    Decision,
    Graph,
    NeuStream,
    Policy,
    Pool,
    Request,
    Scheduler,
    Stage,
    View,
    __version__,
    load_profile,
    loop,
    seq,
)
from neustream.analysis.tables import new_table
from neustream.config import load_experiment
from neustream.engine.events import Finished, Record
from neustream.experiment import prepare, simulate
from neustream.experiment.prepared import policy_for
from neustream.profiling import processor

ROOT = Path(__file__).parent.parent
LIVE = (64, 256, 1024)
OWN = ("fcfs", "neustream", "priced")
RATES = (4.0, 8.0)
TEXTS = ("fcfs", "neustream_llm", "priced")
LOADS = (0.5, 1.0, 2.5)
SMALL = ROOT / "profiles/amd_epyc/opt_tiny"
FASTEST_US = 8640.0
"""DiT-S/2's step alone, the fastest of the paper's profiles."""


def turns(policy: Policy, live: int, count: int) -> list[float]:
    """Seconds of each of `count` scheduling turns with `live` jobs."""
    profiles = {name: load_profile(ROOT / f"profiles/rtx4090/dit_s2_256/{name}.json") for name in ("dit", "vae")}
    dit, vae = Stage("dit", max_batch=20), Stage("vae", max_batch=10, emits=True)
    graph = Graph("dit", seq(loop(dit, times=lambda job: job.params["steps"]), vae))
    scheduler = Scheduler([Pool("gpu", ("dit", "vae"))], policy, profiles)
    draw = np.random.RandomState(0)
    for at in range(live):  # enough steps that nobody ends, enough time that nobody is hopeless
        steps, slack = 10 * count + int(draw.randint(50)), float(draw.uniform(1, 2))
        slo = SLO(total=1000 + slack * steps * profiles["dit"].latency(1))
        scheduler.submit(Request(f"job-{at}", graph, at * 1e-3, slo, {"steps": steps}), at * 1e-3)
    now, seconds = 2.0, []
    for _ in range(count):
        began = process_time()
        batch = scheduler.next_batch("gpu", now)
        middle = process_time()
        assert batch is not None
        now += batch.expected
        resumed = process_time()
        scheduler.finish(batch, ({},) * len(batch), now)
        seconds.append(process_time() - resumed + middle - began)
    return seconds[count // 10 :]


class Timed:
    """A policy, the seconds of its decisions, and what each was about."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []
        self.about: list[str] = []
        self._known: set[str] = set()

    def decide(self, view: View) -> Decision:
        began = process_time()
        decision = self.policy.decide(view)
        self.seconds.append(process_time() - began)
        self.about.append(self._about(view))
        return decision

    def _about(self, view: View) -> str:
        """Whether somebody came since the one before, or prompts wait, or all go on."""
        jobs = view.jobs
        new = any(job.id not in self._known for job in jobs)
        self._known.update([job.id for job in jobs])
        if new:
            return "a request came"
        wait = any(job.stage is not None and job.stage.phase == "prefill" for job in jobs)
        return "prompts wait" if wait else "all go on"


def own(policy: str, rate: float) -> dict[str, float]:
    """Microseconds of the decisions in DiT-S/2's workload: the medians over five runs of p50 and p99."""
    config = ROOT / "configs/paper/dit_s2_256_rtx4090.yaml"
    prepared = prepare(load_experiment(config, [f"workload.rate={rate}"]))
    quantiles = []
    for _ in range(5):
        timed = Timed(next(iter(prepared.scheduler(policy).policies.values())))
        simulate(prepared, timed)
        quantiles.append(np.percentile(timed.seconds, (50, 99)) * 1e6)
    p50, p99 = np.median(quantiles, axis=0)
    return {"p50": float(p50), "p99": float(p99)}


def small(policy: str, load: float) -> dict[str, Any]:
    """Microseconds of the decisions in the small OPT's workload, by what they are about.

    All of five runs are the same: the median over them counts of each decision.
    """
    sets = [f"profiles={SMALL}", f"workload.load={load}", "workload.requests=100", "simulation.latency_noise=0.05"]
    prepared = prepare(load_experiment(ROOT / "configs/demo/opt_tiny.yaml", sets))
    runs = []
    for _ in range(5):
        timed, steps = Timed(policy_for(prepared.pipelines, policy)), Counter[type[Record]]()

        def count(record: Record, steps: Counter[type[Record]] = steps) -> None:
            steps[type(record)] += 1

        simulate(prepared, timed, [count])
        runs.append(timed.seconds)
    each = np.median(runs, axis=0) * 1e6
    about = np.array(timed.about)
    kinds = {kind: quantiles(each[about == kind]) for kind in sorted(set(timed.about))}
    return {"steps": steps[Finished], "all": quantiles(each), **kinds}


def quantiles(us: NDArray[np.float64]) -> dict[str, float]:
    """How many there are, and what they take."""
    p50, p99 = np.percentile(us, (50, 99)).tolist()
    return {"count": len(us), "p50": p50, "mean": float(us.mean()), "p99": p99}


RUNNING, WAITING = 240, 16
PROMISES: Mapping[str, Sequence[SLO]] = {
    "a lax pace": [SLO(first=60, step=0.5)],
    "a tight pace": [SLO(first=10, step=0.08)],
    "two paces": [SLO(first=10, step=0.075), SLO(first=10, step=0.2)],
    "totals": [SLO(total=40)],
    "totals that are tight": [SLO(total=25)],
    "first outputs": [SLO(first=60)],
}


def texts(slos: Sequence[SLO], policy: str, count: int = 100) -> list[float]:
    """Seconds of decisions with generations that run and prompts that wait, 8 ms apart."""
    sets = [f"workload.requests={RUNNING + WAITING}", "llm.memory={tokens: 1000000, block: 16}"]
    prepared = prepare(load_experiment(ROOT / "configs/paper/opt_13b_a6000.yaml", sets))
    promised = [replace(r, slo=slos[at % len(slos)], arrival=0.0) for at, r in enumerate(prepared.requests)]
    scheduler = prepared.scheduler(policy)
    asked = Asked(scheduler.policies["gpu"])
    lengths, draw = scheduler.recent.lengths_of("opt_13b_a6000"), np.random.RandomState(0)
    for end in draw.randint(20, 300, 60).tolist():
        for outputs in range(1, end + 1):
            lengths.reached(outputs)
        lengths.ended(end, 300)
    for request in promised[:RUNNING]:
        scheduler.submit(request, 0.0)
    now = 0.0
    for _ in range(60):  # prompts, then decodes
        now += _step(scheduler, Some(), now).expected
    for request in promised[RUNNING:]:
        slo = replace(request.slo, first=min(request.slo.first, 2.0))
        scheduler.submit(replace(request, arrival=now, slo=slo), now)
    for at in range(count):
        scheduler.next_batch("gpu", now + 0.008 * at, instead=asked)
    return asked.seconds


def _step(scheduler: Scheduler, policy: Policy, now: float) -> Batch:
    """A step after which every generation goes on."""
    batch = scheduler.next_batch("gpu", now, instead=policy)
    assert batch is not None
    scheduler.finish(batch, [{"ended": False} for _ in batch.jobs], now + batch.expected)
    return batch


class Some:
    """Twenty prompts at a time, then all decodes."""

    def decide(self, view: View) -> Decision:
        prompts = [job for job in view.jobs if job.stage is not None and job.stage.phase == "prefill"]
        return Decision(prompts[:20] or view.jobs)


class Asked:
    """A policy that is asked, and not followed: all wait, and have less and less time."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []

    def decide(self, view: View) -> Decision:
        seconds = []
        for _ in range(3):
            began = process_time()
            self.policy.decide(view)
            seconds.append(process_time() - began)
        self.seconds.append(min(seconds))
        return Decision(wake_at=view.now + 1)


def speed(policy: str) -> float:
    """Seconds of trace that one CPU second of simulating replays."""
    prepared = prepare(load_experiment(ROOT / "configs/paper/dit_s2_256_rtx4090.yaml"))
    ratios = []
    for _ in range(5):
        began = process_time()
        report = simulate(prepared, policy)
        ratios.append(report.duration / (process_time() - began))
    return statistics.median(ratios)


def by_live_jobs(count: int) -> list[dict[str, Any]]:
    """Seconds of a turn of each policy, for each number of live jobs; `count` turns each."""
    rows: list[dict[str, Any]] = []
    for name, make in POLICIES.items():
        policy = NeuStream(slo_scale=3.0) if name == "neustream" else make()
        for live in LIVE:
            seconds = turns(policy, live, count)
            median, p99 = statistics.median(seconds), float(np.percentile(seconds, 99))
            rows.append({"policy": name, "live": live, "median_us": median * 1e6, "p99_us": p99 * 1e6})
    unit = next(row["median_us"] for row in rows if row["policy"] == "fcfs")
    return [{**row, "times_fcfs_64": row["median_us"] / unit} for row in rows]


def turns_table(rows: Sequence[dict[str, Any]]) -> Table:
    growth = LIVE[-1] * math.log(LIVE[-1]) / (LIVE[0] * math.log(LIVE[0]))
    headings = [f"{live}: us (p99)" for live in LIVE] + ["x fcfs", "of a step", f"growth (nlogn {growth:.0f})"]
    table = new_table("decide + finish by number of live jobs", "policy", headings)
    for name in POLICIES:
        own = [row for row in rows if row["policy"] == name]
        cells = [f"{row['median_us']:.0f} ({row['p99_us']:.0f})" for row in own]
        multiples = "/".join(f"{row['times_fcfs_64']:.1f}" for row in own)
        least, most = own[0]["median_us"], own[-1]["median_us"]
        table.add_row(name, *cells, multiples, f"{least / FASTEST_US:.1%}", f"{most / least:.1f}")
    return table


def decisions_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = new_table("decide in DiT-S/2's own workload", "policy", ["rate", "p50 us", "p99 us", "of a step"])
    for row in rows:
        cells = [f"{row[key]:.0f}" for key in ("rate", "p50", "p99")]
        table.add_row(str(row["policy"]), *cells, f"{row['p50'] / FASTEST_US:.1%}")
    return table


def texts_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    title = f"priced's decide, {RUNNING} texts running and {WAITING} waiting"
    table = new_table(title, "promised", ["p50 us", "p99 us"])
    for kind, row in rows.items():
        table.add_row(kind, *[f"{value:.0f}" for value in row.values()])
    return table


def small_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = new_table(
        "decide in the small OPT's workload", "policy", ["load", "about", "count", "p50 us", "mean", "p99"]
    )
    for row in rows:
        for about, found in row["us"].items():
            if about == "steps":
                table.add_row(row["policy"], f"{row['load']:g}", "steps", str(found), "", "", "")
                continue
            cells = [f"{value:.0f}" for value in found.values()]
            table.add_row(row["policy"], f"{row['load']:g}", about, *cells)
    return table


def of_texts() -> dict[str, dict[str, float]]:
    """Microseconds of a decision of `priced`, by what the texts are promised."""
    found = {}
    for kind, slos in PROMISES.items():
        p50, p99 = np.percentile(texts(slos, "priced"), (50, 99)) * 1e6
        found[kind] = {"p50_us": float(p50), "p99_us": float(p99)}
    return found


PARTS = ("turns", "own", "texts", "small", "speed")


def measured(part: str, args: argparse.Namespace) -> Any:
    """What one part of it found."""
    if part == "turns":
        gc.disable()
        found = by_live_jobs(args.turns)
        gc.enable()
        return found
    if part == "own":
        return [{"policy": name, "rate": rate, **own(name, rate)} for name in OWN for rate in RATES]
    if part == "texts":
        return of_texts()
    if part == "small":
        return [{"policy": name, "load": load, "us": small(name, load)} for name in TEXTS for load in LOADS]
    return {name: speed(name) for name in OWN}


def show(console: Console, part: str, found: Any) -> None:
    """Print it."""
    if part == "speed":
        for name, ratio in found.items():
            console.print(f"simulating with {name} is {ratio:.0f} times faster than the trace it replays")
        return
    tables: Mapping[str, Callable[[Any], Table]] = {
        "turns": turns_table,
        "own": decisions_table,
        "texts": texts_table,
        "small": small_table,
    }
    console.print(tables[part](found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=at_least_one, default=400)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=110)
    told: dict[str, Any] = {}
    for part in args.only:
        told[part] = measured(part, args)
        show(console, part, told[part])
    if args.json:
        origin = {"command": "python benchmarks/scheduler_overhead.py", "processor": processor()}
        origin |= {"python": platform.python_version(), "neustream": __version__}
        args.json.write_text(json.dumps({"origin": origin, **told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
