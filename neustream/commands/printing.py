"""What commands print: results on stdout, progress and problems on stderr, and the files they write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from neustream.analysis.tables import by_model, classes_table, models_table, policies_table, tokens_table
from neustream.config import Config, Experiment, ModelsConfig, experiments_of
from neustream.core.events import Ended
from neustream.engine.events import Record, Refused

console = Console(markup=False, emoji=False, highlight=False)  # names of others are texts, whatever is in them
notes = Console(markup=False, emoji=False, highlight=False, stderr=True)
"""Of progress, and of what is good to know."""
problems = Console(markup=False, emoji=False, highlight=False, stderr=True)
"""Of what went wrong, which `--quiet` prints too."""


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """If `quiet`, nothing but problems is printed meanwhile."""
    before = console.quiet, notes.quiet
    console.quiet = notes.quiet = quiet
    try:
        yield
    finally:
        console.quiet, notes.quiet = before


@contextlib.contextmanager
def new_progress() -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=notes,
        refresh_per_second=2,  # drawing takes time from the steps of `run`
        disable=notes.quiet or not notes.is_terminal,
    )
    if bar.disable:
        yield bar
        return
    with bar:
        yield bar


class Ticks:
    """An observer that calls `tick` for each request that has ended."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick

    def __call__(self, record: Record) -> None:
        if isinstance(record, Ended | Refused):
            self._tick()


def note(progress: Progress, text: str) -> None:
    """Say how far the work is where there is no bar: a line in a log."""
    if progress.disable:
        notes.print(text, soft_wrap=True)


def wrote(path: Path) -> None:
    """Say which file was written."""
    console.print(f"wrote {path}", soft_wrap=True)


def say_notes(sentences: Sequence[str]) -> None:
    """Say on stderr how a trace was read."""
    for sentence in sentences:
        notes.print(sentence, soft_wrap=True)


def trace_paths(trace: Path | None, policies: Sequence[str]) -> dict[str, Path]:
    """The file of each policy's trace: the one asked for, or of several one each beside it; none if none is."""
    if trace is None:
        return {}
    if len(policies) == 1:
        return {policies[0]: trace}
    names = {policy: policy.replace(":", ".").replace(" @ ", "-") for policy in policies}
    return {policy: trace.with_name(f"{trace.stem}-{name}{trace.suffix}") for policy, name in names.items()}


def show(title: str, records: Sequence[dict[str, Any]]) -> None:
    """Print the table of the policies, and of outputs where there are language models.

    Of several models also what each got, and the outputs of each language model.
    """
    console.print(policies_table(title, records))
    if any("models" in entry for entry in records):
        console.print(models_table(records))
    parts = [part for entry in records for part in by_model(entry)]
    if any("tokens" in part for part in parts):
        console.print(tokens_table(parts))
    if any("classes" in entry for entry in records):
        console.print(classes_table(records))


def title_of(config: Config) -> str:
    """What was run, a line for each model."""
    if isinstance(config, ModelsConfig):
        devices = f"{config.instances} device{'s' if config.instances > 1 else ''}"
        models = [f"  {_title(name, one)}" for name, one in config.experiments().items()]
        return "\n".join([f"{config.name}: {len(models)} models on {devices}", *models])
    (experiment,) = experiments_of(config)
    return _title(experiment.name, experiment)


def _title(name: str, experiment: Experiment) -> str:
    load, slo = experiment.workload, experiment.slo
    rate = f"{load.rate:g} req/s" if load.load is None else f"{load.load:g}x solo load"
    arrivals = f"{load.arrivals} {rate}"
    if load.arrivals == "trace" and load.trace is not None:
        arrivals = f"trace {load.trace.name}" + (f" at {load.speed:g}x speed" if load.speed != 1 else "")
    burst = f", cv {load.cv:g}" if load.arrivals == "gamma" else ""
    promises = [f"{slo.scale:g}x solo"] if slo.scale else [f"{slo.total_s:g} s"] if slo.total_s else []
    for output, scale, seconds in (("TTFT", slo.first_scale, slo.first_s), ("TPOT", slo.step_scale, slo.step_s)):
        if scale or seconds:
            promises.append(f"{output} {scale:g}x solo" if scale else f"{output} {seconds:g} s")
    promise = f"SLO {', '.join(promises)}" if promises else "SLO classes" if slo.classes else "no SLO"
    return f"{name}: {arrivals}{burst}, {promise}, seed {load.seed}"
