"""What the results say: shares of the bound and of the best baseline, and points behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from grid.digests import BOUND, EXTRA, HINDSIGHT
from grid.plan import Point
from grid.policies import OURS

BEHIND = 0.01
"""Of the requests: so many more on time have a policy behind."""

Table = list[list[str]]
Value = str | float


@dataclass(frozen=True)
class Row:
    """What is known of a point: weight on time by policy, and of how much."""

    kind: str
    group: str
    config: str
    seed: int
    condition: Mapping[str, Value]
    requests: float
    on_time: Mapping[str, float]
    bound: float | None = None
    hindsight: float | None = None

    @property
    def best(self) -> float:
        """What the best baseline serves on time."""
        return max(value for policy, value in self.on_time.items() if policy != OURS)

    @property
    def contended(self) -> bool:
        """Whether the bound is below 99 percent, or the best baseline leaves 1.5 percent of what can be had."""
        if self.bound is not None and self.bound < 0.99 * self.requests:
            return True
        return self.best < 0.985 * (self.requests if self.bound is None else self.bound)

    def behind(self, policy: str) -> bool:
        """Whether some baseline has more than a percent of the requests more on time."""
        return self.best - self.on_time[policy] > BEHIND * self.requests

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {shown(value)}" for key, value in self.condition.items())

    @property
    def impossible(self) -> bool:
        """Whether somebody exceeds the bound: then the bound is wrong."""
        reached = [*self.on_time.values(), self.hindsight or 0.0]
        return self.bound is not None and max(reached) > self.bound + 1e-6

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})


def shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def row_of(point: Point, names: Mapping[str, str], known: Mapping[str, Mapping[str, float]]) -> Row | None:
    """The row of a point; None if a baseline's result is not there, or there is none of ours."""
    extra = {what: known.get(names.get(what, ""), {}).get("value") for what in EXTRA}
    results = {what: known[key] for what, key in names.items() if what not in EXTRA and key in known}
    if len(results) < len(set(names) - set(EXTRA)):
        return None
    return Row(
        kind=point.kind,
        group=point.group,
        config=point.config,
        seed=point.seed,
        condition=point.condition,
        requests=next(iter(results.values()))["of"],
        on_time={policy: result["on_time"] for policy, result in results.items()},
        bound=extra[BOUND],
        hindsight=extra[HINDSIGHT],
    )


def markdown(rows: Sequence[Row], command: str) -> str:
    """The one summary, then a table for each kind, and the points where ours is behind."""
    lines = ["# Policies on one grid, simulated", "", f"`{command}`", ""]
    lines += ["Weight on time. Means and worst cases are over contended points, `behind` counts all.", ""]
    if all(OURS in row.on_time for row in rows):
        lines += section(f"`{OURS}`", ours_by_group(rows))
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        lines += section(f"All policies, {kind}", by_policy(some))
    if all(OURS in row.on_time for row in rows):
        lines += section(
            f"Where a baseline has over {BEHIND:.0%} of the requests more than `{OURS}`", points_behind(rows)
        )
    return "\n".join(lines)


def section(title: str, table: Table) -> list[str]:
    head, *body = table
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in body), ""]


COLUMNS = ["contended", "share of bound", "worst", "of hindsight", "to best baseline", "worst", "behind"]


def ours_by_group(rows: Sequence[Row]) -> Table:
    """A line for all points, one for each kind, and one for each group."""
    table = [["", *COLUMNS], ["**all**", *measures(rows, OURS)]]
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        table.append([f"**{kind}**", *measures(of_kind, OURS)])
        for group in dict.fromkeys(row.group for row in of_kind):
            table.append([group, *measures([row for row in of_kind if row.group == group], OURS)])
    return table


def by_policy(rows: Sequence[Row]) -> Table:
    """A line for each policy, for the best baseline of each point, and for the bound."""
    table = [["", *COLUMNS], *([f"`{policy}`", *measures(rows, policy)] for policy in rows[0].on_time)]
    some = [row for row in rows if row.contended]
    known = [row for row in some if row.bound is not None]
    shares = [row.best / row.bound for row in known if row.bound]
    room = [row.bound / row.best for row in known if row.bound and row.best]
    if shares:
        table.append(["best baseline", str(len(some)), mean(shares), worst(shares), "-", "1.000", "1.000", "-"])
        table.append(["bound", str(len(some)), "1.000", "1.000", "-", mean(room), worst(room), "-"])
    return table


def measures(rows: Sequence[Row], policy: str) -> list[str]:
    """Shares of a policy over contended points: of the bound, of hindsight, of the best baseline."""
    some = [row for row in rows if row.contended]
    bound = ratios(some, policy, lambda row: row.bound)
    best = ratios(some, policy, lambda row: row.best)
    behind = f"{sum(row.behind(policy) for row in rows)} of {len(rows)}"
    hindsight = mean(ratios(some, policy, lambda row: row.hindsight))
    return [str(len(some)), mean(bound), worst(bound), hindsight, mean(best), worst(best), behind]


def ratios(rows: Sequence[Row], policy: str, of: Callable[[Row], float | None]) -> list[float]:
    """What a policy serves over something, where that is known and not 0."""
    return [row.on_time[policy] / x for row in rows if (x := of(row))]


def mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else "-"


def worst(values: Sequence[float]) -> str:
    return f"{min(values):.3f}" if values else "-"


def points_behind(rows: Sequence[Row]) -> Table:
    """Where ours is behind, the worst first: of whom, and by how many of how many requests."""
    table = [["group", "config", "condition", "seed", "on time", "better"]]
    for row in sorted(rows, key=lambda row: (row.on_time[OURS] - row.best) / row.requests):
        if row.behind(OURS):
            ours = row.on_time[OURS]
            least = ours + BEHIND * row.requests
            better = sorted((-value, policy) for policy, value in row.on_time.items() if value > least)
            by = ", ".join(f"{policy} +{-value - ours:g}" for value, policy in better)
            table.append([row.group, row.config, row.label, str(row.seed), f"{ours:g} of {row.requests:g}", by])
    return table
