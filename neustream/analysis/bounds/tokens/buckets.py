"""The program of time: what all steps take in buckets of time (README.md, "Time")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neustream.analysis.bounds.linear import Floats, Program
from neustream.analysis.bounds.tokens.costs import Costs, Limits
from neustream.analysis.bounds.tokens.lines import Line
from neustream.analysis.bounds.tokens.prompts import PromptGroup
from neustream.analysis.bounds.tokens.tasks import Task

BUCKETS = 8
"""Buckets of time in the mean life of a generation."""
MOST_BUCKETS = 2000
"""Buckets in all."""
EXACT = 120
"""Arrivals and deadlines are cuts themselves if there are no more than that."""

Sum = list[tuple[int, float]]
"""Columns and what each of them counts for."""


def time_program(
    tasks: Sequence[Task], groups: Sequence[PromptGroup], costs: Costs, limits: Limits
) -> Program:
    """Rows of time, steps and memory in buckets, and what is known of `groups`."""
    program = Program(np.array([task.weight for task in tasks]))
    every = range(len(tasks))
    add_time(program, every, tasks, groups, costs, limits, cuts_of(tasks, costs.base))
    return program


def add_time(
    program: Program,
    columns: Sequence[int],
    tasks: Sequence[Task],
    groups: Sequence[PromptGroup],
    costs: Costs,
    limits: Limits,
    cuts: Floats,
    used: Sequence[int] = (),
) -> None:
    """Add these rows to `program`, of tasks of one model.

    Args:
        columns: x of each task; tasks that are served together share theirs.
        cuts: where buckets end; the first is before all tasks, the last behind them.
        used: columns of the seconds that the model's steps have of each bucket; none: all of them.
    """
    buckets = _Buckets(program, columns, tasks, costs, limits, cuts, used)
    buckets.add_groups(groups)
    buckets.begin()
    for at, task in enumerate(tasks):
        buckets.add_prompt(columns[at], task)
        if len(task.due) > 1:
            buckets.add_decodes(columns[at], task)
    for bucket in range(buckets.count):
        buckets.add_bucket(bucket)


class _Buckets:
    """A program under way.

    `prompts` and `others` are columns of the steps so far, P and Q, at each cut. The other lists
    are by bucket: columns of parts of prompts (y), and of context that is read beside prompts (u)
    and in other steps (v), which all stand for tokens, and with `per_job` for decodes.
    """

    def __init__(
        self,
        program: Program,
        columns: Sequence[int],
        tasks: Sequence[Task],
        costs: Costs,
        limits: Limits,
        cuts: Floats,
        used: Sequence[int],
    ) -> None:
        self.program, self.columns, self.tasks = program, columns, tasks
        self.costs, self.limits = costs, limits
        self.cuts, self.used = cuts, used
        self.count = len(cuts) - 1
        self.most_steps = float(cuts[-1] - cuts[0]) / costs.base + 1
        self.prompts = self.others = range(0)
        self.tokens: list[Sum] = [[] for _ in range(self.count)]
        self.beside: list[Sum] = [[] for _ in range(self.count)]
        self.apart: list[Sum] = [[] for _ in range(self.count)]
        self.per_job: dict[int, float] = {}  # by column: decodes in a token of context
        self.top: dict[int, float] = {}

    def add_groups(self, groups: Sequence[PromptGroup]) -> None:
        """The bounds of groups and the rows of their windows hold here too."""
        column_of = zip(self.tasks, self.columns, strict=True)
        place = {task.id: column for task, column in column_of}
        for group in groups:
            names = [place[task.id] for task in group.tasks]
            if group.method != "all":
                self.program.row(names, [task.weight for task in group.tasks], group.value)
            for columns, values, right in group.windows:
                self.program.row([names[at] for at in columns], values, right)

    def begin(self) -> None:
        """Columns of steps."""
        self.prompts = self.program.columns(self.count + 1, self.most_steps)
        self.others = self.program.columns(self.count + 1, self.most_steps)

    def add_prompt(self, at: int, task: Task) -> None:
        """Its prompt is computed in time, and by a step with prompts."""
        start = self._before(task.start)
        stop = self._after(task.first)
        parts = self.program.columns(stop - start)
        for bucket, part in zip(range(start, stop), parts, strict=True):
            self.tokens[bucket].append((part, float(task.prompt)))
            self.top[part] = 1.0
        self.program.row([at, *parts], [1.0] + [-1.0] * len(parts))
        self.program.row([at, self.prompts[start], self.prompts[stop]], [1.0, 1.0, -1.0])

    def add_decodes(self, at: int, task: Task) -> None:
        """By each cut it has read what its outputs due there take, one of them a step."""
        start, stop = self._before(task.start), self._after(task.end)
        count, most = stop - start, task.read(len(task.due))
        u, v = self.program.columns(count, most), self.program.columns(count, most)
        for bucket, beside, apart in zip(range(start, stop), u, v, strict=True):
            self.beside[bucket].append((beside, 1.0))
            self.apart[bucket].append((apart, 1.0))
            self.per_job |= dict.fromkeys((beside, apart), 1 / task.most)
            self.top |= dict.fromkeys((beside, apart), most)
        every = [*u, *v]
        self.program.row([at, *every], [-most, *[1.0] * len(every)])
        for bucket, beside, apart in zip(range(start, stop), u, v, strict=True):
            here = [*self._steps(bucket), beside, apart]
            self.program.row(here, [*_one(-1.0), 1 / task.most, 1 / task.most])
        for after in range(start + 1, stop + 1):
            by = self._due(task, after, stop)
            if by < 2:
                continue
            some = [*u[: after - start], *v[: after - start]]
            self.program.row([at, *some], [1.0] + [-1 / task.read(by)] * len(some))
            edges = [self.prompts[start], self.others[start]]
            edges += [self.prompts[after], self.others[after]]
            signs = (1.0, 1.0, -1.0, -1.0)
            self.program.row([at, *edges], [1.0, *(sign / by for sign in signs)])

    def add_bucket(self, bucket: int) -> None:
        """The steps in a bucket take no more than its seconds, memory and batches."""
        beside, apart = self.beside[bucket], self.apart[bucket]
        parts = [self.tokens[bucket], beside, self._jobs(beside), apart, self._jobs(apart)]
        tops = [sum(self.top[column] * value for column, value in part) for part in parts]
        sums = [self.program.columns(1, float(top))[0] for top in tops]
        for total, part in zip(sums, parts, strict=True):
            columns = [total, *(column for column, _ in part)]
            self.program.row(columns, [-1.0, *(value for _, value in part)])
        here = self._steps(bucket)
        self.program.row(here[:2], [-1.0, 1.0])
        self.program.row(here[2:], [-1.0, 1.0])
        used = [*self.used[bucket : bucket + 1]]
        seconds = 0.0 if used else float(self.cuts[bucket + 1] - self.cuts[bucket])
        for line in self.costs.prompts:
            values = [*_seconds(line, self.costs.decodes), *[-1.0] * len(used)]
            self.program.row([*here, *sums, *used], values, seconds)
        self._add_memory(here, sums)
        batch = self.limits.max_batch
        self.program.row([*here[:2], sums[2]], [-2 * batch, 2 * batch, 1.0])
        self.program.row([*here[2:], sums[4]], [-batch, batch, 1.0])

    def _add_memory(self, here: list[int], sums: list[int]) -> None:
        """Who is in a step has its memory: T + C <= memory * steps."""
        memory = self.limits.memory
        if memory is not None:
            self.program.row([*here[:2], *sums[:2]], [-memory, memory, 1.0, 1.0])
            self.program.row([*here[2:], sums[3]], [-memory, memory, 1.0])

    def _jobs(self, part: Sum) -> Sum:
        return [(column, self.per_job[column]) for column, _ in part]

    def _steps(self, bucket: int) -> list[int]:
        """Columns of steps with prompts and of the others, by the end of a bucket and before."""
        ends = [self.prompts[bucket + 1], self.prompts[bucket]]
        return [*ends, self.others[bucket + 1], self.others[bucket]]

    def _due(self, task: Task, cut: int, stop: int) -> int:
        """Outputs that are due by a cut; at `stop` all are."""
        if cut == stop:
            return len(task.due)
        return int(np.searchsorted(task.due, self.cuts[cut], "right"))

    def _before(self, time: float) -> int:
        """The bucket that `time` lies in."""
        return int(np.searchsorted(self.cuts, time, "right")) - 1

    def _after(self, time: float) -> int:
        """The first cut at or after `time`."""
        return min(int(np.searchsorted(self.cuts, time, "left")), self.count)


def cuts_of(tasks: Sequence[Task], base: float, buckets: int = BUCKETS) -> Floats:
    """Where buckets begin and end: all of one width, or arrivals and deadlines if few.

    `base`: seconds of the shortest step; `buckets`: so many in the mean life of a task.
    """
    exact = {task.start for task in tasks}.union(*(task.due.tolist() for task in tasks))
    if len(exact) <= EXACT:
        return np.array(sorted(exact))
    begin, end = min(task.start for task in tasks), max(task.end for task in tasks)
    life = float(np.mean([task.end - task.start for task in tasks]))
    width = max(life / buckets, (end - begin) / MOST_BUCKETS, base)
    count = max(math.ceil((end - begin) / width), 1)
    return begin + width * np.arange(count + 1, dtype=np.float64)


def _one(sign: float) -> list[float]:
    """What the columns of `_steps` count for, of `sign` times the steps in a bucket."""
    return [sign, -sign, sign, -sign]


def _seconds(line: Line, other: Line) -> list[float]:
    """Seconds of steps: the ends of P and Q in a bucket, tokens, and context and jobs in either."""
    steps = (line.start, -line.start, other.start, -other.start)
    return [*steps, line.token, line.read, line.job, other.read, other.job]
