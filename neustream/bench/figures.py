"""Figures of runs, as PNG files. Needs the extra `analysis` (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neustream.bench.by_length import ByLength
from neustream.bench.records import Record, Since
from neustream.bench.runs import Run
from neustream.bench.shares import Share
from neustream.bench.summary import attainment, latencies, scale_at
from neustream.errors import BackendError
from neustream.workload.lengths import Floats

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.rcsetup import cycler
except ImportError:
    raise BackendError("figures need matplotlib: pip install 'neustream[analysis]'") from None

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}
OF = {"itl": "gaps"}
"""What a curve is of, where it is not requests."""
SCALES = 200
"""Points of a curve over SLO scales."""
LINES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=plt.get_cmap("tab10").colors)
MANY = 8
"""Names for which a legend has no room within the figure's axes."""
WIDEST = 10.0
"""The largest SLO scale that is drawn to show where 90 percent would be met."""
FAR = 20.0
"""Latencies that are so many times the median are far from it."""
Named = Mapping[str, Sequence[Run]]
"""Runs by the name of their benchmark, the loads of each in order."""


def plot_cdfs(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """How latencies of requests that are done are spread, a line for each load.

    The axis of latencies that are far apart is logarithmic.
    """
    kinds = [kind for kind in TITLES if any(_values(named, kind, since).values())]
    size = (4.0 * max(1, len(kinds)), 3.4)
    figure, panels = _subplots(1, max(1, len(kinds)), figsize=size, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=False):
        axes.set_prop_cycle(LINES)
        values = _values(named, kind, since)
        for label, seconds in values.items():
            ms = np.sort(np.array(seconds)) * 1e3
            axes.step(ms, np.arange(1, len(ms) + 1) / len(ms), where="post", label=_shown(label))
        every = np.concatenate([np.array(seconds) * 1e3 for seconds in values.values()])
        middle = float(np.median(every))
        if middle > 0 and every.max() > FAR * middle:
            axes.set_xscale("symlog", linthresh=middle / 10)
        else:
            axes.locator_params(axis="x", nbins=6)
        ylabel = f"share of {OF.get(kind, 'requests')}"
        axes.set(xlabel=f"{TITLES[kind]} (ms)", ylabel=ylabel, ylim=(0, 1.01))
        axes.grid(alpha=0.3)
    _legend(figure, panels[0][0])
    return _saved(figure, path)


def plot_rates(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Goodput and attainment against the rate that was offered, a line for each benchmark.

    What was offered at the same rate is one point.
    """
    figure, (left, right) = _subplots(1, 2, figsize=(9.6, 3.8))
    for label, runs in named.items():
        rated = _by_rate(runs)
        shares = [_together(same, since) for same in rated.values()]
        seconds = [sum(run.duration_s for run in same) for same in rated.values()]
        good = [
            share.number / s if s > 0 else 0.0 for share, s in zip(shares, seconds, strict=True)
        ]
        left.plot(list(rated), good, "o-", label=_shown(label))
        right.errorbar(
            list(rated),
            [share.value or 0.0 for share in shares],
            yerr=np.array([_reach(share) for share in shares]).T,
            fmt="o-",
            capsize=3,
            label=_shown(label),
        )
    left.set(xlabel="offered (requests/s)", ylabel="goodput (requests/s)", ylim=(0, None))
    right.set(xlabel="offered (requests/s)", ylabel="attainment", ylim=(0, 1.03))
    right.axhline(0.9, ls="--", lw=1, color="grey")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _legend(figure, left)
    return _saved(figure, path)


def plot_scales(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Attainment against a factor on all SLOs, with the factor at which it crosses 90 percent.

    Around each line lies its interval (Wilson's, of 95 percent).
    """
    figure, axes = _subplots(figsize=(6.4, 4.0))
    axes.set_prop_cycle(LINES)
    found = {label: _promised(run) for label, run in _labelled(named).items()}
    found = {label: promised for label, promised in found.items() if promised}
    factors = np.linspace(0.0, _widest(found.values(), since), SCALES)
    for label, promised in found.items():
        scales = _scales(promised, since)
        shares = [Share(int((scales <= factor).sum()), len(scales)) for factor in factors]
        crossing = scale_at(promised, 0.9, since)
        at = "none" if crossing is None else f"{crossing:.3g}"
        told = _shown(f"{label}: 90 % at {at}")
        (line,) = axes.plot(factors, [share.value for share in shares], label=told)
        low, high = np.array([share.interval for share in shares]).T
        axes.fill_between(factors, low, high, color=line.get_color(), alpha=0.12, lw=0)
        if crossing is not None:
            axes.axvline(crossing, color=line.get_color(), lw=0.8, ls=":")
    axes.axhline(0.9, ls="--", lw=1, color="grey")
    axes.axvline(1.0, lw=0.8, color="grey")
    axes.set(xlabel="SLO scale", ylabel="attainment", ylim=(0, 1.03), xlim=(0, factors[-1]))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return _saved(figure, path)


def plot_throughput(named: Named, path: Path, since: Since = "scheduled") -> Path:
    """Latency against what was served a second, a point for each load, the smallest first."""
    figure, axes = _subplots(figsize=(6.4, 4.0))
    for label, runs in named.items():
        points = []
        for run in sorted(runs, key=_offered):
            done = [record for record in run.records if record.done]
            seconds = latencies(done, since)["e2el"]
            if seconds and run.duration_s > 0:
                spread = np.percentile(np.array(seconds) * 1e3, [50, 99])
                points.append((len(done) / run.duration_s, *spread))
        if points:
            served, p50, p99 = np.array(points).T
            (line,) = axes.plot(served, p50, "o-", label=_shown(f"{label}, median"))
            color = line.get_color()
            axes.plot(served, p99, "^--", color=color, label=_shown(f"{label}, p99"))
    axes.set(xlabel="served (requests/s)", ylabel="end to end (ms)", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return _saved(figure, path)


def plot_by_length(named: Mapping[str, ByLength], path: Path) -> Path:
    """Latency against what was asked for, a line for each mode of serving."""
    figure, axes = _subplots(figsize=(6.4, 4.0))
    for label, found in named.items():
        lengths = [each.length for each in found.lengths]
        axes.plot(
            lengths, [each.mean_s for each in found.lengths], "o-", ms=3, lw=1, label=_shown(label)
        )
    unit = next(iter(named.values())).unit
    axes.set(
        xlabel=f"# {unit} requested", ylabel="request latency (s)", xlim=(0, None), ylim=(0, None)
    )
    axes.set_title(f"Latency vs Requested {unit.capitalize()}")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return _saved(figure, path)


def _subplots(*args: int, **given: Any) -> Any:
    return plt.subplots(*args, layout="constrained", **given)


def _promised(run: Run) -> list[Record]:
    return [record for record in run.records if record.limits.promises]


def _scales(promised: Sequence[Record], since: Since) -> Floats:
    """The factor for each request at which what it was promised would be kept."""
    return np.array([each.scale(since) for each in promised])


def _widest(found: Iterable[Sequence[Record]], since: Since) -> float:
    """The largest factor that is drawn: by then 90 percent are met, and nearly all that may be."""
    ends = [2.0]
    for promised in found:
        scales = _scales(promised, since)
        finite = scales[np.isfinite(scales)]
        if len(finite):
            ends.append(1.2 * float(np.percentile(finite, 95)))
        ends.append(min(1.1 * (scale_at(promised, 0.9, since) or 0.0), WIDEST))
    return max(ends)


def _legend(figure: Any, axes: Any) -> None:
    """The names of the lines: within the axes, or beside them where there are many."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MANY:
        figure.legend(handles, names, fontsize=8, loc="outside right upper")
    elif names:
        axes.legend(fontsize=8)


def _shown(label: str) -> str:
    """A name for a legend, which reads formulas between dollars and leaves out names like _a."""
    text = label.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _labelled(named: Named) -> dict[str, Run]:
    """Each load by a name of its own; further ones of a name are numbered."""
    found: dict[str, Run] = {}
    for label, runs in named.items():
        for number, run in enumerate(runs):
            name = label if len(runs) == 1 else f"{label}, {run.name or number}"
            same = sum(each.name == run.name for each in runs[:number]) if run.name else 0
            found[f"{name} ({same + 1})" if same else name] = run
    return found


def _by_rate(runs: Sequence[Run]) -> dict[float, list[Run]]:
    found: dict[float, list[Run]] = {}
    for run in sorted(runs, key=_offered):
        found.setdefault(_offered(run), []).append(run)
    return found


def _together(runs: Sequence[Run], since: Since) -> Share:
    """How many had their promises kept, of several loads."""
    shares = [attainment(run, since) for run in runs]
    return Share(sum(each.number for each in shares), sum(each.of for each in shares))


def _values(named: Named, kind: str, since: Since) -> dict[str, list[float]]:
    found = {
        label: latencies([record for record in run.records if record.done], since)[kind]
        for label, run in _labelled(named).items()
    }
    return {label: seconds for label, seconds in found.items() if seconds}


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
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
