"""`neustream bench search`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from neustream.analysis.tables import new_table
from neustream.bench.planning import Law, Timing, plan_of
from neustream.bench.runs import Run, expected_size, records_file, write_runs
from neustream.bench.search import Found, Goal, Point, Search
from neustream.commands.bench_data import DataOptions
from neustream.commands.bench_options import PromiseOptions, ServerOptions
from neustream.commands.bench_playing import play, target_of
from neustream.commands.bench_printing import FIGURES, write_figures
from neustream.commands.bench_refused import VllmFlags
from neustream.commands.bench_reporting import since_of
from neustream.commands.bench_serve import asks_of
from neustream.commands.interrupts import INTERRUPTED
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import (
    check_folder,
    check_outputs,
    check_room,
    json_file,
    json_output,
    write_each,
    write_text,
)
from neustream.commands.printing import console, hushed, notes, problems, wrote
from neustream.commands.sharing import taking
from neustream.errors import ConfigError, nearest

CLASS = VllmFlags
NOT_FOUND = 5


class Interrupted(Exception):
    """A point was ended by Ctrl-C."""


@dataclass(frozen=True)
class SearchOptions:
    """What is looked for."""

    attainment: Annotated[float, typer.Option(min=0.01, max=0.9999, help="The share to be on time.")] = 0.9
    start_rate: Annotated[float, typer.Option(min=1e-4, max=1e6, help="Requests a second to begin with.")] = 1.0
    min_rate: Annotated[float, typer.Option(min=1e-4, max=1e6, help="No lower one is tried.")] = 0.01
    max_rate: Annotated[float, typer.Option(min=1e-4, max=1e6, help="No higher one is tried.")] = 10_000.0
    precision: Annotated[float, typer.Option(min=0.001, max=1.0, help="How close it is to be found.")] = 0.02
    max_points: Annotated[int, typer.Option(min=1, max=100, help="The most rates that are measured.")] = 10
    confirm: Annotated[int, typer.Option(min=0, max=10, help="How often the found one is measured again.")] = 2
    point_s: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds of a point.")] = 30.0
    max_point_s: Annotated[float, typer.Option(min=0.1, max=86_400, help="The most, where it is not sure.")] = 120.0
    min_requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of a point.")] = 100
    burstiness: Annotated[float, typer.Option(help="1 / cv**2 of the gaps; 1: Poisson.")] = 1.0
    arrivals: Annotated[str, typer.Option(help="gamma, constant or conditioned.")] = "gamma"
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for records and figures.")] = None

    def requests(self, rate: float, seconds: float) -> int:
        """Of a point at so many a second, for so long."""
        return max(self.min_requests, round(rate * seconds))

    def goal(self) -> Goal:
        """ConfigError names the option that is wrong."""
        if self.arrivals not in get_args(Law):
            raise ConfigError(f"--arrivals {self.arrivals!r}: {nearest(self.arrivals, get_args(Law))}")
        if not self.burstiness > 0:
            raise ConfigError(f"--burstiness {self.burstiness:g}: expected more than 0")
        if not self.min_rate <= self.start_rate <= self.max_rate:
            raise ConfigError(f"--start-rate {self.start_rate:g}: expected one from --min-rate to --max-rate")
        if self.confirm >= self.max_points:
            raise ConfigError(f"--confirm {self.confirm}: expected fewer than --max-points")
        bounds = (self.attainment, self.start_rate, self.min_rate, self.max_rate)
        return Goal(*bounds, self.precision, self.max_points, self.confirm, self.point_s, self.max_point_s)


@taking(ServerOptions, DataOptions, PromiseOptions, SearchOptions)
def command(
    server: ServerOptions,
    data: DataOptions,
    promises: PromiseOptions,
    options: SearchOptions,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find the highest rate at which enough requests are on time (--goodput or --slo-class say when).

    Exit code 5 beside those below: no rate was found, since all that may be tried are on one side.
    """
    with json_output(json_) as write, hushed(quiet):
        goal = options.goal()
        texts = server.texts()
        if not promises.limits().promises and not promises.classes():
            raise ConfigError("--goodput or --slo-class: what is on time must be said")
        check_outputs(json_file(json_))
        if options.out is not None:
            check_folder("--out", options.out, ["runs.json", records_file(0), *FIGURES])
        first = asks_of(data, promises, texts, 1)
        if options.out is not None:
            size = expected_size(first, server.ignore_eos).times(options.requests(options.start_rate, options.point_s))
            check_room("--out", options.out, size.least, size.most)
        target = target_of(server, first, 0.0)

        def measure(rate: float, seed: int, seconds: float) -> Run:
            count = options.requests(rate, seconds)
            timing = Timing(rate, options.burstiness, options.arrivals)  # type: ignore[arg-type]
            asks = asks_of(data, replace(promises, seed=seed), texts, count)
            run = play(plan_of(asks, timing, seed, f"rate {rate:.4g}"), target, texts, promises.workers)
            if run.interrupted:
                raise Interrupted
            return run

        search = Search(goal, _told(measure), promises.seed, since_of(promises.from_sent))
        interrupted = _searched(search)
        found = search.found
        _show(found)
        folder = options.out
        write_each(
            lambda: write(found.to_dict()),
            lambda: None if folder is None else _save(found, folder, promises),
        )
        _end(found, interrupted)


