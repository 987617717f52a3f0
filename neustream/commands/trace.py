"""`neustream trace`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed, notes, wrote
from neustream.errors import ConfigError, nearest
from neustream.workload import FORMATS, Trace, take, write_trace
from neustream.workload.formats.normal import suffix_of
from neustream.workload.summary import BINS, Summary, summarize

BARS, PLAIN_BARS = " ▁▂▃▄▅▆▇█", " _.-=+*#@"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The trace, also gzipped.")],
    format: Annotated[str, typer.Option(help=f"auto (by content), {', '.join(FORMATS)}.")] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, for texts without lengths.")] = None,
    json_: JsonOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Write it in the normal form: .csv or .jsonl, also with .gz behind.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Say what a trace holds: rows, span, rate, burstiness, lengths, and what of it is not read."""
    if format != "auto" and format not in FORMATS:
        raise ConfigError(f"--format {format!r}: {nearest(format, ['auto', *FORMATS])}")
    with json_output(json_) as write, hushed(quiet):
        check_outputs([*json_file(json_), *([("--out", out)] if out else [])])
        if out:
            suffix_of(out)
        trace = Trace(file, format, tokenizer)
        with notes.status(f"reading {file}"):
            summary = summarize(trace)
        show_summary(summary)
        write(summary.to_dict())
        if out:
            with notes.status(f"writing {out}"):
                write_trace(out, take(trace).rows)
            wrote(out)


def show_summary(summary: Summary) -> None:
    """Print the numbers, arrivals over time and the spread of lengths."""
    _say(f"{summary.path}: {summary.format}, {summary.rows:,} rows")
    if summary.span_s is None:
        _say("no arrivals: a workload draws them (workload.arrivals, workload.rate)")
    else:
        since = f" from {summary.origin}" if summary.origin else ""
        rate = f", {_number(summary.rate)} requests/s" if summary.rate is not None else ""
        burst = f", cv of gaps {_number(summary.cv)}" if summary.cv is not None else ""
        _say(f"{_number(summary.span_s)} s{since}{rate}{burst}")
    if summary.span_s:
        width = summary.span_s / BINS
        _say("")
        _say(bars(summary.per_bin))
        _say(f"arrivals, {_number(width)} s a bar, at most {_number(max(summary.per_bin) / width)} requests/s")
    if summary.numbers:
        console.print()
        console.print(_table(summary))
    for name, count in summary.names.items():
        _say(f"{name}: {count:,} different")
    for sentence in summary.notes:
        _say(sentence)


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(summary: Summary) -> Table:
    headings = ["rows", "mean", "least", "p50", "p90", "p99", "most", "least to p99"]
    table = new_table("", "", headings)
    for name, spread in summary.numbers.items():
        cells = [_number(spread[key]) for key in ("mean", "p0", "p50", "p90", "p99", "p100")]
        shape = bars(spread["shape"]) if spread["p99"] > spread["p0"] else ""
        table.add_row(name, f"{spread['rows']:,}", *cells, shape)
    return table


def bars(counts: Sequence[int]) -> str:
    """A bar for each number, as high as its share of the largest; what is not 0 is to be seen."""
    characters = BARS if console.encoding.lower().startswith("utf") else PLAIN_BARS
    most, steps = max(1, *counts), len(characters) - 1
    return "".join(characters[-(-count * steps // most)] for count in counts)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
