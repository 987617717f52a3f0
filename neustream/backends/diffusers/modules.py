"""Runs as stream modules: encode, denoise and decode, and the graph that they make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from neustream.backends.diffusers.run import Run, decode, denoise, encode
from neustream.core.graph import Graph, Stage, loop, seq, switch
from neustream.core.types import Job
from neustream.engine.executor import StreamModule
from neustream.errors import StageFailed

Update = Mapping[str, Any]


class Runs:
    """The runs of jobs. `begin` makes one, when a job first gets to a stage.

    A job's last update is `{"output": what the stock call returned}`.
    """

    def __init__(self, begin: Callable[[Job], Run], *, check_finite: bool = True) -> None:
        self._begin = begin
        self._open: dict[Job, Run] = {}
        self._check_finite = check_finite
        self._threads = torch.get_num_threads()
        self._limited: set[int] = set()  # threads that know it

    def get(self, job: Job) -> Run | None:
        return self._open.get(job)

    def __len__(self) -> int:
        return len(self._open)

    def step(self, role: str, jobs: Sequence[Job]) -> list[Update | StageFailed]:
        """One step of a stage for `jobs`."""
        if (me := threading.get_ident()) not in self._limited:  # a new thread would take all cores for convolutions
            torch.set_num_threads(self._threads)
            self._limited.add(me)
        runs = []
        for job in jobs:
            if job not in self._open:
                self._open[job] = self._begin(job)
            runs.append(self._open[job])
        if role == "encode":
            encode(runs)
        elif role == "denoise":
            denoise(runs)
        else:
            decode(runs, check_finite=self._check_finite)
        return [self._update(run) for run in runs]

    @staticmethod
    def _update(run: Run) -> Update | StageFailed:
        if run.error is None:
            return {"output": run.output} if run.over else {}
        if isinstance(run.error, StageFailed):
            return run.error
        failed = StageFailed(f"{type(run.error).__name__}: {run.error}")
        failed.__cause__ = run.error
        return failed

    def release(self, job: Job) -> None:
        run = self._open.pop(job, None)
        if run is not None:
            run.close()

    def close(self) -> None:
        """End all that is open."""
        for job in list(self._open):
            self.release(job)

    # -- what graphs ask, on the engine's thread -------------------------------------------------------

    def denoising(self, job: Job) -> bool:
        run = self._open.get(job)
        return run is not None and run.denoising

    def left(self, job: Job, expected: int) -> int:
        """Denoising steps ahead."""
        run = self._open.get(job)
        return expected if run is None or not run.started else max(1, run.total - run.steps)

    def over(self, job: Job) -> bool:
        run = self._open.get(job)
        return run is not None and run.over


class RunModule:
    """One kind of stage of some runs; the pipeline is where its owner put it."""

    def __init__(self, runs: Runs, role: str) -> None:
        self._runs = runs
        self._role = role

    def load(self, device: str) -> None:
        """Nothing to do: models stay on the device that they are on."""

    def step(self, jobs: Sequence[Job]) -> Sequence[Update | StageFailed]:
        return self._runs.step(self._role, jobs)

    def release(self, job: Job) -> None:
        self._runs.release(job)


def modules_of(runs: Runs, names: Mapping[str, str]) -> dict[str, StreamModule]:
    """The modules of the roles in `names`, under the names that their stages have."""
    return {stage: RunModule(runs, role) for role, stage in names.items()}


def graph_of(name: str, runs: Runs, stages: Mapping[str, Stage], expected: Callable[[Job], int]) -> Graph:
    """encode, denoise until the schedule is done, decode (unless the request wants its latents).

    A pipeline without a decoder has no stage of the role decode. `expected` says how many
    denoising steps a request takes, before its schedule is known.
    """
    steps = loop(
        stages["denoise"],
        until=lambda job: not runs.denoising(job),
        expect=lambda job: runs.left(job, expected(job)),
    )
    if "decode" not in stages:
        return Graph(name, seq(stages["encode"], steps))
    rest = switch(runs.over, {False: stages["decode"], True: seq()}, likely=False)
    return Graph(name, seq(stages["encode"], steps, rest))
