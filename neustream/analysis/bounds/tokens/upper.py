"""The bound for generations: groups of prompts, then all steps in time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from neustream.analysis.bounds.bound import Bound, Group, T, known_weight, methods, overlapping
from neustream.analysis.bounds.linear import Program
from neustream.analysis.bounds.tokens.buckets import time_program
from neustream.analysis.bounds.tokens.costs import Costs, Limits, costs_of
from neustream.analysis.bounds.tokens.prompts import PATIENCE_S, PromptGroup, prices_bound
from neustream.analysis.bounds.tokens.tasks import Task, in_time_if_alone, task_of
from neustream.core.policy import Pool
from neustream.core.steps import StepLatency
from neustream.core.types import Request
from neustream.engine.clock import WallClock
from neustream.errors import GraphError

PROGRAMS = ((0, False), (0, True), (6, False), (16, False), (6, True), (16, True))
"""Programs of groups in order: cells of the shortest step (0: windows), whether x is whole."""
LINKED = ((4, False), (8, False), (4, True), (8, True))
"""The same for starts that are linked to decodes."""
SMALL = 60
"""These are for loads of no more tasks: in larger ones they took half of the time for no gain."""
FEW = 8
"""Tasks whose lives overlap are a group if there are no more than that."""
WHOLE = 3_000
"""A program of time with no more columns is solved with whole tasks too."""
PART = 3
"""Groups get this part of the time, one in so many."""
TIME = "time"


def token_bound(  # noqa: PLR0913 - what is bounded is described by all of these
    requests: Sequence[Request],
    lengths: Mapping[str, int],
    steps: StepLatency,
    pool: Pool,
    *,
    max_batch: int = 256,
    scale: float = 1.0,
    overhead_s: float = 0.0,
    time_limit_s: float = 60.0,
    known: Sequence[Collection[str]] = (),
) -> Bound:
    """The most weight of generations that any scheduler could serve on time.

    Requests that were promised nothing count as served.

    Args:
        lengths: outputs of each request, by id.
        steps: a `StepProfile` of tables; others tell too little about themselves to be bounded.
        max_batch: the most decodes in a step.
        scale, overhead_s: a step takes its profiled seconds times `scale`, and `overhead_s` on top.
        time_limit_s: after about so long the best bound found so far is returned.
        known: as of `upper_bound`.

    Raises:
        GraphError: a request is not to a language model alone.
        ProfileError: `steps` cannot be bounded.
        NeustreamError: one of `known` serves more than was proven to be possible.
    """
    clock = WallClock()
    in_order = sorted(requests, key=lambda one: one.arrival)
    every = [task_of(request, lengths[request.id]) for request in in_order]
    memory = _capacity(pool, in_order)
    limits = Limits(max_batch, memory, scale, overhead_s)
    costs = costs_of(steps, max((t.prompt + t.outputs for t in every), default=1), limits)
    promised = [task for task in every if len(task.due)]
    free = sum(task.weight for task in every if not len(task.due))
    tasks = [task for task in promised if in_time_if_alone(task, costs, memory)]
    groups = solved_groups(tasks, costs, known, clock, time_limit_s / PART)
    load = _Load(tasks, groups, known_weight(tasks, known))
    shares = {task.id: float(not len(task.due)) for task in every}
    shares |= dict.fromkeys(load.ids, 1.0)
    if tasks:
        program = time_program(tasks, groups, costs, limits)
        # its own part of the time is there even if a group was solved for longer than it had
        rest = max(time_limit_s - clock.now(), time_limit_s * (1 - 1 / PART))
        shares |= load.solve(program, rest)
    lower = [load.method] if load.method == TIME else []
    return Bound(
        free + load.value,
        free + load.relaxed,
        free + load.proven,
        methods(groups, lower),
        clock.now(),
        shares,
    )


def _capacity(pool: Pool, requests: Sequence[Request]) -> int | None:
    """Tokens in the KV cache of the requests' model, None without one; GraphError for several."""
    models = {stage.model for one in requests for stage in one.graph.stages.values()}
    if len(models) > 1:
        raise GraphError(f"no bound for several models in one: {sorted(models)}")
    caches = [cache for model, cache in pool.kv_caches.items() if model in models]
    return caches[0].capacity if caches else None


def solved_groups(
    tasks: Sequence[Task],
    costs: Costs,
    known: Sequence[Collection[str]],
    clock: WallClock,
    until: float,
) -> list[PromptGroup]:
    """Groups of generations whose prompts compete, improved until `clock` shows `until`."""
    groups = [PromptGroup(some, costs, known_weight(some, known)) for some in parts(tasks)]
    passes = [(PROGRAMS, False)] + [(LINKED, True)] * (len(tasks) <= SMALL)
    for programs, linked in passes:
        for cells, whole in programs:
            for group in groups:
                if (left := until - clock.now()) > 0:
                    group.solve(cells, whole, left, linked=linked)
    return groups


def parts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that compete: few over all of their lives, more of them over their prompts."""
    found: list[list[Task]] = []
    for some in overlapping(tasks, lambda task: task.end):
        few = len(some) <= FEW
        found += [some] if few else overlapping(some, lambda task: task.first)
    return sorted(found, key=len)


class _Load(Group[Task]):
    """All tasks: what their groups add up to, unless the program of time is below that."""

    def __init__(self, tasks: Sequence[Task], groups: Sequence[PromptGroup], known: float) -> None:
        super().__init__(tasks, known)
        self.groups = groups
        self.ids = [task.id for task in tasks]
        self.value = sum(group.value for group in groups)
        self.relaxed = sum(group.relaxed for group in groups)
        self.proven = sum(group.proven for group in groups)

    def solve(self, program: Program, seconds: float) -> dict[str, float]:
        """By a program of time, whose rows hold the values of groups; shares of tasks.

        None are told if it is not solved in time.
        """
        return dict(
            zip(self.ids, improve_by_time(self, program, self.groups, seconds), strict=False)
        )


def improve_by_time(
    load: Group[T], program: Program, groups: Sequence[PromptGroup], seconds: float
) -> Sequence[float]:
    """Lower the bound of `load` by a program of time, whose rows hold the values of `groups`.

    How much of each task is served; of none if it is not solved in `seconds`.
    """
    leans = any(group.value < group.proven for group in groups)
    found = prices_bound(program, seconds)
    if found is None:
        return ()
    load.improve(found[0], TIME, proven=not leans)
    if program.size <= WHOLE and not leans:
        load.improve_by_whole(program, TIME, min(seconds, PATIENCE_S))
    return found[1]
