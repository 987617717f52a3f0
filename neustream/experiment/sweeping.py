"""Sweeps: many simulations at once, on several processes, and kept as they finish.

A `Unit` is what one process does in one go; `fingerprint` names everything that its results depend on, so
that results kept by an earlier sweep are used again exactly where nothing of that has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import numpy as np

import neustream
from neustream.config import Config, Experiment, ModelsConfig, experiments_of
from neustream.engine.trace import EventLog
from neustream.errors import NeustreamError
from neustream.experiment.clusters import parted
from neustream.experiment.pipelines import pipeline_of
from neustream.experiment.prepared import prepare
from neustream.experiment.roles import folder_of
from neustream.experiment.running import ByModel, record, simulate


@dataclass(frozen=True)
class Unit:
    """One point of a sweep under some policies; `stage` is whose batches are kept for the figure, if any."""

    config: Config
    over: str
    value: float
    policies: tuple[str, ...]
    bound: bool = False
    stage: str | None = None


@dataclass(frozen=True)
class Batches:
    """Batch sizes of one stage over time: where they change, and to what; and when the last request came."""

    times: Sequence[float]
    sizes: Sequence[int]
    last_arrival: float


@dataclass(frozen=True)
class Point:
    """What came of one policy at one point: an entry of the results, and batches if they were asked for."""

    entry: Mapping[str, Any]
    batches: Batches | None = None


def batches_of(log: EventLog, stage: str) -> Batches:
    """Batch sizes of `stage` in a log, 0 where it paused for longer than one of its steps took."""
    changes: list[tuple[float, int]] = []
    ended, lasted = 0.0, 0.0
    for step in (step for step in log.steps if step["stage"] == stage):
        if step["start"] > ended + lasted:
            changes.append((ended, 0))
        changes.append((step["start"], len(step["jobs"])))
        ended, lasted = step["end"], step["end"] - step["start"]
    changes.append((ended, 0))
    seen = [change for before, change in itertools.pairwise([(0.0, -1), *changes]) if change[1] != before[1]]
    last_arrival = max((request["arrival"] for request in log.requests.values()), default=0.0)
    return Batches([at for at, _ in seen], [size for _, size in seen], last_arrival)


def run_unit(unit: Unit) -> list[Point]:
    """Simulate a unit: a point for each of its policies."""
    prepared = prepare(unit.config)
    most = None
    if unit.bound:
        from neustream.analysis.headroom import bound_of, headroom

        most = bound_of(prepared)
    points = []
    for policy in unit.policies:
        log = EventLog() if unit.stage is not None else None
        by_model = ByModel(unit.config)
        report = simulate(prepared, policy, [by_model, log] if log else [by_model])
        entry = {"over": unit.over, "value": unit.value, **record(unit.config, policy, report, by_model)}
        if most is not None:
            entry |= headroom(prepared, report, most, None)
        points.append(Point(entry, batches_of(log, unit.stage) if log and unit.stage else None))
    return points


# -- several processes ------------------------------------------------------------------------------


def run_units(units: Sequence[Unit], jobs: int) -> Iterator[tuple[Unit, list[Point]]]:
    """Run units on up to `jobs` processes, and give each as it is done; what goes on meanwhile ends with the iterator.

    Raises:
        NeustreamError: what a unit raised, or that a process died.
    """
    if min(jobs, len(units)) <= 1:
        for unit in units:
            yield unit, run_unit(unit)
        return
    before = set(multiprocessing.active_children())
    finished = False
    pool = ProcessPoolExecutor(min(jobs, len(units)), _context(), _begin_worker)
    try:
        futures: dict[Future[list[Point]], Unit] = {pool.submit(run_unit, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    except BrokenProcessPool:
        raise NeustreamError("a process of the sweep died (out of memory?); fewer at once: --jobs 1") from None
    finally:
        if not finished:  # what they still simulate nobody waits for
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)  # or its thread is still there at exit


def _context() -> ForkServerContext | SpawnContext:
    """How processes begin: clean ones, since this one may have threads. Ctrl-C is this one's alone."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which its children inherit
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)
    return context


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# -- what is kept -----------------------------------------------------------------------------------


