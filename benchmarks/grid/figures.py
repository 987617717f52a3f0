"""Figures of the results: the share of the bound, and on time against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

from grid.summary import Row, ratios
from neustream.analysis.plots import COLOURS, MARKS

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_bound(rows: Sequence[Row], path: Path) -> None:
    """The mean share of the bound over contended points of one kind, by config and policy."""
    some = [row for row in rows if row.contended and row.bound]
    configs = sorted({row.config for row in some})
    policies = list(rows[0].on_time)
    figure, axes = plt.subplots(figsize=(11.0, 4.0), layout="constrained")
    width = 0.85 / len(policies)
    for at, policy in enumerate(policies):
        means = [fmean(ratios([r for r in some if r.config == c], policy, lambda row: row.bound)) for c in configs]
        places = [place + width * (at - (len(policies) - 1) / 2) for place in range(len(configs))]
        axes.bar(places, means, width, label=policy, color=COLOURS[at % len(COLOURS)])
    axes.set_xticks(range(len(configs)), configs, fontsize=8)
    axes.set(ylabel="share of the bound", title="Requests on time over what no scheduler could exceed")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(ncols=len(policies), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(rows: Sequence[Row], path: Path) -> None:
    """The mean share on time against load over the points of one kind, a panel for each group with three loads."""
    some = [row for row in rows if "load" in row.condition]
    by_group = {name: [row for row in some if row.group == name] for name in dict.fromkeys(row.group for row in some)}
    panels = {name: group for name, group in by_group.items() if len({row.condition["load"] for row in group}) > 2}
    if not panels:
        return
    size = {"figsize": (3.2 * len(panels), 3.4), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(panels), layout="constrained", **size)
    for axis, (name, group) in zip(axes[0], panels.items(), strict=True):
        loads = sorted({float(row.condition["load"]) for row in group})
        for at, policy in enumerate(group[0].on_time):
            means = [
                fmean(row.on_time[policy] / row.requests for row in group if row.condition["load"] == load)
                for load in loads
            ]
            style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)], "markersize": 4}
            axis.plot(loads, means, label=policy, **style)
        axis.set(title=name, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share on time")
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("load / capacity")
    figure.savefig(path, dpi=110)
    plt.close(figure)
