"""What lies ahead of a job, in calls and in seconds alone; walking a job without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from neustream.core.cursor import Cursor, Saved
from neustream.core.entry import Entry
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.legs import Legs
from neustream.core.lengths import Lengths
from neustream.core.profile import LatencyProfile
from neustream.core.step_times import StepTimes
from neustream.core.stretch import Stretch, tallied
from neustream.core.types import Request
from neustream.errors import ProfileError


def alone_s(
    graph: Graph, params: Mapping[str, Any], profiles: Mapping[str, LatencyProfile]
) -> float:
    """Seconds that a request with `params` takes alone: the sum of its calls by their profiles.

    Raises:
        ProfileError: a stage has no profile.
    """
    walk = Walk(Request("alone", graph, params=params))
    seconds = 0.0
    for stage, calls in walk.ahead():
        if stage.name not in profiles:
            raise ProfileError(f"stage {stage.name!r} of graph {graph.name!r} has no profile")
        size = stage.size_of(walk.job)
        seconds += calls * profiles[stage.name].latency(1, size, size * size)
    return seconds


def ends_call(graph: Graph, left: Stage, to: Stage | None) -> bool:
    """Whether a model call is over when a job goes from the stage `left` on to the stage `to`."""
    if not left.caches:
        return False
    if to is None or to.model != left.model:
        return True
    if to is left:
        return left.phase == "prefill"
    return graph.position[to.name] < graph.position[left.name]


def learn_length(job: Job, left: Stage, lengths: Lengths) -> None:
    """Count a model call that is over behind the stage `left`: whether it came to its maximum.

    Of the calls expected before, `left` itself was one. A prefill has the decodes behind it.
    """
    decodes = [
        name
        for name, stage in job.request.graph.stages.items()
        if stage is not left and stage.model == left.model and stage.phase == "decode"
    ]
    if job.calls_here(left.name) + sum(map(job.calls_here, decodes)) > 1:
        lengths.ended(job.call_outputs)
    else:
        lengths.full()


class Walk:
    """One job on its way through its graph alone: no queue, no time, no pool.

    `job` is what graph conditions and modules read.
    """

    def __init__(self, request: Request) -> None:
        self.job: Job = Job(request)
        self._cursor = Cursor(request.graph, self.job)
        self.job.stage = self._cursor.stage

    @property
    def stage(self) -> Stage | None:
        """The stage that it is at; None at the end."""
        return self.job.stage

    def saved(self) -> Saved:
        """Its place in the graph, as plain data."""
        return self._cursor.save(self.job.request.graph)

    def ahead(self) -> Iterator[tuple[Stage, int]]:
        """Expected calls ahead, the current one first (see `Cursor.ahead`)."""
        return self._cursor.ahead(self.job)

    def advance(self, update: Mapping[str, Any], size: float | None = None) -> Stage | None:
        """Take in what a step of `size` units returned (default: all of it); the next stage."""
        job, stage = self.job, self.job.stage
        assert stage is not None
        whole = job.size
        job.state.update(update)
        if size is not None and size < whole:
            job.computed += size
            return stage
        job.computed = 0.0
        if stage.emits:
            job.take_output(update, job.arrival)
        following = self._cursor.advance(job)
        if ends_call(job.request.graph, stage, following):
            job.call_outputs = 0
        job.stage = following
        return following

    def preempt(self) -> Stage | None:
        """Its KV cache is lost: back to the prefill that fills it again, if there is one."""
        job = self.job
        job.computed = 0.0
        stage = job.stage
        if stage is not None and stage.phase == "decode":
            stage = self._cursor.rewind()
        job.stage = stage
        return stage


class Work:
    """Keeps `calls_left`, `remaining_s`, `next_output_s` and the legs of a scheduler's jobs."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self.legs = Legs(times)

    def measure(self, job: Entry) -> None:
        """Set all of them from the calls that lie ahead."""
        assert job.cursor is not None
        times = self._times
        total, to_output = 0.0, None
        calls_left: MutableMapping[str, int] = {}
        own, sizes = job.params, None
        current = True
        for part, calls in job.cursor.calls_ahead(job):
            stage = part if isinstance(part, Stage) else part.first
            size = stage.size_of(job)
            if job.params is not own:
                sizes = sizes or {}
                sizes[stage.name] = size
            first = whole = times.alone(stage, size)
            if current:
                current = False
                job.unit_s, job.unit_size = whole, size
                if job.computed:  # the rest of a step in parts
                    first = times.alone(stage, size - job.computed)
            calls_left = tallied(calls_left, part, calls)
            output_s = first if stage.emits else None
            if isinstance(part, Stretch):
                kept = self.legs.sums.of(part, job)
                first, whole, output_s = kept.calls, kept.calls, kept.to_output
            if output_s is not None and to_output is None:
                to_output = total + output_s
            total += first + whole * (calls - 1)
        if sizes is not None or job.sizes_ahead:
            job.sizes_ahead = sizes or {}
        if job.request.graph.forks:
            total = self.legs.path_s(job)
            to_output = None if to_output is None else min(to_output, total)
        total += job.after.alone
        job.calls_left = calls_left
        job.remaining_s = total
        job.next_output_s = total if to_output is None else to_output

    def one_call_done(self, job: Entry, stage: Stage) -> None:
        """One round of a loop over `stage` is done, and another one follows."""
        if stage.size is not None:
            size = stage.size_of(job)
            if size != job.unit_size:
                if stage.phase == "decode":
                    self._longer_context(job, stage, size)
                else:
                    self.measure(job)
                return
        job.calls_left[stage.name] -= 1
        job.remaining_s -= job.unit_s
        if not stage.emits:
            job.next_output_s -= job.unit_s

    def _longer_context(self, job: Entry, stage: Stage, size: float) -> None:
        """One decode step is done: estimate the remaining ones at the present context length."""
        left = job.calls_left[stage.name] = job.calls_left[stage.name] - 1
        before, unit = job.unit_s, self._times.alone(stage, size)
        job.remaining_s += left * unit - (left + 1) * before
        if stage.emits:
            job.next_output_s += unit - before
        else:
            job.next_output_s += left * unit - (left + 1) * before
        job.unit_s, job.unit_size = unit, size
