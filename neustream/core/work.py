"""What lies ahead of a job, in calls and in seconds alone; walking a job without a scheduler."""

from __future__ import annotations

import math
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
from neustream.core.stretch import Stretch, Tail, added, tallied
from neustream.core.tails import Far
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
    missing = job.calls_here(left.name) + sum(map(job.calls_here, decodes)) - 1
    if missing > 0:
        lengths.ended(job.call_outputs, job.call_outputs + missing)
    else:
        lengths.full(job.call_outputs)


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


class _Found:
    """The calls that lie ahead of a job, added up in their order.

    Attributes:
        own: the params of the call that it is in; sizes: of stages in calls with other ones.
        nothing: whether none was added so far.
        total: seconds of all; to_output: of those up to the next output, None if there is none.
    """

    __slots__ = ("calls_left", "nothing", "own", "sizes", "to_output", "total")

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.own = own
        self.nothing = True
        self.total = 0.0
        self.to_output: float | None = None
        self.calls_left: MutableMapping[str, int] = {}
        self.sizes: dict[str, float] = {}

    def add(self, seconds: float, to_output: float | None) -> None:
        """Some more seconds; `to_output`: up to an output among them, None if there is none."""
        if to_output is not None and self.to_output is None:
            self.to_output = self.total + to_output
        self.total += seconds

    def far(self, far: Far, params: Mapping[str, Any]) -> None:
        """What is far ahead too, in a sequence where `params` are those of the job."""
        self.add(far.calls, far.to_output)
        self.calls_left = added(self.calls_left, far.counts)
        self.sizes.update(far.sizes if params is self.own else far.every)


class Work:
    """Keeps `calls_left`, `remaining_s`, `next_output_s` and the legs of a scheduler's jobs."""

    def __init__(self, times: StepTimes, lengths: Mapping[str, Lengths] = {}) -> None:
        self._times = times
        self.legs = Legs(times, lengths)

    def measure(self, job: Entry) -> None:
        """Set all of them from the calls that lie ahead."""
        assert job.cursor is not None
        found = _Found(job.params)
        for part, calls in job.cursor.parts_ahead(job):
            if isinstance(part, Tail):
                found.far(self.legs.tails.of(part, job), job.params)
            else:
                self._add(found, part, calls, job)
        total, to_output = found.total, found.to_output
        if found.sizes or job.sizes_ahead:
            job.sizes_ahead = found.sizes
        if job.request.graph.forks:
            total = self.legs.path_s(job)
            to_output = None if to_output is None else min(to_output, total)
        total += job.after.alone
        job.calls_left = found.calls_left
        job.remaining_s = total
        job.next_output_s = total if to_output is None else to_output
        job.behind_s = math.nan

    def _add(self, found: _Found, part: Stage | Stretch, calls: int, job: Entry) -> None:
        """Add the calls of a part that is asked now; of all the first is that which it is at."""
        stage = part if isinstance(part, Stage) else part.first
        size = stage.size_of(job)
        if job.params is not found.own:
            found.sizes[stage.name] = size
        first = whole = self._times.alone(stage, size)
        if found.nothing:
            found.nothing = False
            job.unit_s, job.unit_size = whole, size
            if job.computed:  # the rest of a step in parts
                first = self._times.alone(stage, size - job.computed)
        found.calls_left = tallied(found.calls_left, part, calls)
        output_s = first if stage.emits else None
        if isinstance(part, Stretch):
            kept = self.legs.sums.of(part, job)
            first, whole, output_s = kept.calls, kept.calls, kept.to_output
        found.add(first + whole * (calls - 1), output_s)

    def one_call_done(self, job: Entry, stage: Stage) -> None:
        """One round of a loop over `stage` is done, and another one follows."""
        if stage.size is not None:
            size = stage.size_of(job)
            if size != job.unit_size:
                if stage.phase == "decode":
                    self.longer_context(job, stage, 1, size)
                else:
                    self.measure(job)
                return
        self.calls_done(job, stage, 1)

    def calls_done(self, job: Entry, stage: Stage, calls: int) -> None:
        """So many rounds of such a loop are done, and the next one is as they were."""
        job.calls_left[stage.name] -= calls
        for _ in range(calls):  # a sum is to be the same whether they are told one by one or not
            job.remaining_s -= job.unit_s
            if not stage.emits:
                job.next_output_s -= job.unit_s

    def longer_context(self, job: Entry, stage: Stage, calls: int, size: float) -> None:
        """Decode steps are done: estimate the remaining ones at the present context length."""
        left = job.calls_left[stage.name]
        if math.isnan(job.behind_s):
            job.behind_s = job.remaining_s - left * job.unit_s
            job.behind_output_s = job.next_output_s - left * job.unit_s
        left = job.calls_left[stage.name] = left - calls
        unit_s = job.unit_s = self._times.alone(stage, size)
        job.unit_size = size
        job.remaining_s = job.behind_s + left * unit_s
        job.next_output_s = unit_s if stage.emits else job.behind_output_s + left * unit_s
