"""What benchmarks/diffusion.py shows: tables of its lines, and a figure of goodput over the rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from neustream import LatencyProfile
from neustream.analysis.plots import COLOURS, MARKS
from neustream.analysis.tables import new_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Line = dict[str, Any]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def profile_lines(profiles: Mapping[str, LatencyProfile]) -> list[str]:
    found = []
    for stage, profile in profiles.items():
        sizes = [size for size in (1, 2, 4, 8, 12, 16, 20, 24, 32) if size <= profile.max_batch]
        cells = ", ".join(f"{size}: {profile.latency(size) * 1e3:.1f}" for size in sizes)
        found.append(f"{stage}, ms by batch: {cells}")
    return found


def burst_table(requests: int, lines: Sequence[Line]) -> Table:
    headings = ["seconds", "images/s", "x stock", "x bare loop", "x forwards alone", "in forwards", "error"]
    table = new_table(f"{requests} requests at once", "way", headings)
    for line in lines:
        cells = [f"{line['seconds']:.3f}", f"{line['images_s']:.1f}", f"{line['of_stock']:.2f}"]
        cells += [f"{line['of_bare']:.3f}", f"{line['of_forwards']:.3f}"]
        cells += [f"{line['forwards']:.1%}" if "forwards" in line else "-"]
        table.add_row(line["way"], *cells, f"{line['error']:.1e}" if "error" in line else "-")
    return table


def lone_table(lines: Sequence[Line]) -> Table:
    title = f"one at a time: {lines[0]['steps']} steps, guidance {lines[0]['guidance']:g}"
    table = new_table(title, "way", ["seconds", "stock", "ratio", "first request", "start"])
    for line in lines:
        table.add_row(
            line["way"], *(f"{line[key]:.4f}" for key in ("ours_s", "stock_s", "ratio", "first_s", "ready_s"))
        )
    return table


def load_table(title: str, lines: Sequence[Line]) -> Table:
    both: list[tuple[str, Callable[[Line], float | None], str]] = [
        ("on time", lambda line: line["on_time"], "d"),
        ("goodput/s", lambda line: line["goodput_rps"], ".2f"),
        ("SLO met", lambda line: line["attainment"], ".0%"),
        ("p50 s", lambda line: line["latency_s"]["p50"], ".3f"),
        ("p99 s", lambda line: line["latency_s"]["p99"], ".3f"),
        ("images/s", lambda line: line["images_s"], ".1f"),
        ("batch", lambda line: line.get("batch"), ".1f"),
    ]
    headings = [heading for heading, _, _ in both] + ["slower", "at its speed", "accept ms", "decide us", "over ms"]
    table = new_table(f"{title}; a/b: served/simulated; accept, decide: p50, p99", "way", headings)
    for line in lines:
        pair = [line, line["simulated"]] if "simulated" in line else [line]
        cells = ["/".join(number(read(one), form) for one in pair) for _, read, form in both]
        if "simulated" in line:
            accept, decide = line["accept_ms"], line["decision_us"]
            cells += [number(line["slower"].get("denoise"), ".2f"), str(line["at_its_speed"]["on_time"])]
            cells += [f"{accept['p50']:.1f}, {accept['p99']:.1f}", f"{decide['p50']:.0f}, {decide['p99']:.0f}"]
            cells.append(f"{line['over_ms']:.2f}")
        table.add_row(line["way"], *cells)
    return table


def plot(found: Line, title: str, path: Path) -> None:
    """Goodput over the rate: served solid, simulated dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for at, way in enumerate(dict.fromkeys(line["way"] for line in found["lines"])):
        lines = [line for line in found["lines"] if line["way"] == way]
        rates, colour = [line["rate"] for line in lines], COLOURS[at % len(COLOURS)]
        goodput = [line["goodput_rps"] for line in lines]
        axes.plot(rates, goodput, label=way, color=colour, marker=MARKS[at % len(MARKS)], markersize=5)
        if "simulated" in lines[0]:
            axes.plot(rates, [line["simulated"]["goodput_rps"] for line in lines], "--", color=colour, lw=1)
    axes.set(xlabel="request rate (req/s); dashed: simulated", ylabel="goodput (req/s)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
