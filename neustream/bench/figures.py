"""Figures of runs, as PNG files. Needs the extra `analysis` (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neustream.bench.by_length import ByLength
from neustream.bench.records import Since
from neustream.bench.runs import Run
from neustream.bench.shares import Share
from neustream.bench.summary import attainment, latencies, ours, scale_at
from neustream.errors import BackendError

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    raise BackendError("figures need matplotlib: pip install 'neustream[analysis]'") from None

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}
SCALES = 200
"""Points of a curve over SLO scales."""
Named = Mapping[str, Sequence[Run]]
"""Runs by the name of their benchmark, the loads of each in order."""


def plot_cdfs(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """How latencies of requests that are done are spread, a line for each load."""
    kinds = [kind for kind in TITLES if any(_values(named, kind, since).values())]
    size = (4.0 * max(1, len(kinds)), 3.4)
    figure, panels = plt.subplots(1, max(1, len(kinds)), figsize=size, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=False):
        for label, seconds in _values(named, kind, since).items():
            if seconds:
                ms = np.sort(np.array(seconds)) * 1e3
                axes.step(ms, np.arange(1, len(ms) + 1) / len(ms), where="post", label=label)
        axes.set(xlabel=f"{TITLES[kind]} (ms)", ylabel="share of requests", ylim=(0, 1.01))
        axes.grid(alpha=0.3)
    if panels[0][0].lines:
        panels[0][0].legend(fontsize=8)
    return _saved(figure, path)


def plot_rates(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Goodput and attainment against the rate that was offered, a line for each benchmark."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for label, runs in named.items():
        rated = sorted(runs, key=_offered)
        rates = [_offered(run) for run in rated]
        left.plot(
            rates, [ours(run, since).get("goodput_all", 0.0) for run in rated], "o-", label=label
        )
        shares = [attainment(run, since) for run in rated]
        right.errorbar(
            rates,
            [share.value or 0.0 for share in shares],
            yerr=np.array([_reach(share) for share in shares]).T,
            fmt="o-",
            capsize=3,
            label=label,
        )
    left.set(xlabel="offered (requests/s)", ylabel="goodput (requests/s)", ylim=(0, None))
    right.set(xlabel="offered (requests/s)", ylabel="attainment", ylim=(0, 1.03))
    right.axhline(0.9, ls="--", lw=1, color="grey")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return _saved(figure, path)


def plot_scales(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Attainment against a factor on all SLOs, with the factor at which it crosses 90 percent."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for label, runs in _labelled(named).items():
        scales = np.array([each.scale(since) for each in runs.records if each.limits.promises])
        if not len(scales):
            continue
        finite = scales[np.isfinite(scales)]
        most = max(2.0, float(finite.max()) * 1.05) if len(finite) else 2.0
        factors = np.linspace(0.0, most, SCALES)
        (line,) = axes.plot(factors, [(scales <= factor).mean() for factor in factors], label=label)
        crossing = scale_at([each for each in runs.records if each.limits.promises], 0.9, since)
        if crossing is not None:
            axes.axvline(crossing, color=line.get_color(), lw=0.8, ls=":")
            line.set_label(f"{label}: 90 % at {crossing:.3g}")
        else:
            line.set_label(f"{label}: 90 % at none")
    axes.axhline(0.9, ls="--", lw=1, color="grey")
    axes.axvline(1.0, lw=0.8, color="grey")
    axes.set(xlabel="SLO scale", ylabel="attainment", ylim=(0, 1.03), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _saved(figure, path)


def plot_throughput(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Latency against what was served a second, a point for each load."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for label, runs in named.items():
        points = []
        for run in runs:
            done = [record for record in run.records if record.done]
            seconds = latencies(done, since)["e2el"]
            if seconds and run.duration_s > 0:
                spread = np.percentile(np.array(seconds) * 1e3, [50, 99])
                points.append((len(done) / run.duration_s, *spread))
        if points:
            served, p50, p99 = np.array(sorted(points)).T
            (line,) = axes.plot(served, p50, "o-", label=f"{label}, median")
            axes.plot(served, p99, "^--", color=line.get_color(), label=f"{label}, p99")
    axes.set(xlabel="served (requests/s)", ylabel="end to end (ms)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    return _saved(figure, path)


def plot_by_length(named: Mapping[str, ByLength], path: Path) -> Path:
    """Latency against what was asked for, a line for each mode of serving."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for label, found in named.items():
        lengths = [each.length for each in found.lengths]
        axes.plot(lengths, [each.mean_s for each in found.lengths], "o-", ms=3, lw=1, label=label)
    unit = next(iter(named.values())).unit
    axes.set(
        xlabel=f"# {unit} requested", ylabel="request latency (s)", xlim=(0, None), ylim=(0, None)
    )
    axes.set_title(f"Latency vs Requested {unit.capitalize()}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _saved(figure, path)


def _labelled(named: Named) -> dict[str, Run]:
    """Each load by a name of its own."""
    return {
        label if len(runs) == 1 else f"{label}, {run.name or number}": run
        for label, runs in named.items()
        for number, run in enumerate(runs)
    }


def _values(named: Named, kind: str, since: Since) -> dict[str, list[float]]:
    return {
        label: latencies([record for record in run.records if record.done], since)[kind]
        for label, run in _labelled(named).items()
    }


def _offered(run: Run) -> float:
    """The rate that was asked for; else the one at which requests were sent."""
    rate = run.plan.get("rate")
    if rate is not None:
        return float(rate)
    return len(run.records) / run.duration_s if run.duration_s > 0 else 0.0


def _reach(share: Share) -> tuple[float, float]:
    low, high = share.interval
    value = share.value
    return (0.0, 0.0) if value is None else (max(0.0, value - low), max(0.0, high - value))


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
