"""Reports as tables for the terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich import box
from rich.table import Table

Record = dict[str, Any]


def new_table(title: str, first: str, headings: Sequence[str]) -> Table:
    """A plain table: the first column names, the others hold numbers. Where it is narrow, names are folded."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


SAID = {"bound": "the most that any scheduler could serve", "hindsight": "a schedule found by search"}
"""What the goodput of policies is compared with."""
SHORT = 11
"""Letters of a name beside which 80 columns have room for the time that decisions take."""
Cell = Callable[[Record], str]
Column = tuple[str, Cell]
"""Its heading, and the cell of a record."""


def policies_table(title: str, records: Sequence[Record]) -> Table:
    """One row a policy; where records hold what was simulated, `served / simulated` in the cells."""
    paired = any("simulated" in record for record in records)
    reach = [what for what in SAID if f"{what}_ratio" in records[0]]
    columns = [*_counts(records), *_measures(records, paired, reach), *_decisions(records, paired, reach)]
    table = new_table(title, "policy", [heading for heading, _ in columns])
    for record in records:
        table.add_row(record["policy"], *(cell(record) for _, cell in columns))
    notes = ["a/b: served/simulated"] if paired else []
    notes += [f"{what} {records[0][what]['value']:g}: {SAID[what]}" for what in reach]
    if notes:
        table.caption = "; ".join(notes)
        table.caption_justify = "left"
    return table


def _counts(records: Sequence[Record]) -> list[Column]:
    """What became of requests; what became of none is left out where that is usual."""
    rare = [key for key in ("failed", "cancelled") if any(record["counts"][key] for record in records)]
    return [(key.replace("_", " "), partial(_count, key=key)) for key in ("on_time", "late", "dropped", *rare)]


def _measures(records: Sequence[Record], paired: bool, reach: Sequence[str]) -> list[Column]:
    """The columns of measures; with few digits where a cell holds two, and fewer where `reach` needs room."""
    fewer = 1 if paired else 0
    measures: list[Column] = [
        ("goodput/s", lambda record: _number(record["goodput_rps"], 3 - fewer)),
        ("SLO met", lambda record: f"{record['attainment']:.{1 - fewer}%}"),
    ]
    if not paired and not reach and not any("tokens" in record for record in records):
        measures.append(("p50 s", lambda record: _number(record["latency_s"]["p50"], 2)))
    measures.append(("p99 s", lambda record: _number(record["latency_s"]["p99"], 2)))
    if not reach:
        measures.append(("batch", lambda record: _number(loop_batch(record), 2 - fewer)))
    measures += [(f"of {what}", partial(_share, key=f"{what}_ratio")) for what in reach]
    return [(heading, partial(_beside, cell)) for heading, cell in measures] if paired else measures


def _decisions(records: Sequence[Record], paired: bool, reach: Sequence[str]) -> list[Column]:
    """The time that decisions take, where there is room for it."""
    longest = max(len(record["policy"]) for record in records)
    if paired or reach or longest > SHORT:
        return []
    return [("decide us", lambda record: _number(record["decision_us"]["p50"], 0))]


def _beside(cell: Cell, record: Record) -> str:
    """What was served, and what was simulated."""
    return f"{cell(record)}/{cell(record['simulated'])}"


def _count(record: Record, key: str) -> str:
    return str(record["counts"][key])


def tokens_table(records: Sequence[Record]) -> Table:
    """What the outputs of language models were like, one row a policy; of finished requests.

    Of models whose answers come as a whole, as images do, nothing is a first output: they have no row.
    """
    shown = [record for record in records if "tokens" in record]
    table = new_table(
        "outputs; medians and p99 in ms",
        "policy",
        ["tok/s", "TTFT", "p99", "TPOT", "p99", "ITL", "p99", "client met", "preempted"],
    )
    for record in shown:
        tokens = record["tokens"]
        cells = [_number(tokens["goodput_tps"], 0)]
        for name, quantile in (("ttft", 50), ("ttft", 99), ("tpot", 50), ("tpot", 99), ("itl", 50), ("itl", 99)):
            seconds = tokens[f"{name}_s"][f"p{quantile}"]
            cells.append("-" if seconds is None else f"{seconds * 1e3:.0f}")
        table.add_row(record["policy"], *cells, f"{tokens['client_attainment']:.1%}", str(record.get("preemptions", 0)))
    table.caption = "tok/s: in time; client met: TTFT, mean TPOT and E2EL in their SLO (vllm bench --goodput)"
    if len(shown) < len(records):
        table.caption += "; answers that come as a whole (images) have no first output, so no TTFT"
    table.caption_justify = "left"
    return table


def by_model(record: Record) -> list[Record]:
    """The parts of a record by model, named after policy and model; itself where there is one."""
    if "models" not in record:
        return [record]
    policy = record["policy"]
    return [{**part, "policy": f"{policy}, {name}"} for name, part in record["models"].items()]


def models_table(records: Sequence[Record]) -> Table:
    """What each of several models got, a row a policy and model."""
    headings = ["requests", "on time", "goodput/s", "SLO met", "p50 s", "p99 s"]
    table = new_table("by model", "policy", headings)
    for part in (part for record in records for part in by_model(record)):
        counts, latency = part["counts"], part["latency_s"]
        cells = [str(counts["submitted"]), str(counts["on_time"]), _number(part["goodput_rps"], 3)]
        cells += [f"{part['attainment']:.1%}", *(_number(latency[q], 2) for q in ("p50", "p99"))]
        table.add_row(part["policy"], *cells)
    return table


def classes_table(records: Sequence[Record]) -> Table:
    """Requests on time by class of promises (and model, where there are several), a row a policy."""
    names = dict.fromkeys(name for record in records for name in record.get("classes", ()))
    table = new_table("on time, of requests of a class", "policy", [name or "no class" for name in names])
    for record in records:
        shares = record.get("classes", {})
        cells = [_of(shares[name]) if name in shares else "-" for name in names]
        table.add_row(record["policy"], *cells)
    return table


def _of(share: Record) -> str:
    return f"{share['on_time']}/{share['submitted']}"


def loop_batch(record: Record) -> float | None:
    """The largest mean batch size of any stage: that of the loop, usually."""
    return max((size for size in record["batch_size"].values() if size is not None), default=None)


def counts_requests(record: Mapping[str, Any]) -> bool:
    """Whether a record's bound counts requests: each of them weighs 1."""
    return bool(record["bound"]["weight"] == record["counts"]["submitted"])


def _share(record: Record, key: str) -> str:
    return f"{record[key]:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
