"""The shortest way through a graph: seconds that a request needs at least, as a proof.

What cannot be asked yet counts as nothing: loops that depend on data have one round, generations
one output, and switches take their shortest branch.
"""

from __future__ import annotations

from neustream.core.budget import inside
from neustream.core.cursor import Cursor
from neustream.core.graph import Loop, Node, Par, Seq, Stage, Switch, answer
from neustream.core.job import Job
from neustream.core.step_times import StepTimes
from neustream.core.stretch import Stretch, Tail
from neustream.errors import GraphError


def least_left(job: Job, cursor: Cursor, times: StepTimes) -> float:
    """Seconds that `job` needs at least from where it stands, its present step included."""
    seconds = least_behind(job, cursor, times)
    if cursor.stage is not None:
        seconds += _stage(cursor.stage, job, times, job.computed)
    elif cursor.fork is not None:
        seconds += shortest(cursor.fork, job, times)
    return seconds


def least_behind(job: Job, cursor: Cursor, times: StepTimes) -> float:
    """The same of what follows the stage or the par that it is at."""
    seconds = 0.0
    for node, count, _ in cursor.rest(job):
        if count > 0 and not _may_end(node, cursor):
            seconds += count * shortest(node, job, times)
    return seconds


def _may_end(node: Node | Stretch | Tail, cursor: Cursor) -> bool:
    """Whether a node is the body of an open loop that may end before its next round."""
    return any(
        isinstance(frame.node, Loop) and frame.node.until is not None and frame.node.body is node
        for frame in cursor.frames
    )


def shortest(node: Node | Stretch | Tail, job: Job, times: StepTimes) -> float:
    """Seconds of the shortest way through a node."""
    match node:
        case Stage():
            return _stage(node, job, times)
        case Stretch() | Tail():
            return sum([shortest(child, job, times) for child in node.children])
        case Seq():
            try:
                with inside(node.call, job):
                    return sum([shortest(child, job, times) for child in node.nodes])
            except GraphError:  # its params cannot be asked
                return 0.0
        case Loop():
            return _rounds(node, job) * shortest(node.body, job, times)
        case Switch():
            return min([shortest(child, job, times) for child in node.cases.values()])
        case Par():
            each = [shortest(child, job, times) for child in node.branches.values()]
            return sorted(each)[node.need - 1]


def _rounds(node: Loop, job: Job) -> int:
    if node.times is None:
        return 1
    try:
        rounds = answer(node.times, job, "a loop's times")
    except GraphError:
        return 0
    return rounds if isinstance(rounds, int) and rounds > 0 else 0


def _stage(stage: Stage, job: Job, times: StepTimes, computed: float = 0.0) -> float:
    try:
        size = stage.size_of(job)
    except GraphError:
        size = 0.0
    return times.alone(stage, max(size - computed, 0.0))
