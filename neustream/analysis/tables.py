"""Reports as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Record = dict[str, Any]


def policies_table(title: str, records: Sequence[Record]) -> Table:
    """One row a policy; where a record holds what was predicted for it, that beside it."""
    predicted = any("simulated" in record for record in records)
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    headings = ["on time", "late", "dropped", "failed", "cancelled", "goodput req/s", "attainment", "p50 s", "p99 s"]
    for heading in [*headings, "batch", "decide us"]:
        table.add_column(heading, justify="right")
    if predicted:
        for heading in ("simulated goodput", "attainment", "p99 s", "batch"):
            table.add_column(heading, justify="right", style="dim")
    for record in records:
        counts = record["counts"]
        row = [record["policy"], *(str(counts[key]) for key in ("on_time", "late", "dropped", "failed", "cancelled"))]
        row += [f"{record['goodput_rps']:.3f}", f"{record['attainment']:.1%}"]
        row += [_number(record["latency_s"]["p50"]), _number(record["latency_s"]["p99"])]
        row += [_number(loop_batch(record), 2), _number(record["decision_us"]["p50"], 0)]
        if predicted:
            other = record["simulated"]
            row += [f"{other['goodput_rps']:.3f}", f"{other['attainment']:.1%}"]
            row += [_number(other["latency_s"]["p99"]), _number(loop_batch(other), 2)]
        table.add_row(*row)
    return table


def loop_batch(record: Record) -> float | None:
    """Mean batch size of the stage that has the most requests in its steps on average."""
    return max((size for size in record["batch_size"].values() if size is not None), default=None)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