def _told(measure: Callable[[float, int, float], Run]) -> Callable[[float, int, float], Run]:
    """The same, said on stderr beforehand."""

    def told(rate: float, seed: int, seconds: float) -> Run:
        notes.print(f"{rate:.4g} requests/s, about {seconds:g} s")
        return measure(rate, seed, seconds)

    return told


def _searched(search: Search) -> bool:
    """Search; whether it was interrupted."""
    try:
        search.run()
    except Interrupted:
        return True
    return False


def _show(found: Found) -> None:
    table = new_table("", "rate", ["on time (95 %)", "served/s", "sure", ""])
    for point in [*found.points, *found.confirmed]:
        table.add_row(f"{point.rate:.4g}", *_cells(point, found.goal))
    console.print(table)
    if found.rate is None:
        console.print(f"not bracketed: below {min((p.rate for p in found.points), default=0.0):.4g}/s")
    elif found.fails is None:
        console.print(f"not bracketed: above {found.rate:.4g}/s, {found.share} on time")
    else:
        console.print(f"{found.rate:.4g}/s, {found.share} on time; too few at {found.fails:.4g}/s")
        if not found.precise:
            problems.print("not as precise as was asked for: allow more points (--max-points)")
    if found.rate is not None and not found.holds:
        goal = f"{found.goal.attainment * 100:g} %"
        problems.print(f"not confirmed: at {found.rate:.4g}/s, measured again, all together are below {goal}")
    if not all(point.valid for point in found.points):
        problems.print("not valid: the client was late at some rates (more --workers?)")


def _cells(point: Point, goal: Goal) -> list[str]:
    met = "" if point.met(goal) else "too few"
    return [str(point.share), f"{point.served:.4g}", "yes" if point.sure else "no", met]


def _save(found: Found, folder: Path, promises: PromiseOptions) -> None:
    runs = [run for point in [*found.points, *found.confirmed] for run in point.runs]
    about: dict[str, Any] = {"search": found.to_dict()}
    for path in write_runs(folder, runs, write_text, **about):
        wrote(path)
    if runs:
        write_figures({folder.resolve().name: runs}, folder, since_of(promises.from_sent))


def _end(found: Found, interrupted: bool) -> None:
    if interrupted:
        problems.print(f"interrupted: {len(found.points)} points are measured")
        raise typer.Exit(INTERRUPTED)
    if found.bracketed != "yes":
        raise typer.Exit(NOT_FOUND)
