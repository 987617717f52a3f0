"""Claims made of data, by the formulas of Llumnix's artifact; and what its data does not say.

"Up to" is the largest ratio over all points of a figure, without intervals: a single point decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Figure = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""By trace (or class), system and metric: a value for each rate (or cv)."""


def speedup(figure: Figure, metric: str, base: str = "infaas++", ours: str = "llumnix") -> float:
    """The largest ratio of the two systems over all points of a figure."""
    ratios = [1.0]
    for systems in figure.values():
        for before, after in zip(systems[base][metric], systems[ours][metric], strict=True):
            if after > 0:
                ratios.append(before / after)
    return max(ratios)


def less(figure: Figure, metric: str, base: str = "infaas++", ours: str = "llumnix") -> float:
    """By what share a metric, added up over all points, is less."""
    before = sum(sum(systems[base][metric]) for systems in figure.values())
    after = sum(sum(systems[ours][metric]) for systems in figure.values())
    return float(1 - after / before) if before else 0.0


def at_equal(points: Sequence[Sequence[float]], p99: float) -> float:
    """Instances at which a system reaches a P99, between its points; ValueError outside of them."""
    ordered = sorted(points, key=lambda point: -point[1])
    for (many, high), (more, low) in pairwise(ordered):
        if low <= p99 <= high:
            return many + (high - p99) / (high - low) * (more - many)
    raise ValueError(f"no two points around a P99 of {p99:g} s: {points}")


def saving(figure: Mapping[str, Any]) -> float:
    """The largest share of instances that is saved at equal P99, over the points of figure 15.

    Only where both systems have points on either side of a P99.
    """
    shares = []
    for instances, p99 in figure["infaas++"]:
        try:
            shares.append(1 - at_equal(figure["llumnix"], p99) / instances)
        except ValueError:
            continue
    return float(max(shares))


def claim_11(figure: Figure) -> str:
    """Figure 11: serving performance, Llumnix against INFaaS++."""
    lines = ["Figure 11, Llumnix against INFaaS++, over all traces and rates:"]
    for what in ("request", "prefill", "decode"):
        mean, p99 = speedup(figure, f"{what}_mean"), speedup(figure, f"{what}_p99")
        lines.append(f"{what} latency: up to {mean:.2f}x (mean) and {p99:.2f}x (P99)")
    lines.append(f"preemption loss: {less(figure, 'preemption_loss'):.1%} less, added up over all points")
    return "\n".join(lines)


def claim_13(figure: Mapping[str, Figure]) -> str:
    """Figure 13: two classes, Llumnix against Llumnix-base, which knows none."""
    high, normal = {"high": figure["high"]}, {"normal": figure["normal"]}
    lines = ["Figure 13, Llumnix against Llumnix-base:"]
    for what in ("request", "prefill", "decode"):
        ratios = [speedup(high, f"{what}_{of}", "llumnix-base") for of in ("mean", "p99")]  # type: ignore[arg-type]
        lines.append(f"high, {what}: up to {ratios[0]:.2f}x (mean) and {ratios[1]:.2f}x (P99)")
        worse = speedup(normal, f"{what}_mean", "llumnix", "llumnix-base") - 1  # type: ignore[arg-type]
        lines.append(f"normal, {what}: at most {worse:.1%} worse (mean)")
    return "\n".join(lines)


def claim_14(figure: Figure) -> str:
    """Figure 14: scaling, Llumnix against INFaaS++."""
    ratio = speedup(figure, "instances")
    return "\n".join(
        [
            "Figure 14, Llumnix against INFaaS++:",
            f"P99 of prefill: up to {speedup(figure, 'prefill_p99'):.2f}x",
            f"instances: up to {1 - 1 / ratio:.1%} fewer at the same rate",
            f"(the paper's saving is INFaaS++ over Llumnix, less 1: {ratio - 1:.1%})",
        ]
    )


def claim_15(figure: Mapping[str, Any]) -> str:
    """Figure 15: instances at equal P99 of prefill. The paper's 36 % compares unequal ones."""
    return "\n".join(
        [
            "Figure 15, instances at equal P99 of prefill, interpolated between points:",
            f"up to {saving(figure):.1%} fewer. 36 % is 14.25 / 10.44 - 1: more instances of INFaaS++ at 4.59 s",
            "than of Llumnix at 11.4 s.",
        ]
    )
