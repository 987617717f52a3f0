"""Runs as stream modules: encode, denoise and decode, and the graph that they make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from neustream.backends.diffusers import moves
from neustream.backends.diffusers.journal import Packed
from neustream.backends.diffusers.run import Run, decode, denoise, encode
from neustream.core.batch import StepInput
from neustream.core.graph import Graph, Node, Stage, loop, seq, switch
from neustream.core.job import Job
from neustream.engine.clock import stopwatch
from neustream.errors import StageFailed

Update = Mapping[str, Any]
LOOKING = 0.006
"""The share of a device's time that may go into asking whether somebody changed the models. Behind the first and
the last step of each request it is asked anyway, which counts."""


class Runs:
    """The runs of requests. `begin` makes one, when a request first gets to a stage.

    Updates say what the graph asks: whether the request is `denoising`, the steps that it has `left`,
    and whether it is `over`. The last one has the `output` of the stock call.

    Args:
        begin: makes the run of a request.
        check_finite: see `PipelineMount`.
        changed: says what of the models is not as it was; then the step fails. It is asked behind
            the first and the last step of each request, and behind others as long as all that takes
            less than `LOOKING` of the time. What a step started on a GPU still runs meanwhile, so that
            this costs nothing there.
        settled: waits until the device has done what the step started.
    """

    def __init__(
        self,
        begin: Callable[[StepInput], Run],
        *,
        check_finite: bool = True,
        changed: Callable[[], str] = lambda: "",
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin = begin
        self._changed = changed
        self._settled = settled
        self._looks_at = 0.0  # when it is asked again, at the latest behind the last step of a request
        self._open: dict[str, Run] = {}
        self._check_finite = check_finite
        self._threads = torch.get_num_threads()
        self._limited: set[int] = set()  # threads that know it

    def get(self, id: str) -> Run | None:
        return self._open.get(id)

    def __len__(self) -> int:
        return len(self._open)

    def step(self, role: str, inputs: Sequence[StepInput]) -> list[Update | StageFailed]:
        """One step of a stage for some requests."""
        self._limit_threads()
        fresh = any(given.id not in self._open for given in inputs)
        runs = [self._run_of(given) for given in inputs]
        if role == "encode":
            encode(runs)
        elif role == "denoise":
            denoise(runs)
        else:
            decode(runs, check_finite=self._check_finite)
        ended = any(run.over or run.error is not None for run in runs)
        why = self._looked() if fresh or ended or self._due() else ""
        self._settled()
        if why:
            return [StageFailed(why)] * len(inputs)
        return [self._update(run) for run in runs]

    def _limit_threads(self) -> None:
        """Give a thread that is new here as many of torch's threads as its maker had.

        It would take all cores for convolutions.
        """
        thread = threading.get_ident()
        if thread not in self._limited:
            torch.set_num_threads(self._threads)
            self._limited.add(thread)

    def _run_of(self, given: StepInput) -> Run:
        """The run of a request, which begins here if it is new, or its second call (of an agent)."""
        if given.id in self._open and self._open[given.id].over and "over" not in given.state:
            self.release(given.id)
        if given.id not in self._open:
            over = bool(given.state.get("over"))  # before it came here
            self._open[given.id] = Run.ended(given.state["output"]) if over else self._begin(given)
        return self._open[given.id]

    def _due(self) -> bool:
        """Whether it is time to look again."""
        return stopwatch() >= self._looks_at

    def _looked(self) -> str:
        """What is not as it was."""
        began = stopwatch()
        why = self._changed()
        ended = stopwatch()
        pause = (ended - began) / LOOKING
        self._looks_at = ended + min(max(self._looks_at - ended, 0.0) + pause, 2 * pause)
        return why

    @staticmethod
    def _update(run: Run) -> Update | StageFailed:
        if run.error is None:
            update = {"denoising": run.denoising, "left": run.left, "over": run.over}
            return {**update, "output": run.output} if run.over else update
        if isinstance(run.error, StageFailed):
            return run.error
        why = f"{type(run.error).__name__}: {run.error}"
        if run.brought:
            why += f" (the call brought {run.brought})"
        failed = StageFailed(why)
        failed.__cause__ = run.error
        return failed

    def release(self, id: str) -> None:
        run = self._open.pop(id, None)
        if run is not None:
            run.close()

    def export(self, given: StepInput) -> Packed | None:
        """Where a request's call is, as plain data; None if it has ended, or not begun.

        StageFailed, by the pipeline's name, for calls that cannot be made again elsewhere.
        """
        run = self._open.get(given.id)
        if run is None or run.over:
            return None
        if given.state.get("left") != run.left:
            raise StageFailed(f"request {given.id!r} is in a step, or its state is not of the latest")
        return moves.export(run)

    def adopt(self, given: StepInput, place: Packed) -> None:
        """Bring a request's call to where it was elsewhere, without running a model.

        StageFailed if it gets anywhere else.
        """
        if given.id in self._open:
            raise StageFailed(f"request {given.id!r} is here already")
        run = self._begin(given)
        moves.bring(run, place)
        self._open[given.id] = run

    def close(self) -> None:
        """End all that is open."""
        for id in list(self._open):
            self.release(id)


class RunModule:
    """The stages of some runs; the pipeline is where its owner put it.

    Args:
        roles: what each stage does: "encode", "denoise" or "decode"; read at each step.
    """

    def __init__(self, runs: Runs, roles: Mapping[str, str]) -> None:
        self._runs = runs
        self._roles = roles

    def load(self, device: str) -> None:
        """Nothing to do: models stay on the device that they are on."""

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        return self._runs.step(self._roles[inputs[0].stage], inputs)

    def release(self, id: str) -> None:
        self._runs.release(id)

    def export(self, given: StepInput) -> Packed | None:
        return self._runs.export(given)

    def adopt(self, given: StepInput, piece: Packed) -> None:
        self._runs.adopt(given, piece)


def graph_of(name: str, stages: Mapping[str, Stage]) -> Graph:
    """encode, denoise until the schedule is done, decode (unless the request wants its latents).

    Plain data: its conditions read what the modules returned, and the parameter `steps`, the denoising
    steps that a request is expected to take. A pipeline without an encoder or a decoder has no such stage.
    """
    steps = loop(stages["denoise"], until=_denoised, expect=_steps_left)
    first = [stages["encode"]] if "encode" in stages else []
    if "decode" in stages:
        return Graph(name, seq(*first, steps, _unless_over(stages["decode"], likely=False)))
    last = [_unless_over(stage, likely=True) for stage in first]  # the priors of Kandinsky encode twice
    return Graph(name, seq(*first, steps, *last))


def _unless_over(stage: Stage, *, likely: bool) -> Node:
    """A stage at the end, for calls that are not over; `likely`: whether they are."""
    return switch(_over, {False: stage, True: seq()}, likely=likely)


def _denoised(job: Job) -> bool:
    return not job.state["denoising"]


def _steps_left(job: Job) -> int:
    left: int = job.state.get("left", job.params["steps"])
    return left


def _over(job: Job) -> bool:
    over: bool = job.state["over"]
    return over
