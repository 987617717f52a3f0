"""Agents drawn at random: ours beside other rules, simulated.

    python benchmarks/drawn_agents.py --seed N [--count 24] [--requests 100] [--kind TEXT ...] [--policy NAME ...]
                                      [--out FOLDER] [--fresh]

Graphs of calls of OPT-13B (profiles/a6000), kind after kind: a chain, a loop, branches, a switch, calls that share a
pool, two models of one device, two pools with tools, branches of which some suffice, a tool with a heavy tail, agents
beside plain chats that are promised a pace. How many calls, their tokens, what is promised and the load (0.3
to 3 times what the scarcest device can serve) are drawn by `--seed`; one that nobody used says how a rule does where it
was not made for. Of agents only the end is promised. Printed are the requests in time. What was simulated is kept in
`FOLDER`/work.jsonl (out/drawn_agents), so a run that was stopped goes on where it was. A result's key has the version
of neustream, but not its code: after a change of that give `--fresh`, or another `--out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml
from arguments import at_least_one
from kept_results import keep, kept
from rich.console import Console
from rich.table import Table

from neustream import __version__
from neustream.config import load_config
from neustream.experiment import prepare, simulate

ROOT = Path(__file__).parent.parent
POLICIES = ("fcfs", "edf", "priced")
TOKENS_PER_S = 850.0
"""What a device generates, about, in the largest batches that its memory has room for."""
ALONE_S = 0.045
"""A decode alone."""
CLOSE = 0.01
"""Share of the requests by which a rule may be behind and still count as equal."""

Nodes = list[dict[str, Any]]


class Drawn(NamedTuple):
    """A setting: its kind, its load, and a whole config."""

    kind: str
    load: float
    config: dict[str, Any]


class Draws:
    """What is drawn for one setting."""

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)
        self.outputs: dict[str, float] = {}
        """Outputs of a request in the mean, by model."""
        self.way = 0.0
        """Outputs on its longest way."""

    def size(self, low: float, high: float) -> float:
        """A number of two digits, all sizes from `low` to `high` alike."""
        return float(f"{low * (high / low) ** self.random.random():.2g}")

    def call(self, llm: str, name: str, times: float = 1.0, on_way: float = 1.0, images: int = 0) -> dict[str, Any]:
        """A model call that a request makes so many `times` in the mean, `on_way` of them on its longest way."""
        median, sigma = int(self.size(16, 120)), self.random.choice([0.0, 0.4, 0.8])
        most = int(median * self.random.choice([1, 2, 5])) if sigma == 0 else 5 * median
        output = {"median": median, "sigma": sigma, "min": 4, "max": most} if sigma else median
        self.outputs[llm] = self.outputs.get(llm, 0.0) + times * median * 1.15
        self.way += on_way * median * 1.15
        made = {"llm": llm, "name": name, "prompt": int(self.size(30, 300)), "output": output, "max_tokens": most}
        return {**made, "images": images} if images else made


def chain(draw: Draws) -> Nodes:
    names = "abcd"[: draw.random.randint(2, 4)]
    return [draw.call(name, name) for name in names]


def loop(draw: Draws) -> Nodes:
    low, high = sorted(draw.random.sample(range(1, 7), 2))
    mean = (low + high) / 2
    turn = draw.call("a", "turn", mean, mean)
    return [{"loop": [turn, {"tool": "look"}], "times": {"min": low, "max": high}}, draw.call("b", "end")]


def fan_out(draw: Draws) -> Nodes:
    width = draw.random.randint(3, 8)
    branches = {f"part {at}": [draw.call("a", f"part {at}", 1.0, 1.5 / width)] for at in range(width)}
    return [{"par": branches}, draw.call("b", "join")]


def switch(draw: Draws) -> Nodes:
    short = [draw.call("b", "short", 0.67, 0.67)]
    long = [{"tool": "look"}, draw.call("b", "long", 0.33, 0.33), draw.call("c", "then", 0.33)]
    ways = {"short": {"share": 2, "nodes": short}, "long": {"share": 1, "nodes": long}}
    return [draw.call("a", "first"), {"switch": ways}, draw.call("a", "last")]


def shared_pool(draw: Draws) -> Nodes:
    return [draw.call("a", "one"), {"tool": "look"}, draw.call("a", "two"), draw.call("a", "three")]


def shared_device(draw: Draws) -> Nodes:
    return [draw.call("a", "plan"), {"tool": "look"}, draw.call("b", "see", images=1), draw.call("a", "write")]


def two_pools(draw: Draws) -> Nodes:
    return [draw.call("a", "plan"), {"tool": "look"}, draw.call("b", "see"), {"tool": "look"}, draw.call("a", "write")]


def quorum(draw: Draws) -> Nodes:
    width = draw.random.randint(3, 7)
    branches = {f"part {at}": [draw.call("a", f"part {at}", 1.0, 1.2 / width)] for at in range(width)}
    need = draw.random.choice(["first", max(2, width // 2), width - 1])
    return [{"par": branches, "policy": need}, draw.call("b", "join")]


def heavy_tail(draw: Draws) -> Nodes:
    return [
        draw.call("a", "one"),
        {"tool": "search"},
        draw.call("b", "two"),
        {"tool": "search"},
        draw.call("a", "three"),
    ]


def beside_chats(draw: Draws) -> Nodes:
    share = draw.random.choice([0.3, 0.5, 0.8])
    chat, agent = _chat(draw, share), 1 - share
    calls = [
        draw.call("a", "plan", agent),
        {"tool": "look"},
        draw.call("b", "see", agent),
        draw.call("a", "end", agent),
    ]
    return _mixed(chat, share, calls)


def fan_out_beside_chats(draw: Draws) -> Nodes:
    share = draw.random.choice([0.3, 0.5, 0.8])
    chat, agent = _chat(draw, share), 1 - share
    width = draw.random.randint(2, 6)
    branches = {f"part {at}": [draw.call("a", f"part {at}", agent, 1.5 * agent / width)] for at in range(width)}
    calls = [draw.call("a", "plan", agent), {"par": branches}, {"tool": "look"}, draw.call("b", "join", agent)]
    return _mixed(chat, share, calls)


def _chat(draw: Draws, share: float) -> dict[str, Any]:
    """A call that is promised a pace, of so many of the requests."""
    chat = draw.call("a", "chat", share, 0.0)
    chat["slo"] = {"first_s": draw.size(0.5, 3), "step_s": draw.size(0.06, 0.2)}
    return chat


def _mixed(chat: dict[str, Any], share: float, calls: Nodes) -> Nodes:
    """Chats, and agents of some calls for the rest of the requests."""
    agents = {"share": 1 - share, "nodes": calls}
    return [{"switch": {"chat": {"share": share, "nodes": [chat]}, "agent": agents}}]


KINDS: Mapping[str, Callable[[Draws], Nodes]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        chain,
        loop,
        fan_out,
        switch,
        shared_pool,
        shared_device,
        two_pools,
        quorum,
        heavy_tail,
        beside_chats,
        fan_out_beside_chats,
    )
}


def drawn(seed: int, count: int, requests: int) -> Iterator[Drawn]:
    """Settings of one kind after the other; the same ones for a seed, whatever the `count`."""
    names = list(KINDS)
    for at in range(count):
        kind = names[at % len(names)]
        draw = Draws(f"{seed} {at}")
        nodes = KINDS[kind](draw)
        load = draw.size(0.3, 3)
        yield Drawn(kind, load, _config(draw, kind, nodes, load, requests, 1000 * seed + at))


def _config(draw: Draws, kind: str, nodes: Nodes, load: float, requests: int, seed: int) -> dict[str, Any]:
    one = kind == "shared device"
    busiest = sum(draw.outputs.values()) if one else max(draw.outputs.values())
    tools = {"look": {"latency_s": draw.random.choice([0.05, {"median": 1.0, "sigma": 0.5}]), "concurrency": 64}}
    tools["search"] = {"latency_s": {"median": 0.5, "sigma": draw.random.choice([1.0, 1.5, 2.0])}, "concurrency": 64}
    llm = {"profile": "steps", "memory": {"tokens": int(draw.size(5000, 20800)), "block": 16}}
    total = draw.size(1.4, 5) * (draw.way * ALONE_S + 1.0)
    config: dict[str, Any] = {
        "name": "drawn",
        "llms": dict.fromkeys(draw.outputs, llm),
        "tools": tools,
        "agent": nodes,
        "workload": {"rate": load * TOKENS_PER_S / busiest, "requests": requests, "seed": seed},
        "slo": {"total_s": round(total, 2)},
        "simulation": {"latency_noise": draw.random.choice([0.0, 0.0, 0.3])},
    }
    if one:
        config |= {"devices": ["one"], "placement": {name: ["one"] for name in draw.outputs}}
    return config


def in_time(given: Drawn, policy: str) -> int:
    """Requests that end in time under a rule."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = (ROOT / "profiles/a6000/opt_13b/steps.json").read_text()
        (folder / "steps.json").write_text(steps)
        see = {"format": "neustream.profile/1", "stage": "see", "kind": "table", "device": json.loads(steps)["device"]}
        see |= {"origin": {"how": "made up"}, "batch": [1, 8], "latency_s": [0.05, 0.3]}
        (folder / "see.json").write_text(json.dumps(see))
        path = folder / "drawn.yaml"
        path.write_text(yaml.safe_dump({**given.config, "profiles": name, "policies": {policy: {}}}))
        return simulate(prepare(load_config(path)), policy).counts["on_time"]


