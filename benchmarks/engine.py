"""What the engine adds to a device: gaps between steps, served steps over their profile, and a storm.

    OMP_NUM_THREADS=1 python benchmarks/engine.py gaps CONFIG [--profiles DIR] [--load 1.8 2.5] [--json FILE]
    python benchmarks/engine.py storm [--requests 10000] [--threads 50]

`gaps` serves a config's workload on its real model under each policy and prints medians and 99th
percentiles in microseconds: from the end of a step to the start of the next in the engine's trace,
the same as the device sees it (from the end of a module's step to the start of the next one, threads
and Python's lock included), and of decisions; the share of steps that were planned while the one
before ran; and what steps took over their profile, as the device and as the engine saw them. Only
steps that follow another one within 5 ms count as gaps: the device is idle otherwise.

`storm`: that many threads submit requests, of which one in twenty has arguments that are none, one
in twenty a step that fails it, one in twenty a callback that raises, and one in ten is cancelled. Each
must be answered once, the good ones correctly.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from arguments import at_least_one
from rich.console import Console

import neustream as ns
from neustream.analysis.tables import new_table
from neustream.backends.serving import Session
from neustream.config import load_experiment
from neustream.core.batch import Batch, StepInput
from neustream.engine.events import Decided, Finished, Record
from neustream.engine.worker import Worker
from neustream.errors import RequestError, StageFailed

IDLE_S = 5e-3


class Stamps:
    """When workers' steps began and ended, in order."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        original = Worker.step

        def step(worker: Worker, batch: Batch, inputs: Sequence[StepInput], **options: Any) -> Any:
            began = perf_counter()
            results = original(worker, batch, inputs, **options)
            self.steps.append((began, perf_counter()))
            return results

        Worker.step = step  # type: ignore[method-assign,assignment]


def serve_once(session: Session, policy: str, stamps: Stamps) -> dict[str, Any]:
    """One run of the workload; microseconds and ratios."""
    stamps.steps.clear()
    records: list[Record] = []
    report = session.serve(policy, [records.append], lambda: None, lambda replay: None)
    finished = [record for record in records if isinstance(record, Finished)]
    decided = [record.seconds for record in records if isinstance(record, Decided)]
    traced = [after.step.started_at - before.at for before, after in pairwise(finished)]
    device = [after[0] - before[1] for before, after in pairwise(stamps.steps)]
    profiled = sum(record.step.profiled_s for record in finished)
    return {
        "policy": policy,
        "attainment": report.attainment,
        "steps": len(finished),
        "planned": sum(record.step.planned for record in finished) / len(finished),
        "trace_gap_us": _two(traced),
        "device_gap_us": _two(device),
        "decide_us": _two(decided, IDLE_S * 1e3),
        "device_over_profile": sum(end - began for began, end in stamps.steps) / profiled,
        "engine_over_profile": sum(record.at - record.step.started_at for record in finished) / profiled,
    }


def _two(seconds: Sequence[float], limit_s: float = IDLE_S) -> tuple[float, float]:
    kept = [value for value in seconds if value < limit_s]
    median, high = np.percentile(kept, (50, 99)) * 1e6
    return float(median), float(high)


def gaps(args: argparse.Namespace) -> None:
    stamps, rows = Stamps(), []
    for load in args.load:
        settings = [f"workload.load={load}", f"workload.requests={args.requests}"]
        if args.profiles:
            settings.append(f"profiles={args.profiles}")
        session = Session(load_experiment(args.config, settings), "cpu")
        for policy in args.policies * args.rounds:
            rows.append({"load": load, **serve_once(session, policy, stamps)})
    headings = ("load", "on time", "planned", "trace gap", "device gap", "decide", "device/profile", "engine/profile")
    table = new_table(f"{args.config}, median / p99 us", "policy", headings)
    for row in rows:
        pairs = [f"{row[key][0]:.0f} / {row[key][1]:.0f}" for key in ("trace_gap_us", "device_gap_us", "decide_us")]
        ratios = [f"{row[key]:.3f}" for key in ("device_over_profile", "engine_over_profile")]
        share = f"{row['planned']:.2f}"
        table.add_row(row["policy"], f"{row['load']}", f"{row['attainment']:.3f}", share, *pairs, *ratios)
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


