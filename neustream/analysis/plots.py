"""Figures of sweeps and runs, as PNG files. Needs the extra `analysis` (matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neustream.analysis.tables import counts_requests
from neustream.errors import BackendError
from neustream.experiment.sweeping import Batches

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    raise BackendError("figures need matplotlib: pip install 'neustream[analysis]'") from None

AXES = {
    "workload.rate": "request rate (req/s)",
    "workload.load": "load (times what one after the other can serve)",
    "workload.cv": "burstiness (cv of the gaps)",
    "slo.scale": "SLO (times the solo latency)",
    "slo.first_scale": "TTFT SLO (times the prefill alone)",
    "slo.step_scale": "TPOT SLO (times a decode alone)",
}
COLOURS = ("#7f7f7f", "#bcbd22", "#d62728", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2")
MARKS = "osv^D*XP<>"


def plot_sweep(
    points: Sequence[Mapping[str, Any]], over: str, policies: Sequence[str], title: str, out: Path | str
) -> list[Path]:
    """Goodput and attainment against the swept value, one line a policy (the paper's Figures 11, 12).

    The bound is of weights, so it is drawn only where each request weighs 1.
    """
    bounds = {point["value"]: point for point in points if "bound" in point and counts_requests(point)}
    paths = []
    for key, label in (("goodput_rps", "goodput (req/s)"), ("attainment", "attainment")):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for at, policy in enumerate(policies):
            xs = [point["value"] for point in points if point["policy"] == policy]
            ys = [point[key] for point in points if point["policy"] == policy]
            style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)]}
            axes.plot(xs, ys, label=policy, markersize=5, **style)
        if bounds:
            axes.plot(list(bounds), [_bound(point, key) for point in bounds.values()], "k--", label="bound", lw=1)
        axes.set(xlabel=AXES.get(over, over), ylabel=label, title=title)
        axes.set_ylim(bottom=0, top=1.03 if key == "attainment" else None)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(_saved(figure, Path(out) / f"{key.removesuffix('_rps')}.png"))
    return paths


def _bound(point: Mapping[str, Any], key: str) -> float:
    """The bound in the units of a figure."""
    bound = point["bound"]
    return float(bound["goodput_rps"] if key == "goodput_rps" else bound["value"] / point["counts"]["submitted"])


def plot_batches(batches: Mapping[str, Batches], stage: str, title: str, path: Path | str) -> Path:
    """Batch size of `stage` over time, one panel a policy (the paper's Figure 13)."""
    size = (8.0, 1.0 + 1.3 * len(batches))
    figure, panels = plt.subplots(len(batches), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    largest = max((size for some in batches.values() for size in some.sizes), default=0) or 1
    for at, ((policy, some), row) in enumerate(zip(batches.items(), panels, strict=True)):
        axes: Any = row[0]
        axes.step(some.times, some.sizes, where="post", lw=0.8, color=COLOURS[at % len(COLOURS)])
        axes.set_ylim(0, largest * 1.1)
        axes.set_ylabel(policy)
        axes.grid(alpha=0.3)
    panels[0][0].set_title(f"{title}: batch size of {stage!r} over time")
    panels[-1][0].set_xlabel("time (s)")
    last = max(some.last_arrival for some in batches.values()) or 1.0
    panels[-1][0].set_xlim(0, last * 1.05)  # a policy that drops nobody may run on for long
    return _saved(figure, path)


def plot_served(records: Sequence[Mapping[str, Any]], title: str, path: Path | str) -> Path:
    """Goodput, attainment and p99 of a real run beside what the simulator said, by policy.

    And what it says of the device as it was observed, where that is known of all.
    """
    figure, panels = plt.subplots(1, 3, figsize=(11.0, 3.6), layout="constrained")
    names = [record["policy"] for record in records]
    measures: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("goodput (req/s)", lambda record: record["goodput_rps"]),
        ("attainment", lambda record: record["attainment"]),
        ("p99 latency (s)", lambda record: record["latency_s"]["p99"] or 0.0),
    )
    for axes, (label, read) in zip(panels, measures, strict=True):
        bars = {"served": (COLOURS[3], [read(record) for record in records])}
        bars["simulated"] = "#c6dbef", [read(record["simulated"]) for record in records]
        if all("simulated_as_observed" in record for record in records):
            bars["simulated as observed"] = "#6baed6", [read(record["simulated_as_observed"]) for record in records]
        _side_by_side(axes, bars, names)
        shown = [value for _, values in bars.values() for value in values]
        if min(shown) > 0 and max(shown) > 10 * min(shown) and "latency" in label:
            axes.set_yscale("log")
        axes.set_title(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return _saved(figure, path)


def _side_by_side(axes: Any, bars: Mapping[str, tuple[str, Sequence[float]]], names: Sequence[str]) -> None:
    """For each of `names` a group of bars: colour and values of each kind."""
    wide = 0.8 / len(bars)
    for at, (what, (colour, values)) in enumerate(bars.items()):
        places = [x + wide * (at - (len(bars) - 1) / 2) for x in range(len(names))]
        axes.bar(places, values, wide, label=what, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.grid(alpha=0.3, axis="y")


def plot_placement(plan: Mapping[str, Any], title: str, path: Path | str) -> Path:
    """A row a device, a box for each stage that it serves, as wide as what a request costs there."""
    instances, charges = plan["placement"], plan["charges_s"]
    devices = [(name, one) for name, one in instances.items() for _ in range(one["count"])]
    stages = list(dict.fromkeys(stage for column in charges.values() for stage in column))
    figure, axes = plt.subplots(figsize=(8.0, 1.2 + 0.35 * len(devices)), layout="constrained")
    for row, (_, one) in enumerate(devices):
        left = 0.0
        for stage in one["stages"]:
            width = 1000 * charges[one["device"]][stage]
            axes.barh(row, width, 0.7, left, color=COLOURS[stages.index(stage) % len(COLOURS)], edgecolor="white")
            left += width
    axes.set_yticks(range(len(devices)), [name for name, _ in devices])
    axes.invert_yaxis()
    axes.set(xlabel="device ms of a request", title=title)
    boxes = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[at % len(COLOURS)]) for at in range(len(stages))]
    figure.legend(boxes, stages, loc="outside lower center", ncols=min(len(stages), 5))
    return _saved(figure, path)


def _saved(figure: Any, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
