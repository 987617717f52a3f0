"""What it is worth that a call hands on the time that it saved: three graphs of agents, simulated.

    python benchmarks/slack_passing.py [--requests N] [--seeds N]

A chain of three calls, a loop of three rounds (a call and a tool), and eight calls at the same time before one that
reads them; OPT-13B on a device for each name (profiles/a6000). Outputs are drawn, log-normal around 60 tokens of at
most 300, so calls take more or less than their share; those of a request's rounds are as many. A request is
promised `BUDGET_S` for each call on its way. `passing`: that is all; each call is due by what is left. `apart`:
each call has its share and no more, so a request of which one call is late is lost. `bound`: no scheduler that knew
all lengths could have more in time with `passing` (`neustream simulate --bound`). Written is
benchmarks/results/slack_passing.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from arguments import at_least_one
from rich.console import Console
from rich.table import Table

from neustream import __version__
from neustream.analysis.headroom import bound_of
from neustream.config import load_config
from neustream.experiment import Prepared, prepare, simulate

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BUDGET_S = {"chain": 4.0, "loop": 4.0, "fan-out of 8": 12.0}
POLICIES = ("edf", "priced")
RATES = {"chain": (2.0, 4.0), "loop": (0.7, 1.4), "fan-out of 8": (0.25, 0.5)}
CALLS = {"chain": 3, "loop": 3, "fan-out of 8": 2}
"""Of each graph, on a request's way."""
BOUND_S = 60.0
"""Seconds that a bound is improved for."""


def call(llm: str, name: str, own_s: float | None) -> dict[str, Any]:
    """A call; `own_s`: what it is promised of its own, if anything."""
    tokens = {"prompt": 100, "output": {"median": 60, "sigma": 0.6, "min": 8, "max": 300}, "max_tokens": 300}
    return {"llm": llm, "name": name, **tokens, **({"slo": {"total_s": own_s}} if own_s else {})}


def nodes(graph: str, apart: bool) -> list[dict[str, Any]]:
    """The nodes of a graph, as configs have them; `apart`: each call has a promise of its own."""
    own_s = BUDGET_S[graph] if apart else None
    if graph == "chain":
        return [call(name, name, own_s) for name in ("a", "b", "c")]
    if graph == "loop":
        return [{"loop": [call("a", "turn", own_s), {"tool": "look"}], "times": 3}]
    branches = {f"part {at}": [call("a", f"part {at}", own_s)] for at in range(8)}
    return [{"par": branches}, call("b", "join", own_s)]


def config(graph: str, rate: float, apart: bool, requests: int, seed: int) -> dict[str, Any]:
    """A whole config."""
    llm = {"profile": "opt_13b/steps", "memory": {"tokens": 20800}}
    names = {"chain": "abc", "loop": "a"}.get(graph, "ab")
    total = CALLS[graph] * BUDGET_S[graph]
    return {
        "name": "slack",
        "profiles": str(ROOT / "profiles/a6000"),
        "llms": dict.fromkeys(names, llm),
        "tools": {"look": {"latency_s": 0.05}} if graph == "loop" else {},
        "agent": nodes(graph, apart),
        "workload": {"rate": rate, "requests": requests, "seed": seed},
        "slo": {"total_s": total},
        "policies": {name: {} for name in POLICIES},
    }


def in_time(raw: dict[str, Any], policy: str) -> float:
    """The share of requests that ended in time."""
    return simulate(_prepared(raw), policy).attainment


def bound(raw: dict[str, Any]) -> float:
    """The share of requests that any scheduler could have in time."""
    made = _prepared(raw)
    return bound_of(made, BOUND_S, known=()).value / len(made.requests)


def _prepared(raw: dict[str, Any]) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slack.yaml")
        path.write_text(yaml.safe_dump(raw))
        return prepare(load_config(path))


def row(graph: str, rate: float, requests: int, seeds: int) -> dict[str, Any]:
    """The share in time under each policy, with and without passing on, and the most it could be."""
    found: dict[str, Any] = {"graph": graph, "rate": rate}
    apart, passing = [[config(graph, rate, each, requests, seed) for seed in range(seeds)] for each in (True, False)]
    for policy in POLICIES:
        for how, made in (("apart", apart), ("passing", passing)):
            found[f"{policy}, {how}"] = statistics.mean([in_time(raw, policy) for raw in made])
    found["bound"] = statistics.mean([bound(raw) for raw in passing])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=100)
    parser.add_argument("--seeds", type=at_least_one, default=2)
    given = parser.parse_args()
    rows = [row(graph, rate, given.requests, given.seeds) for graph, rates in RATES.items() for rate in rates]
    table = Table(*rows[0])
    for graph, rate, *shares in [list(each.values()) for each in rows]:
        table.add_row(graph, f"{rate:g}", *[f"{share:.3f}" for share in shares])
    Console().print(table)
    command = f"python benchmarks/slack_passing.py --requests {given.requests} --seeds {given.seeds}"
    origin = {"command": command, "neustream": __version__, "python": platform.python_version()}
    lines = ",\n  ".join(json.dumps(each) for each in rows)
    text = f'{{"origin": {json.dumps(origin)}, "rows": [\n  {lines}\n]}}\n'
    (RESULTS / "slack_passing.json").write_text(text)


if __name__ == "__main__":
    main()