class Kept:
    """Finished points in a file, a line each: `find` those whose fingerprint fits, `add` more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                said = json.loads(line)
                self._lines[said["key"]] = said
            except (ValueError, TypeError, KeyError):  # cut off by a crash: it is simulated again
                continue

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, key: str, batches: bool) -> Point | None:
        """The point of a fingerprint; None if it is not there, or not with the batches that are needed."""
        said = self._lines.get(key)
        if said is None or (batches and said["batches"] is None):
            return None
        return Point(said["entry"], Batches(**said["batches"]) if said["batches"] else None)

    def add(self, key: str, point: Point) -> None:
        """Keep a point, at once."""
        batches = None if point.batches is None else dataclasses.asdict(point.batches)
        line = json.dumps({"key": key, "entry": point.entry, "batches": batches}, allow_nan=False)
        with self.path.open("ab", buffering=0) as file:  # in one go: Ctrl-C comes before or after
            file.write((f"\n{line}\n" if self._cut_off() else f"{line}\n").encode())

    def _cut_off(self) -> bool:
        """Whether the last line has no end."""
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def fingerprint(unit: Unit, policy: str) -> str:
    """A name for all that the results of a policy at a point depend on.

    That is what is swept and its value, which results name, the config without what only other commands or policies
    read, the contents of profiles and traces, the policy's own module (not what that imports), and the code and
    versions of this library and numpy.
    """
    rule = parted(policy)[0]
    given = unit.config.policies.get(rule, {})
    idle = {"about", "sweeps", "policies"}
    of_models = {"backend", "profiles"}
    if isinstance(unit.config, ModelsConfig):
        exclude: Any = {**dict.fromkeys(idle, True), "models": {"__all__": of_models}}
    else:
        exclude = idle | of_models
    config = unit.config.model_dump(mode="json", exclude=exclude)
    files: list[Path] = []
    for experiment in experiments_of(unit.config):
        files += [*pipeline_of(experiment).profile_files()]
        files += [file for some in pipeline_of(experiment).truth_files().values() for file in some]
        files += _paths_in(experiment.model_dump(include={"workload", "tools"}))
        files += _planned(experiment, given)
    several = unit.config.experiments() if isinstance(unit.config, ModelsConfig) else {}
    for name, experiment in several.items() or [("", one) for one in experiments_of(unit.config)]:
        files += _elsewhere(name, experiment)
    point = [unit.over, unit.value, policy, given, unit.bound]
    facts = [config, [_digest(file) for file in files], point, _module_of(rule), _code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _elsewhere(model: str, experiment: Experiment) -> Iterable[Path]:
    """The profiles of a cluster's instances that are on other devices."""
    kinds = {} if experiment.cluster is None else experiment.cluster.kinds
    for role, kind in kinds.items():
        folder = folder_of(role, kind, model)
        if folder is not None:
            there = experiment.model_copy(update={"profiles": folder})
            yield from pipeline_of(there).profile_files()


def _planned(experiment: Experiment, given: Mapping[str, Any]) -> Iterable[Path]:
    """The files of profiles that a policy plans with."""
    plan = given.get("plan")
    for parts in plan.values() if isinstance(plan, dict) else ():
        yield from (experiment.profiles / f"{part}.json" for part in parts)


def _paths_in(values: Any) -> Iterable[Path]:
    if isinstance(values, Path):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _paths_in(value)


def _module_of(policy: str) -> str:
    """The content of the file that a policy of one's own is in."""
    name, colon, _ = policy.partition(":")
    source = inspect.getsourcefile(importlib.import_module(name)) if colon else None
    return _digest(Path(source)) if source else ""


@functools.cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _code() -> str:
    """This library's source, and the versions of what it computes with."""
    digest = hashlib.sha256(f"{platform.python_version()} {np.__version__}".encode())
    for path in sorted(Path(neustream.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
