"""`neustream cluster status`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.analysis.tables import new_table
from neustream.commands.asking import Server
from neustream.commands.client import KEY
from neustream.commands.keys import keys_in
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed
from neustream.errors import BackendError

NOT_READY = 3
COLUMNS = ["state", "requests", "waiting", "work s", "told s", "in / out", "place"]


def command(
    url: Annotated[str, typer.Argument(metavar="ADDRESS", help="Of the server.")] = "http://127.0.0.1:8000",
    api_key_file: Annotated[Path | None, typer.Option(help=f"A file with a key; or set {KEY}.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, max=86_400.0, help="Of each read.")] = 10.0,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Say how the instances of a cluster behind a server are: load, moves, readiness.

    Exit codes beside those below: 3 it serves, but not all that was asked for is there.
    """
    with json_output(json_) as write, hushed(quiet):
        check_outputs(json_file(json_))
        key = keys_in(api_key_file)[0] if api_key_file else os.environ.get(KEY)
        whole = url if "://" in url else f"http://{url}"
        found = Server(whole, key, timeout_s).cluster()
        try:
            _show(whole, found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BackendError(f"{whole}/cluster: not what a server of this version says: {error!r}") from None
        write(found)
        if found["state"] != "ready":
            raise typer.Exit(NOT_READY)


def _show(url: str, found: Mapping[str, Any]) -> None:
    """A table of the instances, and what happened between them."""
    reason = f" ({found['reason']})" if found["reason"] else ""
    title = f"{url}: {found['state']}{reason}, {found['open']} open"
    table = new_table(title, "instance", COLUMNS)
    table.caption = "work: seconds that are there; told: since the latest report; in / out: requests that moved"
    for name, each in found["instances"].items():
        load = [str(each["live"]), str(each["waiting"]), f"{each['backlog_s']:.2f}", f"{each['told_ago_s']:.2f}"]
        table.add_row(name, each["state"], *load, f"{each['moved_in']} / {each['moved_out']}", each["place"])
    console.print(table)
    console.print(f"moves: {_moves(found)}", soft_wrap=True)
    console.print(f"begun anew: {found['restarted']} requests; lost: {found['lost']} instances", soft_wrap=True)
    for said, ends in found["forecasts"].items():
        count = ends["on_time"] + ends["not_on_time"]
        console.print(f"forecast {said!r}: {ends['on_time']} of {count} on time", soft_wrap=True)
    for what, error in found["forecast_error_s"].items():
        spread = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in error.items())
        console.print(f"the {what} came after its forecast by {spread}", soft_wrap=True)


def _moves(found: Mapping[str, Any]) -> str:
    """Moves by reason, and how long requests stood still."""
    told = [f"{count} {reason}" for reason, count in found["moves"].items()]
    told += [f"standing still {name} {_ms(seconds)}" for name, seconds in found["downtime_s"].items()]
    failed = sum(found["unmoved"].values())
    return ", ".join([*(told or ["none"]), *([f"{failed} came to nothing"] if failed else [])])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
