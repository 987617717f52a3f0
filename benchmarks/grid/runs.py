"""What is computed at the points, on several processes, and kept as it comes."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from grid.digests import BOUND, EXTRA, HINDSIGHT, LIMITS_S
from grid.plan import Point
from grid.policies import made
from neustream.analysis.headroom import bound_of, weight_on_time
from neustream.analysis.hindsight import hindsight
from neustream.errors import NeustreamError
from neustream.experiment import simulate

Keyed = tuple[Point, dict[str, str]]
Task = tuple[Point, str]


def compute(point: Point, what: str) -> dict[str, Any]:
    """The result of a policy at a point, or its bound or hindsight; `error` is why there is none."""
    began = time.perf_counter()
    try:
        result = _computed(point, what)
    except NeustreamError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def _computed(point: Point, what: str) -> dict[str, Any]:
    prepared = point.prepared()
    if what == BOUND:
        bound = bound_of(prepared, LIMITS_S[BOUND])
        return {"value": bound.value, "relaxed": bound.relaxed, "method": bound.method}
    if what == HINDSIGHT:
        best = hindsight(prepared, LIMITS_S[HINDSIGHT])
        return {"value": best.value, "tried": best.tried}
    report = simulate(prepared, made(prepared, what))
    return {"on_time": weight_on_time(report), "of": sum(request.slo.weight for request in prepared.requests)}


def missing(plan: Sequence[Keyed], known: Mapping[str, Any], bounds: str) -> dict[str, Task]:
    """What is to be computed, by key: policies first, then bounds, then hindsight.

    `bounds`: at "all" points that have one, at those of the "grid" that say so, or at "none".
    """
    todo: dict[str, Task] = {}
    for point, names in plan:
        for what, key in names.items():
            asked = what not in EXTRA or bounds == "all" or (bounds == "grid" and (point.bound or what == HINDSIGHT))
            if asked and key not in known:
                todo.setdefault(key, (point, what))
    return dict(sorted(todo.items(), key=lambda item: EXTRA.index(item[1][1]) if item[1][1] in EXTRA else -1))


def run(todo: Mapping[str, Task], path: Path, jobs: int) -> list[str]:
    """Compute what is missing, append each result to the work file as it comes, and tell what failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut off
        for key, (point, what), result in _results(todo, jobs):
            if error := result.get("error"):
                failed.append(f"{point.group}, {point.config}, {dict(point.condition)}: {what}: {error}")
                continue
            about = {"what": what, "group": point.group, "config": point.config, "seed": point.seed}
            entry = {"key": key, **about, "condition": point.condition, "result": result}
            file.write(json.dumps(entry) + "\n")
            file.flush()
    return failed


def _results(todo: Mapping[str, Task], jobs: int) -> Iterator[tuple[str, Task, dict[str, Any]]]:
    """Results as they come, with the progress shown."""
    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()]
    interruptible = (signal.SIGINT, signal.SIG_DFL)  # workers end at once with Ctrl-C, and say nothing
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(jobs, initializer=signal.signal, initargs=interruptible) as pool,
    ):
        futures = {pool.submit(compute, *task): (key, task) for key, task in todo.items()}
        try:
            for future in progress.track(as_completed(futures), total=len(futures), description="computing"):
                key, task = futures[future]
                yield key, task, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
