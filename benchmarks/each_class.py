"""Try many classes of a library, each in a process of its own, and keep what came of each.

A sweep has a function `check(name, phase)`, which builds one tiny object, asks the stock library and
neustream the same, and returns what it `Found`. It calls `phase(...)` as it goes on: "build" and "stock"
are the outside world's part, every later phase is ours. What came of a class is its outcome:

  batched     alone bitwise equal to stock, in company equal up to rounding, and calls were shared
  exact       the same, but no call was shared
  refused     neustream said, at once, why it does not serve it
  wrong       a result differs
  hung        no answer within the time limit
  crashed     a request that stock answers failed, or the process died
  not built   no tiny object, or stock itself does not give the same result twice

Outcomes are written after each class; a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from arguments import at_least_one

OUTCOMES = ("batched", "exact", "refused", "wrong", "hung", "crashed", "not built")
OUTSIDE = ("build", "stock")
"""Phases that are not ours: what goes wrong in them is `not built`."""
WORDS = 300
"""The most letters of a detail."""

Phase = Callable[[str], None]


class NotBuilt(Exception):
    """There is no tiny object of this class, or nothing to compare it with."""


class Refused(Exception):
    """neustream does not serve it, and says why."""


@dataclass(frozen=True)
class Found:
    """What a comparison with stock found.

    Args:
        alone: what differs when requests run one after the other; "": nothing, to the last bit.
        off: the largest difference in company, in the sweep's own measure.
        tolerance: the largest `off` that rounding explains.
        batch: requests per call of the model, in company (1: no call was shared).
        note: what else is worth knowing.
    """

    alone: str
    off: float
    tolerance: float
    batch: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One class of a sweep: its outcome, and `detail` in words."""

    outcome: str
    detail: str
    seconds: float
    off: float | None = None
    batch: float | None = None


@dataclass(frozen=True)
class Sweep:
    """What to try and where it goes.

    Args:
        title, command: of the results.
        check: importable by name, for it runs in other processes.
        names: the classes.
        about: versions, tolerances, how it was asked: lines of the results.
        out: the results without their suffix; `.json` and `.md` are written.
        preload: modules that are imported once, for all processes.
        limit_s, memory_gib: of one class.
    """

    title: str
    command: str
    check: Callable[[str, Phase], Found]
    names: Sequence[str]
    about: Mapping[str, str]
    out: Path
    preload: Sequence[str] = ()
    limit_s: float = 300.0
    memory_gib: float = 12.0


def judge(found: Found) -> tuple[str, str]:
    """The outcome of a comparison, and its detail."""
    if found.alone:
        return "wrong", f"alone: {found.alone}"
    if not found.off <= found.tolerance:  # NaN is wrong too
        return "wrong", f"in company: off by {found.off:.1e}. {found.note}".strip()
    return ("batched" if found.batch > 1 else "exact"), found.note


# -- one class, in its own process ----------------------------------------------------------------------


def _attempt(check: Callable[[str, Phase], Found], name: str, out: Connection, log: str, limits: list[float]) -> None:
    """Run one check; tell `out` of its phases and of its end. Everything printed goes to the file `log`."""
    limit_s, memory_gib = limits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep ends it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit_s * 0.95)  # where it hangs
    most = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    now = ["build"]

    def phase(name: str) -> None:
        now[0] = name
        out.send(("phase", name))

    try:
        found = check(name, phase)
        outcome, detail = judge(found)
        off = found.off if math.isfinite(found.off) else None
        out.send(("end", (outcome, detail, off, found.batch)))
    except BaseException as error:  # noqa: BLE001  whatever the world does
        out.send(("end", (*blame(error, now[0]), None, None)))
    os._exit(0)  # threads of a request that hangs are not waited for


def blame(error: BaseException, phase: str) -> tuple[str, str]:
    """The outcome and detail of a check that raised `error` in `phase`."""
    said = " ".join(str(error).split())
    if isinstance(error, Refused):
        return "refused", said
    if isinstance(error, NotBuilt):
        return "not built", said
    detail = f"{phase}: {type(error).__name__}: {said}"
    if phase in OUTSIDE:
        return "not built", detail
    if isinstance(error, TimeoutError):
        return "hung", f"{phase}: no answer in time"
    return "crashed", detail


