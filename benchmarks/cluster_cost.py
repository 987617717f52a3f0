"""What clusters cost: a routing decision by the number of instances, and a simulation by its size.

    python benchmarks/cluster_cost.py routing [--instances 16 256 4096] [--router slack]
    python benchmarks/cluster_cost.py simulate [--instances 1024] [--requests 100000] [--rate 2]

`routing`: microseconds that a router takes, for instances with 4 to 40 requests of Stable Diffusion each: where the
first that is asked fits, where nobody could be in time, and where all are full (25 to 40, with promises of three times
what a request takes alone). In the last two `slack` asks all of its 8. `simulate`: seconds of processor time for Stable
Diffusion on so many H100s at `rate` requests a second each, under `priced`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from arguments import at_least_one

from neustream.cluster.fleet import Fleet, Instance
from neustream.cluster.rules import ROUTERS
from neustream.config import load_config
from neustream.core.demand import Calls
from neustream.core.outlook import Asked, LineOutlook, Outlook
from neustream.core.rates import Rates
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

CONFIG = Path(__file__).parent.parent / "configs/cluster/sd_faults.yaml"
ALIKE = ["cluster.faults=[]", "cluster.mover=null", "cluster.scaler=null", "cluster.router=slack"]
SCALE = 3.0
"""Promises, by what a request takes alone, where instances are full."""


def fleet_of(count: int, random: np.random.Generator, full: bool) -> tuple[Fleet, Asked]:
    """Instances with requests, and one more request. `full`: of promises that leave no room for it."""
    prepared = prepare(load_config(CONFIG, [*ALIKE, "workload.requests=1"]))
    fleet = Fleet({"": Rates(prepared.profiles)})
    stages = frozenset(prepared.profiles)
    step = fleet.rates[""].curve("unet", 1).seconds[1]
    for number in range(count):
        jobs = int(random.integers(25 if full else 4, 41))
        left = np.sort(random.integers(1, 51, jobs)).astype(float)
        due = left * 0.05 * jobs + random.uniform(5.0, 50.0, jobs)
        if full:
            due = left * step + random.uniform(0.0, SCALE * 50 * step - left * step)
        line = LineOutlook("unet", tuple(left.tolist()), tuple(due.tolist()), (0.05,) * jobs, (1.0,) * jobs)
        outlook = Outlook(str(number), 0.0, 0, 0.02, float(left.sum()) * 0.03, jobs, 0, (line,))
        instance = Instance(str(number), 0, "whole", "", stages, outlook, 0.0, 0.0)
        fleet.add(instance)
        fleet.told(instance, outlook)
    calls = {"clip": Calls(1, False, 10), "unet": Calls(40, True, 15), "vae": Calls(1, False, 1)}
    due_in = SCALE * 40 * step if full else 60.0
    return fleet, Asked("r", calls, "clip", due_in, due_in)


def routing(counts: list[int], name: str, repeats: int = 2000) -> None:
    """Print what a decision takes."""
    router = ROUTERS[name]()
    for count in counts:
        for what in ("fits", "hopeless", "full"):
            fleet, asked = fleet_of(count, np.random.default_rng(0), what == "full")
            due_in = 0.5 if what == "hopeless" else asked.due_in
            seconds = []
            for number in range(repeats):
                one = Asked(str(number), asked.calls, asked.stage, due_in, due_in)
                began = time.perf_counter()
                router.route(fleet, one)
                seconds.append(time.perf_counter() - began)
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
            print(f"{name}, {count} instances, {what}: P50 {p50:.0f} us, P99 {p99:.0f} us", flush=True)


def simulation(instances: int, requests: int, rate: float) -> None:
    """Print what a simulation takes."""
    changes = [
        f"cluster.instances={instances}",
        f"workload.requests={requests}",
        f"workload.rate={rate * instances}",
        "workload.cv=1",
    ]
    prepared = prepare(load_config(CONFIG, [*ALIKE, *changes]))
    began = time.process_time()
    report = simulate(prepared, "priced")
    seconds = time.process_time() - began
    counts = " ".join(f"{name} {count}" for name, count in report.counts.items())
    print(f"{instances} instances, {requests} requests: {seconds:.0f} s of processor time; {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["routing", "simulate"])
    parser.add_argument("--instances", type=at_least_one, nargs="+")
    parser.add_argument("--router", choices=list(ROUTERS), default="slack")
    parser.add_argument("--requests", type=at_least_one, default=100_000)
    parser.add_argument("--rate", type=float, default=2.0)
    args = parser.parse_args()
    if args.what == "routing":
        routing(args.instances or [16, 256, 4096], args.router)
    else:
        simulation((args.instances or [1024])[0], args.requests, args.rate)


if __name__ == "__main__":
    main()
