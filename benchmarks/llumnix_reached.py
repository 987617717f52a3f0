"""What ours has to reach beside the points of Llumnix's figures, each held or failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

KNEE_S = 1.0
"""Mean seconds of prefill from which on a system of the paper is beyond its knee."""
LATENCY, LOSS, KNEE, SCALED = 0.10, 0.80, 0.05, 0.05
"""Shares: by which latencies may differ, that migration takes of preemption loss, by which the rate of a knee may
differ, and the number of instances that come and go with the load."""
Series = Mapping[str, Sequence[float]]


def reached_11(ours: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    """Figure 11, of the points that were simulated: latencies below the knee, preemption loss, and the knee."""
    lines: list[str] = []
    for panel, systems in ours.items():
        theirs = paper.get(panel, {})
        for name, of in systems.items():
            lines += _latencies(f"{panel} {name}", of, theirs.get(name))
        lines += _losses(panel, systems, theirs)
        for name, of in systems.items():
            lines += _knees(f"{panel} {name}", of, theirs.get(name))
    return lines


def reached_14(ours: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    """Figure 14: how many instances there are on average, at each rate."""
    lines = []
    for panel, systems in ours.items():
        for name, of in systems.items():
            for x, mine, his in _beside(of, paper.get(panel, {}).get(name), "instances"):
                lines.append(_line(f"{name} at {x:g}: instances within {SCALED:.0%}", mine / his - 1, SCALED))
    return lines


def knee(of: Series) -> float | None:
    """The rate at which the mean prefill takes `KNEE_S`, between two points; None outside of them."""
    points = list(zip(of["x"], of["prefill_mean"], strict=True))
    for (rate, low), (more, high) in pairwise(points):
        if low < KNEE_S <= high:
            return rate + (KNEE_S - low) / (high - low) * (more - rate)
    return None


def _beside(ours: Series, paper: Series | None, metric: str) -> Iterator[tuple[float, float, float]]:
    """The places that both have, with ours and the paper's."""
    if paper is None:
        return
    for at, x in enumerate(ours["x"]):
        if x in paper["x"]:
            yield x, ours[metric][at], paper[metric][list(paper["x"]).index(x)]


def _latencies(what: str, of: Series, paper: Series | None) -> Iterator[str]:
    below = {x for x, _, prefill in _beside(of, paper, "prefill_mean") if prefill < KNEE_S}
    for metric in ("request_mean", "decode_mean"):
        for x, mine, his in _beside(of, paper, metric):
            if x in below:
                yield _line(f"{what} at {x:g}: {metric} within {LATENCY:.0%}", mine / his - 1, LATENCY)


def _losses(panel: str, ours: Mapping[str, Series], paper: Mapping[str, Series]) -> Iterator[str]:
    """Where the paper's Llumnix takes so much of INFaaS++'s preemption loss away."""
    pair = "infaas++", "llumnix"
    if not all(name in ours and name in paper for name in pair):
        return
    before, after = [{x: both for x, *both in _beside(ours[n], paper[n], "preemption_loss")} for n in pair]
    for x in before:
        if x not in after or 1 - after[x][1] / before[x][1] < LOSS:
            continue
        taken = 1 - after[x][0] / before[x][0] if before[x][0] else 0.0
        verdict = "held" if taken >= LOSS else "failed"
        yield f"{verdict}: {panel} at {x:g}: migration takes {LOSS:.0%} of preemption loss ({taken:.0%})"


def _knees(what: str, of: Series, paper: Series | None) -> Iterator[str]:
    mine, his = knee(of), None if paper is None else knee(paper)
    if mine is not None and his is not None:
        yield _line(f"{what}: knee within {KNEE:.0%} of {his:.3g} a second", mine / his - 1, KNEE)


def _line(what: str, off: float, bound: float) -> str:
    return f"{'held' if abs(off) <= bound else 'failed'}: {what} ({off:+.1%})"


def ratios(by_seed: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]) -> Iterator[str]:
    """INFaaS++ over Llumnix at one point, by seed: the mean, and the least and the largest."""
    for metric in metrics:
        pairs = zip(by_seed["infaas++"], by_seed["llumnix"], strict=True)
        found = [before[metric] / after[metric] for before, after in pairs if after[metric] > 0]
        if found:
            yield f"{metric} {sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f})"
