"""What simulating agents costs: requests of the paper's workload, and graphs of ever more calls.

    python benchmarks/agent_cost.py [--requests N] [--rounds N] [--policy NAME]

CPU seconds of `--requests` (1,000) of MatPlotAgent at 0.7 a second (configs/paper/matplotagent_rtx4090.yaml), and how
many outputs, steps and decisions that were. Then CPU of one call in a chain of 12, 50, 100 and 200 calls of OPT-13B
with prompts of their own (profiles/a6000): eight requests that meet nobody, four outputs a call. It is linear in the
calls where a call takes as long in each. The median of `--rounds` (3) each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import yaml
from arguments import at_least_one
from matplotagent import workload
from rich.console import Console
from rich.table import Table

from neustream.config import load_config
from neustream.engine.report import Report
from neustream.experiment import Prepared, prepare, simulate
from neustream.experiment.prepared import policy_for

ROOT = Path(__file__).parent.parent
CALLS = (12, 50, 100, 200)
REQUESTS = 8


def chain(calls: int) -> Prepared:
    """Requests through so many calls, one at a time."""
    nodes = [
        {"llm": "chat", "name": f"call {at}", "prompt": 50 + at, "output": 4, "max_tokens": 4} for at in range(calls)
    ]
    config: dict[str, Any] = {
        "name": "long",
        "profiles": str(ROOT / "profiles/a6000/opt_13b"),
        "llms": {"chat": {"memory": {"tokens": 20800}}},
        "agent": nodes,
        "workload": {"arrivals": "constant", "rate": 1 / calls, "requests": REQUESTS},
        "slo": {"scale": 4},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "long.yaml")
        path.write_text(yaml.safe_dump(config))
        return prepare(load_config(path))


def seconds(prepared: Prepared, policy: str) -> tuple[float, Report]:
    """CPU seconds of a simulation, and what came of it."""
    begun = process_time()
    report = simulate(prepared, policy_for(prepared.pipelines, policy))
    return process_time() - begun, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=1000)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--policy", default="priced")
    given = parser.parse_args()
    console = Console()
    runs = []
    for _ in range(given.rounds):
        made = workload(rate=0.7, cv=1, scale=1.8, count=given.requests, seed=None)
        took, report = seconds(made.prepared, given.policy)
        runs.append(took)
    console.print(
        f"{given.requests} requests of MatPlotAgent under {given.policy}: {statistics.median(runs):.1f} s of CPU "
        f"({', '.join(f'{took:.1f}' for took in runs)}); {report.tokens.outputs} outputs, "
        f"{sum(sizes.count for sizes in report.batch_size.values())} steps, {report.decision.count} decisions"
    )
    table = Table("calls", "ms of CPU a call", "in time")
    for calls in CALLS:
        each = [seconds(chain(calls), given.policy) for _ in range(given.rounds)]
        took = statistics.median([took for took, _ in each])
        table.add_row(str(calls), f"{1e3 * took / calls / REQUESTS:.2f}", str(each[0][1].counts["on_time"]))
    console.print(table)


if __name__ == "__main__":
    main()
