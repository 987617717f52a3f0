"""Every policy at every point of one grid, in simulation: images, texts, and both on one device.

    python benchmarks/policies.py [--quick] [--jobs N] [--kind images|texts|both ...] [--group TEXT ...]
                                  [--policy NAME ...] [--bounds grid|all|none] [--out FOLDER] [--fresh]

The grid is data: `benchmarks/grid/*.yaml`, whose keys `grid/plan.py` explains. It has the artifact's sweeps, loads from
0.3 to 3 times capacity, burstiness, promises of all kinds and mixes of them, noise, slow phases and stalls, wrong
profiles, tiny memory, outputs far below `max_tokens`, models for which batching does not pay, several workers, devices
and models, and points drawn at random. Capacity is the rate that batches that cost least a request would fill the
device with.

What is counted is weight on time. A bound is what no scheduler could exceed (neustream.analysis.bounds), hindsight the
best schedule that was found knowing the future. A point is contended if its bound is below 99 percent of its weight, or
the best baseline below 98.5 percent of the bound (of the weight where there is no bound). Baselines are all policies
but ours. A policy is behind where the best baseline has over 1 percent of the weight more, contended or not.

`--quick` is a subset, in minutes. `--kind` and `--group` (a part of a group's name) choose points, `--policy` policies.

Output, in FOLDER (out/policies): policies.json, one line a point; policies.md, the summary; policies_bound.png and
policies_load.png. Those of the whole grid are kept by `--out benchmarks/results`.

Every finished result is appended to out/policies/work.jsonl, so a run that was stopped goes on where it was. The key of
a result is a digest of what it depends on: requests, profiles, pools, how the device differs, the policy's parameters,
and the code of the policy (of the bound) and of everything in the library that it imports, comments and docstrings
aside. A policy whose file changed is simulated again, the others are not. `--fresh` forgets all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from arguments import at_least_one
from grid.digests import keys
from grid.plan import KINDS, Point, grid, points
from grid.policies import NAMES, OURS
from grid.runs import Keyed, missing, run
from grid.summary import Row, markdown, row_of
from kept_results import kept
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from neustream import __version__

ROOT = Path(__file__).parent.parent
WORK = ROOT / "out/policies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `policies.py` and `llm.py simulate` take."""
    parser.add_argument("--quick", action="store_true", help="a subset, in minutes")
    parser.add_argument(
        "--group", action="append", metavar="TEXT", help="only groups with this in their name (repeatable)"
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What they and the scripts that draw settings take."""
    parser.add_argument("--jobs", type=at_least_one, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--policy", action="append", choices=sorted(NAMES), help="only these (repeatable)")
    parser.add_argument("--bounds", choices=("grid", "all", "none"), default="grid", help="where to bound")
    parser.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="where results are written")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")


def plan(some: Sequence[Point], args: argparse.Namespace) -> list[Keyed]:
    """The keys of what is computed at each point."""
    with Progress() as progress:
        each = progress.track(some, description="reading the grid")
        return [(point, keys(point, _policies(point.kind, args.policy))) for point in each]


def _policies(kind: str, asked: Sequence[str] | None) -> list[str]:
    return [name for name in grid(kind).policies if not asked or name in asked]


def compare(kinds: Sequence[str], args: argparse.Namespace, command: str, name: str = "policies") -> None:
    """Compute what is missing of the grid, and write and print what is known of it."""
    some = points(kinds, args.quick)
    if args.group:
        some = [point for point in some if any(text in point.group for text in args.group)]
    compare_points(some, args, command, name)


def compare_points(some: Sequence[Point], args: argparse.Namespace, command: str, name: str) -> None:
    """Compute what is missing of these points, and write and print what is known of them."""
    work = WORK / "work.jsonl"
    if args.fresh:
        work.unlink(missing_ok=True)
    if args.policy and not set(args.policy) - {OURS}:
        raise SystemExit("choose a baseline too, to compare with")
    plans = [keyed for keyed in plan(some, args) if keyed[1]]
    todo = missing(plans, kept(work), args.bounds)
    print(f"{len(plans)} points; {len(todo)} results to compute, kept in {work}")
    try:
        failed = run(todo, work, args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
    known = kept(work)
    rows = [row for point, names in plans if (row := row_of(point, names, known)) is not None]
    if not rows:
        raise SystemExit("\n".join(["no point has all of its results", *failed]))
    text = markdown(rows, command)
    write(rows, args.out, name, text, {"command": command, "neustream": __version__})
    Console().print(Markdown(text))
    if wrong := [row.to_json() for row in rows if row.impossible]:
        raise SystemExit("\n".join(["bounds that are exceeded, so wrong:", *wrong]))
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def write(rows: Sequence[Row], out: Path, name: str, text: str, origin: Mapping[str, str]) -> None:
    """The results as JSON, one row a line, the summary, and figures."""
    from grid.figures import plot_bound, plot_load  # vLLM's own environment has no matplotlib

    out.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**origin, "python": platform.python_version()})
    lines = ",\n  ".join(row.to_json() for row in rows)
    (out / f"{name}.json").write_text(f'{{"origin": {head}, "points": [\n  {lines}\n]}}\n')
    (out / f"{name}.md").write_text(text)
    some = [row for row in rows if row.kind == rows[0].kind]
    if any("load" in row.condition for row in some):
        plot_load(some, out / f"{name}_load.png")
    if any(row.contended and row.bound for row in some):
        plot_bound(some, out / f"{name}_bound.png")
    print(f"wrote {out / name}.json, .md and figures")


def command_of(script: str, args: argparse.Namespace, kinds: Sequence[str]) -> str:
    """The command line that does the same."""
    options = ["--quick"] * args.quick + [f"--bounds {args.bounds}"] * (args.bounds != "grid")
    options += [f"--kind {kind}" for kind in kinds]
    options += [f"--group '{text}'" for text in args.group or ()]
    options += [f"--policy '{name}'" for name in args.policy or ()]
    return " ".join([f"python benchmarks/{script}", *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds of points (repeatable)")
    add_arguments(parser)
    args = parser.parse_args()
    compare(args.kind or KINDS, args, command_of("policies.py", args, args.kind or ()))


if __name__ == "__main__":
    main()