class _Try:
    """A process that is under way."""

    def __init__(self, sweep: Sweep, name: str, context: Any, folder: Path) -> None:
        self.name = name
        self.phase = "build"
        self.began = time.monotonic()
        self.limit_s = sweep.limit_s
        self.log = folder / f"{name}.log"
        self.pipe, end = context.Pipe(duplex=False)
        limits = [sweep.limit_s, sweep.memory_gib]
        self.process = context.Process(target=_attempt, args=(sweep.check, name, end, str(self.log), limits))
        self.process.start()
        end.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def poll(self) -> Row | None:
        """Its outcome, if there is one by now."""
        while self.pipe.poll():
            try:
                kind, value = self.pipe.recv()
            except EOFError:
                return self._end(*self._died())
            if kind == "end":
                outcome, detail, off, batch = value
                return self._end(outcome, detail, off, batch)
            self.phase = value
        if self.seconds <= self.limit_s:
            return None
        if self.phase in OUTSIDE:
            return self._end("not built", f"{self.phase}: not done in {self.limit_s:g} s")
        return self._end("hung", f"{self.phase}: not done in {self.limit_s:g} s")

    def _died(self) -> tuple[str, str]:
        self.process.join(5)
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        detail = f"{self.phase}: the process died with {self.process.exitcode}: {' | '.join(lines[-3:])}"
        return ("not built" if self.phase in OUTSIDE else "crashed"), detail

    def _end(self, outcome: str, detail: str, off: float | None = None, batch: float | None = None) -> Row:
        row = Row(outcome, detail[:WORDS], round(self.seconds, 1), off, batch)
        self.stop()
        return row

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def attempts(sweep: Sweep, names: Sequence[str], jobs: int, logs: Path) -> Iterator[tuple[str, Row]]:
    """What comes of each class, as they end; `jobs` at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(sweep.preload))
    waiting, running = list(reversed(names)), list[_Try]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Try(sweep, waiting.pop(), context, logs))
            wait([one.pipe for one in running], timeout=1.0)
            for one in list(running):
                if (row := one.poll()) is not None:
                    running.remove(one)
                    yield one.name, row
    finally:
        for one in running:
            one.stop()


# -- all of them ------------------------------------------------------------------------------------------


def read(sweep: Sweep) -> dict[str, Row]:
    """What an earlier run of the same sweep found; nothing if it was with other versions."""
    path = sweep.out.with_suffix(".json")
    if not path.exists():
        return {}
    known = json.loads(path.read_text())
    if known["about"] != dict(sweep.about):
        print(f"{path} is of another sweep ({known['about']}): all classes are tried again", file=sys.stderr)
        return {}
    return {name: Row(**row) for name, row in known["classes"].items() if name in sweep.names}


def write(sweep: Sweep, rows: Mapping[str, Row]) -> None:
    """The results as JSON and as a table, each replaced as a whole."""
    counts = Counter(row.outcome for row in rows.values())
    head: dict[str, Any] = {"title": sweep.title, "date": time.strftime("%Y-%m-%d"), "command": sweep.command}
    head |= {"about": dict(sweep.about)}
    classes = {name: asdict(rows[name]) for name in sorted(rows)}
    whole = {**head, "counts": {name: counts[name] for name in OUTCOMES}, "classes": classes}
    sweep.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(whole, indent=1) + "\n"), (".md", table(sweep, rows))):
        draft = sweep.out.with_suffix(suffix + ".part")
        draft.write_text(text)
        draft.replace(sweep.out.with_suffix(suffix))


def table(sweep: Sweep, rows: Mapping[str, Row]) -> str:
    """The results for readers: counts, then every class, the worst outcomes first."""
    counts = Counter(row.outcome for row in rows.values())
    built = len(rows) - counts["not built"]
    lines = [f"# {sweep.title}", "", f"{len(rows)} of {len(sweep.names)} classes tried, {built} built. "]
    lines[-1] += f"`{sweep.command}`, {time.strftime('%Y-%m-%d')}."
    lines += ["", *(f"- {name}: {text}" for name, text in sweep.about.items())]
    lines += ["", "| outcome | classes |", "|---|---|", *(f"| {name} | {counts[name]} |" for name in OUTCOMES)]
    lines += ["", "| class | outcome | off in company | requests per call | seconds | detail |"]
    lines += ["|---|---|---|---|---|---|"]
    worst = ("wrong", "hung", "crashed", "refused", "exact", "batched", "not built")
    for name in sorted(rows, key=lambda name: (worst.index(rows[name].outcome), name)):
        row = rows[name]
        off = "" if row.off is None else f"{row.off:.1e}"
        batch = "" if row.batch is None else f"{row.batch:.2f}"
        detail = row.detail.replace("|", "/")
        lines.append(f"| {name} | {row.outcome} | {off} | {batch} | {row.seconds:g} | {detail} |")
    return "\n".join(lines) + "\n"


def run(sweep: Sweep, *, only: Sequence[str] = (), again: Sequence[str] = (), jobs: int = 1) -> dict[str, Row]:
    """Try what was not tried yet (or `only` these, or those whose outcome is to be tried `again`).

    Ctrl-C keeps what is there. Raises ValueError for a name that the sweep does not have.
    """
    if unknown := sorted(set(only) - set(sweep.names)):
        raise ValueError(f"no class {unknown[0]!r} in this sweep of {len(sweep.names)}")
    if unknown := sorted(set(again) - set(OUTCOMES)):
        raise ValueError(f"no outcome {unknown[0]!r}; there are {', '.join(OUTCOMES)}")
    rows = read(sweep)
    wanted = list(only) or [name for name in sweep.names if name not in rows or rows[name].outcome in again]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process outlives the sweep
    try:
        with tempfile.TemporaryDirectory() as logs:
            for at, (name, row) in enumerate(attempts(sweep, wanted, jobs, Path(logs)), start=1):
                rows[name] = row
                write(sweep, rows)
                print(f"{at}/{len(wanted)} {name}: {row.outcome} ({row.seconds:.1f} s) {row.detail}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; {sweep.out}.json keeps the {len(rows)} classes tried so far", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    return rows


def main(make: Callable[[Path], Sweep], out: Path, description: str) -> None:
    """The command of a sweep: `make` is told where results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="try this class again; repeatable")
    parser.add_argument("--again", default="", metavar="OUTCOMES", help="try those again, such as wrong,hung")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="processes at once")
    parser.add_argument("--out", type=Path, default=out, help="the results, without a suffix")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {given.jobs}")
    again = [name for name in given.again.split(",") if name]
    try:
        rows = run(make(given.out), only=given.only, again=again, jobs=given.jobs)
    except ValueError as error:
        parser.error(str(error))
    counts = Counter(row.outcome for row in rows.values())
    print(", ".join(f"{counts[name]} {name}" for name in OUTCOMES))
