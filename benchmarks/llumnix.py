"""Llumnix's figures 10, 11, 13 and 14, ours beside the paper's.

    python benchmarks/llumnix.py 11 --traces M-M --rates 7.4 --out out/llumnix
    python benchmarks/llumnix.py 10 13 14 --seeds 3 --jobs 2
    python benchmarks/llumnix.py 11 --quick

Simulates 16 instances of LLaMA-7B on A10s under vLLM 0.1's scheduler (`llumnix_system.py` says what is
the artifact's and what is ours), with 10,000 requests a point, and writes for each figure FIGURE.json,
FIGURE.png, FIGURE.claim (made of our data by the artifact's formulas) and FIGURE_paper.claim (made of
the paper's points, `llumnix_paper.json`, by the same code). FIGURE.reached says of figures 11 and 14 what was to be
reached beside the paper's points whether it is held or failed, and the ratios of the two systems by seed. A point
takes minutes on one core; what is done is kept in points.jsonl and not done again. `--quick`: 500 requests a point,
one trace, one rate: that it runs, no figures worth comparing. `--decode 1.1`: decodes that take longer.

The cost figure of the paper: at equal P99 of prefill its own points say 20.6 % fewer instances, not 36.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import llumnix_claims as claims
import llumnix_reached as reached
import numpy as np
from arguments import at_least_one
from kept_results import kept
from llumnix_system import RATES, SYSTEMS, Setting, downtime_s, run

HERE = Path(__file__).parent
PAPER = json.loads((HERE / "llumnix_paper.json").read_text())
Point = tuple[str, str, float, Setting]
"""The panel, system and place of a figure, and what is simulated for it."""
METRICS = ("request_mean", "request_p99", "prefill_mean", "prefill_p99", "decode_mean", "decode_p99", "preemption_loss")


def settings_of(figure: str, args: argparse.Namespace) -> list[Point]:
    """The points of a figure: its panel, system and place, and what is simulated."""
    count, seeds = (500, 1) if args.quick else (args.requests, args.seeds)
    points = {"11": _of_traces, "13": _of_classes}.get(figure, _scaled)
    return [point for seed in range(seeds) for point in points(args, count, seed)]


def _of_traces(args: argparse.Namespace, count: int, seed: int) -> Iterator[Point]:
    """Figure 11: each trace at its rates."""
    for trace in args.traces[:1] if args.quick else args.traces:
        rates = args.rates or RATES[trace]
        for rate, system in product(rates[:1] if args.quick else rates, args.systems):
            yield trace, system, rate, Setting(trace, rate, system, count, seed)


def _of_classes(args: argparse.Namespace, count: int, seed: int) -> Iterator[Point]:
    """Figure 13: a tenth of the requests has priority, or none."""
    for cv in (2.0, 6.0)[: 1 if args.quick else 2]:
        for name, classes in (("llumnix-base", False), ("llumnix", True)):
            yield "", name, cv, Setting("S-S", 26.0, "llumnix", count, seed, cv, 12000, 0.1, classes)


def _scaled(args: argparse.Namespace, count: int, seed: int) -> Iterator[Point]:
    """Figure 14: instances come and go with the load."""
    for rate, system in product((2.0, 2.2, 2.4, 2.6, 2.8, 3.0)[: 1 if args.quick else 6], SYSTEMS[1:]):
        yield "poisson", system, rate, Setting("L-L", rate, system, count, seed, 1.0, 12000, scaled=True)


def key_of(setting: Setting, decode: float) -> str:
    return json.dumps({**dataclasses.asdict(setting), "decode": decode}, sort_keys=True)


def simulated(settings: Iterable[Setting], decode: float, path: Path, jobs: int) -> dict[str, dict[str, float]]:
    """The results of settings by their keys: kept ones, and the others."""
    done = kept(path)
    missing = [one for one in dict.fromkeys(settings) if key_of(one, decode) not in done]
    with ProcessPoolExecutor(jobs) as pool, path.open("a") as file:
        for setting, result in zip(missing, pool.map(partial(run, decode=decode), missing), strict=True):
            done[key_of(setting, decode)] = result
            file.write(json.dumps({"key": key_of(setting, decode), "result": result}) + "\n")
            file.flush()
            print(f"{setting.trace} {setting.rate:g} {setting.system}, seed {setting.seed}", flush=True)
    return done


def gathered(points: Sequence[Point], done: dict[str, dict[str, float]], decode: float) -> Any:
    """By panel, system and metric: the mean over seeds for each place."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for panel, system in dict.fromkeys((panel, system) for panel, system, _, _ in points):
        of = found.setdefault(panel, {}).setdefault(system, {"x": []})
        for place in dict.fromkeys(x for p, s, x, _ in points if (p, s) == (panel, system)):
            some = [done[key_of(one, decode)] for p, s, x, one in points if (p, s, x) == (panel, system, place)]
            of["x"].append(place)
            for metric in some[0]:
                of.setdefault(metric, []).append(float(np.mean([result[metric] for result in some])))
    return found


def ratios_of(points: Sequence[Point], done: dict[str, dict[str, float]], decode: float) -> Iterator[str]:
    """INFaaS++ over Llumnix, a line a panel and place where both were simulated, over the seeds."""
    for panel, place in dict.fromkeys((panel, x) for panel, _, x, _ in points):
        by_seed = {
            name: [done[key_of(one, decode)] for p, s, x, one in points if (p, s, x) == (panel, name, place)]
            for name in SYSTEMS[1:]
        }
        if all(by_seed.values()):
            some = ", ".join(reached.ratios(by_seed, METRICS))
            yield f"{panel} at {place:g}, INFaaS++ over Llumnix, {len(by_seed['llumnix'])} seed(s): {some}"