def key_of(given: Drawn, policy: str) -> str:
    """What a result is kept under: all that was simulated."""
    text = json.dumps(given.config, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {policy} {__version__}"


def told(rows: Sequence[tuple[Drawn, dict[str, int]]], console: Console) -> None:
    """A table of all settings, and where ours is behind."""
    table = Table("kind", "load", "total", *rows[0][1])
    ratios = []
    behind = 0
    for given, counts in rows:
        cells = [str(count) for count in counts.values()]
        table.add_row(given.kind, f"{given.load:g}", f"{given.config['slo']['total_s']:g}", *cells)
        best = max([count for name, count in counts.items() if name != "priced"], default=0)
        if "priced" in counts and best:
            ratios.append(counts["priced"] / best)
            behind += best - counts["priced"] > CLOSE * given.config["workload"]["requests"]
    console.print(table)
    if ratios:
        console.print(f"priced: behind the best other rule at {behind} of {len(ratios)}; {statistics.mean(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="what is drawn; one that no rule was tuned on")
    parser.add_argument("--count", type=at_least_one, default=24, help="settings")
    parser.add_argument("--requests", type=at_least_one, default=100, help="requests of each")
    parser.add_argument("--kind", action="append", metavar="TEXT", help="only kinds with this in their name")
    parser.add_argument("--policy", nargs="+", default=POLICIES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("out/drawn_agents"))
    parser.add_argument("--fresh", action="store_true", help="simulate again what is kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "work.jsonl"
    if args.fresh:
        work.unlink(missing_ok=True)
    known = kept(work)
    rows = []
    for given in drawn(args.seed, args.count, args.requests):
        if args.kind and not any(text in given.kind for text in args.kind):
            continue
        counts = {}
        for policy in args.policy:
            key = key_of(given, policy)
            if key not in known:
                known[key] = {"on_time": in_time(given, policy)}
                keep(work, key, known[key])
            counts[policy] = known[key]["on_time"]
        rows.append((given, counts))
        print(given.kind, given.load, counts, flush=True)
    if rows:
        told(rows, Console())


if __name__ == "__main__":
    main()
