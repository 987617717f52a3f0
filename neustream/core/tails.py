"""What lies far ahead of a job in a long sequence: asked now and then, and kept meanwhile.

What calls ask for may depend on what those before them said, so what is near is asked anew at each
call. Were all that is ahead, a sequence of n calls would ask n squared times. What is far is kept
as sums from every few nodes on. It is asked again once the job has come a share of the way: some n
times in all. Nobody is given up for what is kept: who would be is asked anew first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from neustream.core.budget import calls_of
from neustream.core.entry import Ahead, Entry
from neustream.core.graph import Node, Seq, Stage
from neustream.core.step_times import StepTimes
from neustream.core.stretch import EVERY, Stretch, Tail


class Far(NamedTuple):
    """What the nodes from some place on ask for.

    `ahead`: seconds, of branches the longest; `calls`: of all calls; `to_output`: of those up to
    the first output, None if there is none. `counts`: calls by stage. `sizes`: of stages in calls
    with params of their own; `every`: of all stages.
    """

    ahead: Ahead = Ahead()
    calls: float = 0.0
    to_output: float | None = None
    counts: Mapping[str, int] = {}
    sizes: Mapping[str, float] = {}
    every: Mapping[str, float] = {}

    def then(self, other: Far) -> Far:
        """These and what follows them."""
        to_output = self.to_output
        if to_output is None and other.to_output is not None:
            to_output = self.calls + other.to_output
        counts = dict(self.counts)
        for name, count in other.counts.items():
            counts[name] = counts.get(name, 0) + count
        return Far(
            self.ahead.plus(other.ahead),
            self.calls + other.calls,
            to_output,
            counts,
            {**self.sizes, **other.sizes},
            {**self.every, **other.every},
        )


class Asked(NamedTuple):
    """When a sequence was asked: at which of its nodes the job was, and what was known of steps.

    `params`: those of the job there; a sequence may be in several calls, each with its own.
    `far`: by the place from which on.
    """

    at: int
    version: int
    params: Mapping[str, Any]
    far: Mapping[int, Far]

    def holds(self, tail: Tail, version: int, job: Entry) -> bool:
        """Whether it need not be asked again for a job that stands in front of a tail."""
        come = tail.at - self.at
        again = (len(tail.node.nodes) - self.at) // 4
        same = self.version == version and self.params is job.params
        return same and 0 <= come <= again and tail.start in self.far


class Tails:
    """The sums of tails, for all jobs of a scheduler; each job keeps its own.

    Args:
        times: what steps take.
        seconds: those of a node, as legs took lately.
    """

    def __init__(self, times: StepTimes, seconds: Callable[[Node, Entry], Ahead]) -> None:
        self._times = times
        self._seconds = seconds

    def of(self, tail: Tail, job: Entry) -> Far:
        """What a tail asks for, by what was known when it was asked."""
        asked = job.tails.get(tail.node)
        if asked is None or not asked.holds(tail, self._times.version, job):
            asked = Asked(tail.at, self._times.version, job.params, self._ask(tail, job))
            job.tails = {**job.tails, tail.node: asked}
        return asked.far[tail.start]

    def _ask(self, tail: Tail, job: Entry) -> Mapping[int, Far]:
        nodes = tail.node.nodes
        last = Far()
        far: dict[int, Far] = {}
        for start in reversed(range(tail.start, len(nodes), EVERY)):
            last = far[start] = self._row(nodes[start : start + EVERY], job).then(last)
        return far

    def _row(self, nodes: Iterable[Node], job: Entry) -> Far:
        """What a few nodes in a row ask for."""
        own = job.params
        ahead, seconds, to_output = Ahead(), 0.0, None
        counts: dict[str, int] = {}
        sizes: dict[str, float] = {}
        every: dict[str, float] = {}
        for node in nodes:
            ahead = ahead.plus(self._seconds(node, job))
            for stage, count in _stages_of(node, job):
                size = every[stage.name] = stage.size_of(job)
                if job.params is not own:
                    sizes[stage.name] = size
                alone = self._times.alone(stage, size)
                if stage.emits and to_output is None:
                    to_output = seconds + alone
                seconds += count * alone
                counts[stage.name] = counts.get(stage.name, 0) + count
        return Far(ahead, seconds, to_output, counts, sizes, every)


def _stages_of(node: Node, job: Entry) -> Iterator[tuple[Stage, int]]:
    for part, count in calls_of(node, job):
        for stage in part.stages() if isinstance(part, Stretch) else (part,):
            yield stage, count


Kept = Mapping[Seq, Asked]
"""What a job keeps of the sequences that it is in."""