def by_class(found: Any) -> Any:
    """Figure 13's panels: those of high and of normal requests."""
    (systems,) = found.values()
    return {
        name: {
            system: {"x": of["x"], **{what: of[f"{name} {what}"] for what in METRICS}} for system, of in systems.items()
        }
        for name in ("high", "normal")
    }


def table(figure: str, ours: Any) -> str:
    """Ours beside the paper's, a line a point."""
    paper = PAPER[f"fig{figure}"]
    lines = [f"figure {figure}: ours / paper", "panel system at " + " ".join(METRICS)]
    for panel, systems in ours.items():
        for system, of in systems.items():
            theirs = paper.get(panel, {}).get(system)
            for at, place in enumerate(of["x"]):
                cells = []
                for metric in METRICS:
                    cell = f"{of[metric][at]:.3g}"
                    if theirs is not None and place in theirs["x"] and metric in theirs:
                        cell += f"/{theirs[metric][theirs['x'].index(place)]:.3g}"
                    cells.append(cell)
                lines.append(f"{panel} {system} {place:g} {' '.join(cells)}")
    return "\n".join(lines)


def draw(figure: str, ours: Any, path: Path) -> None:
    """A panel a trace and metric: ours as lines, the paper's as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paper = PAPER[f"fig{figure}"]
    shown = [*METRICS, "instances"] if figure == "14" else list(METRICS)
    grid, axes = pyplot.subplots(len(ours), len(shown), squeeze=False, figsize=(3 * len(shown), 2.6 * len(ours)))
    for row, (panel, systems) in zip(axes, ours.items(), strict=True):
        for cell, metric in zip(row, shown, strict=True):
            for color, (system, of) in enumerate(systems.items()):
                cell.plot(of["x"], of[metric], color=f"C{color}", marker="x", label=system)
                theirs = paper.get(panel, {}).get(system, {})
                if metric in theirs:
                    cell.plot(theirs["x"], theirs[metric], "o", color=f"C{color}", markersize=4)
            cell.set_title(f"{panel} {metric}", fontsize=8)
            cell.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7, title="lines: ours, dots: paper", title_fontsize=7)
    grid.tight_layout()
    grid.savefig(path, dpi=120)
    pyplot.close(grid)


def figure_10(out: Path) -> None:
    """What it takes to move a request of so many tokens: copied, computed anew, moved live. ms."""
    paper = PAPER["fig10"]
    ours = {"tokens": paper["tokens"], **{name: [] for name in ("recompute", "blocking_copy", "migration_downtime")}}
    for tokens in paper["tokens"]:
        recompute, copy, live = downtime_s(tokens)
        for name, seconds in (("recompute", recompute), ("blocking_copy", copy), ("migration_downtime", live)):
            ours[name].append(round(seconds * 1e3, 1))
    (out / "figure10.json").write_text(json.dumps(ours, indent=1) + "\n")
    print("figure 10 (7B), ms: ours / paper")
    for name in list(ours)[1:]:
        cells = [f"{a:g}/{b:g}" for a, b in zip(ours[name], paper[name]["7b"], strict=True)]
        print(f"{name}: {' '.join(cells)}")
    texts = {"figure10": ours, "figure10_paper": {name: paper[name]["7b"] for name in list(ours)[1:]}}
    for name, of in texts.items():
        worst = max(a / b for a, b in zip(of["recompute"], of["migration_downtime"], strict=True))
        most = max(of["migration_downtime"])
        text = f"Figure 10, 7B: downtime at most {most:g} ms; computing anew takes up to {worst:.0f} times as long.\n"
        (out / f"{name}.claim").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=["10", "11", "13", "14"], help="10, 11, 13, 14")
    parser.add_argument("--traces", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS[1:]), choices=SYSTEMS)
    parser.add_argument("--requests", type=at_least_one, default=10000)
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument("--jobs", type=at_least_one, default=1)
    parser.add_argument("--decode", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/llumnix"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    decode = args.decode
    verdicts = {"11": reached.reached_11, "14": reached.reached_14}
    formulas = {"11": claims.claim_11, "13": claims.claim_13, "14": claims.claim_14}
    for figure in args.figures:
        if figure == "10":
            figure_10(args.out)
            continue
        points = settings_of(figure, args)
        done = simulated([one for *_, one in points], decode, args.out / "points.jsonl", args.jobs)
        ours = gathered(points, done, decode)
        if figure == "13":
            ours = by_class(ours)
        print(table(figure, ours))
        if figure in verdicts:
            told = "\n".join([*verdicts[figure](ours, PAPER[f"fig{figure}"]), *ratios_of(points, done, decode)])
            print(told)
            (args.out / f"figure{figure}.reached").write_text(told + "\n")
        (args.out / f"figure{figure}.json").write_text(json.dumps(ours, indent=1) + "\n")
        draw(figure, ours, args.out / f"figure{figure}.png")
        for name, data in ((f"figure{figure}", ours), (f"figure{figure}_paper", PAPER[f"fig{figure}"])):
            text = formulas[figure](data)  # type: ignore[operator]
            (args.out / f"{name}.claim").write_text(text + "\n")
            print(text)
    (args.out / "figure15_paper.claim").write_text(claims.claim_15(PAPER["fig15"]) + "\n")
    print(claims.claim_15(PAPER["fig15"]))


if __name__ == "__main__":
    main()