# -- the storm -------------------------------------------------------------------------------------

WORK = ns.Stage("work", max_batch=64)
GRAPH = ns.Graph("storm", ns.loop(WORK, times=lambda job: job.params["rounds"]))
PROFILE = {"work": ns.TableProfile("work", [1, 64], [1e-4, 2e-4])}
WRONG: tuple[dict[str, Any], ...] = ({"slo": 5.0}, {"id": [1]}, {"params": 3}, {"on_output": 1})


class Work:
    """Returns what it was asked to; fails those that say so."""

    def load(self, device: str) -> None:
        pass

    def step(self, inputs: Sequence[StepInput]) -> list[dict[str, Any] | StageFailed]:
        return [StageFailed("as asked") if each.params["fails"] else {"value": each.params["value"]} for each in inputs]


class Storm:
    """What was asked, and what came of it."""

    def __init__(self, engine: ns.Engine, seed: int) -> None:
        self.engine = engine
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[int] = Counter()
        self._draw = random.Random(seed)
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        """One request of some kind, waited for."""
        with self._lock:
            kind, rounds = self._draw.random(), self._draw.randint(1, 4)
        if kind < 0.05:
            self._wrong(number)
            return
        params = {"value": number, "rounds": rounds, "fails": kind < 0.10}
        answer = self.engine.submit(GRAPH, params)
        answer.add_done_callback(lambda done: self._told(number, raises=0.10 <= kind < 0.15))
        if 0.15 <= kind < 0.25:
            answer.cancel()
        self._note(number, answer)

    def _wrong(self, number: int) -> None:
        try:
            self.engine.submit(GRAPH, **WRONG[number % len(WRONG)])
        except RequestError:
            self._count("refused")
            return
        self._count("WRONG ARGUMENTS ACCEPTED")

    def _told(self, number: int, raises: bool) -> None:
        with self._lock:
            self.answered[number] += 1
        if raises:
            raise SystemExit(1)

    def _note(self, number: int, answer: Future[ns.Result]) -> None:
        if answer.cancelled():
            self._count("cancelled")
            return
        result = answer.result(120)
        good = result.status != "done" or (result.output or {}).get("value") == number
        self._count(result.status if good else "WRONG OUTPUT")

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1


def storm(args: argparse.Namespace) -> None:
    scheduler = ns.Scheduler([ns.Pool("p", ("work",))], ns.POLICIES[args.policy](), PROFILE)
    member = ns.Member(scheduler, {"p": ns.ThreadExecutor({"work": Work()})})
    began = perf_counter()
    with ns.Engine(member, ns.WallClock()) as engine:
        tried = Storm(engine, args.seed)
        with ThreadPoolExecutor(args.threads) as threads:
            list(threads.map(tried.ask, range(args.requests)))
        after = engine.submit(GRAPH, {"value": 1, "rounds": 1, "fails": False}).result(60)
    seconds = perf_counter() - began
    twice = sum(count != 1 for count in tried.answered.values())
    print(f"{args.requests} requests of {args.threads} threads in {seconds:.1f} s: {dict(tried.outcomes)}")
    print(f"answered more than once: {twice}; served afterwards: {after.status}")
    if twice or after.status != "done" or any(name.isupper() for name in tried.outcomes):
        raise SystemExit("the storm did harm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_gaps = commands.add_parser("gaps")
    of_gaps.add_argument("config")
    of_gaps.add_argument("--profiles")
    of_gaps.add_argument("--load", type=float, nargs="+", default=[1.8, 2.5])
    of_gaps.add_argument("--requests", type=at_least_one, default=150)
    of_gaps.add_argument("--rounds", type=at_least_one, default=1)
    of_gaps.add_argument("--policies", nargs="+", default=["fcfs", "priced"])
    of_gaps.add_argument("--json")
    of_gaps.set_defaults(run=gaps)
    of_storm = commands.add_parser("storm")
    of_storm.add_argument("--requests", type=at_least_one, default=10_000)
    of_storm.add_argument("--threads", type=at_least_one, default=50)
    of_storm.add_argument("--policy", default="priced")
    of_storm.add_argument("--seed", type=int, default=0)
    of_storm.set_defaults(run=storm)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
