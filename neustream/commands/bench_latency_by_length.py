"""`neustream bench latency-by-length`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from neustream.analysis.tables import new_table
from neustream.bench.by_length import ByLength, by_length
from neustream.commands.bench_compare import named_runs
from neustream.commands.bench_reporting import FoldersArgument, SentOption, since_of
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output, write_text
from neustream.commands.printing import console, hushed, wrote
from neustream.errors import ConfigError

FIGURE = "latency_by_length.png"


def command(
    folders: FoldersArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for the figure and CSV files.")] = None,
    sent: SentOption = False,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Latency against what requests ask for, as effective-batching plots it: tokens, or steps of images."""
    since = since_of(sent)
    with json_output(json_) as write, hushed(quiet):
        check_outputs(json_file(json_))
        named = {name: by_length(runs, since) for name, runs in named_runs(folders).items()}
        if len({found.unit for found in named.values()}) > 1:
            raise ConfigError("latency by length: expected texts in all folders, or images in all")
        if out is not None:
            check_folder("--out", out, [FIGURE, *(f"{Path(name).name}.csv" for name in named)])
        show_lengths(named)
        write({name: asdict(found) for name, found in named.items()})
        if out is not None:
            save_lengths(named, out)


def show_lengths(named: Mapping[str, ByLength]) -> None:
    """Print a row for each mode."""
    unit = next(iter(named.values())).unit
    singular = unit.removesuffix("s")
    table = new_table("", "", [f"{unit}/s", "as its /stats", f"s/{singular}", "requests", "failed"])
    for name, found in named.items():
        cells = [f"{found.throughput:.1f}", f"{found.own_throughput:.1f}", f"{found.per_unit_s:.4f}"]
        table.add_row(name, *cells, str(sum(each.number for each in found.lengths)), str(found.failed))
    table.caption = f"as its /stats: {unit} by the sum of latencies, as effective-batching counts"
    table.caption_justify = "left"
    console.print(table)


def save_lengths(named: Mapping[str, ByLength], folder: Path) -> None:
    """Write the CSV file of each mode, and the figure."""
    from neustream.bench.figures import plot_by_length

    for name, found in named.items():
        write_text(path := folder / f"{Path(name).name}.csv", found.csv())
        wrote(path)
    wrote(plot_by_length(named, folder / FIGURE))
