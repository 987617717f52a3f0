"""A provable bound on how much any scheduler could serve on time, were it told the whole trace in advance.

Take any schedule, and let S be the jobs that it serves on time.

*Clean-up.* Delete all other jobs from its batches, and let l(b) be the least latency of a batch of b or more jobs. No
step gets longer, so S is still on time; and now each batch of b jobs can be said to take l(b), lies in the windows of
all its members, and has no more members than there are jobs whose windows allow it. The window of a job at a stage
begins at its arrival plus the least time of the calls before, and ends at its deadline less the least time of those
after. Groups of jobs whose windows do not overlap have nothing to do with each other: their bounds add up.

*Shares.* Cut time into slots; D[k] is the length of slot k, D[j,k] of its part in the window of job j. Let u[b] (for
each job j, stage m and slot k) be the time in which j is in batches of b jobs, and charge it 1/b of that; b is at most
N[m,k], the jobs whose windows at m meet the slot. Then, with n calls of j at m, for j in S:

    sum over k, b     u / l(b) = n                          its calls are made
    sum over j, m, b  u / b   <= workers * D[k]             who shares a batch shares its time
    sum over m, b     u       <= D[j,k]                     a job is in one batch at a time

*LP.* So the most sum of weight * x[j] under these rows, with right sides n * x[j] and D[j,k] * x[j] and 0 <= x <= 1, is
a bound. Only batch sizes at corners of the concave hull of (1/b, 1/l(b)) matter. Any grid of slots is valid; on exact
ones the LP is no looser than `slack_bound`, by Jensen's inequality. With several pools each has rows of its own.

*Certificate.* The solver need not be trusted: for any prices p[k] >= 0 of a worker's time and q[j,m] of steps,

    weight of S <= sum over k of workers * D[k] * p[k]
                   + sum over j of max(0, weight - sum over m of q * n + sum over k of D[j,k] * g[j,k]),
    g[j,k] = max(0, max over m and b of q[j,m] / l(b) - p[k] / b).

Proof: to the weight of S add p times the slack of the second row and q times (left - right side) of the first, which
is 0. A second that j spends in a batch of b then counts q / l(b) - p / b, at most g[j,k]; there are at most D[j,k].
Numpy evaluates this at the solver's duals: that is `Bound.relaxed`.

*Whole jobs.* Where deadlines are tight, fractions of jobs fit that no whole jobs do. Bounds of groups are rounded down
if weights are whole, and the rows bound the weight of S all the same with x in {0, 1} (MILP).

*Teams.* Shares let a job pay for half a batch while nobody is in the other half. With z[b] (for each stage and slot)
the time in which batches of b jobs run, added up over workers, this takes the place of the second row:

    u[j] <= z[b],    sum over j of u = b * z[b],    sum over m, b of z <= workers * D[k].

It is true of any schedule. With x in {0, 1} and one worker, what is left out is where in a slot batches begin and
end, and that steps are whole. In MILPs the dual bound of HiGHS is taken at its word.

Shares and the slack-priced bound are our own; the interval bound behind the latter is that of preemptive scheduling.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from neustream.core.graph import Graph, Loop, Node, Seq, Stage, Switch
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.types import TICK, Request
from neustream.core.work import Walk
from neustream.engine.clock import WallClock
from neustream.errors import BackendError, GraphError, ProfileError

try:
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_array  # type: ignore[import-untyped]
except ImportError:
    raise BackendError("bounds need scipy: pip install 'neustream[analysis]'") from None

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDING = 1e-6
"""What solvers and sums of floats may be off by, in units of weight."""
COARSE, MEDIUM, FINE = 2_000, 8_000, 100_000
"""How large the programs of a group may be, in columns, before slots are merged."""
PART = 8
"""So many slots a window are left in any case."""
FEW = 12
"""Groups of so few tasks are solved as whole jobs even if the LP serves all: it takes no time."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No scheduler serves more than `value` (requests, or their weight) on time.

    `relaxed` is the LP's bound, certified by its prices. `method` says how many groups of requests got
    their part of `value` from what: "all" (perhaps all can be served), "LP", "MILP" or "teams".
    `seconds` is the time it took. `shares` is how much of each request (by id) the LP's solution
    serves, 1 where all of its group may be: whom an ideal scheduler would tend to starve.
    """

    value: float
    relaxed: float
    method: str
    seconds: float
    shares: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage on its device: the capacity it draws on, and seconds of a step of 1, 2, ... jobs or more."""

    pool: int
    latency: Floats


@dataclass(frozen=True, slots=True)
class _Visit:
    """`calls` steps of a job at a stage, all of them between `start` and `end`."""

    stage: int
    calls: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class _Task:
    """A request that can be served on time if it is alone."""

    id: str
    weight: float
    visits: tuple[_Visit, ...]

    @property
    def start(self) -> float:
        return min(visit.start for visit in self.visits)

    @property
    def end(self) -> float:
        return max(visit.end for visit in self.visits)


class _Group:
    """Tasks whose windows overlap, and the least bound known for them."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.tasks = tasks
        self.whole = all(task.weight.is_integer() for task in tasks)
        self.all = self.value = self.relaxed = sum(task.weight for task in tasks)
        self.shares: Sequence[float] = [1.0] * len(tasks)
        self.method = "all"
        self.solved = False  # whether its last MILP was solved to the end
        self.merged = True  # whether its last LP had a coarser grid than there could be

    def improve(self, bound: float, method: str) -> None:
        if method == "LP":
            self.relaxed = min(self.relaxed, bound)
        value = bound + ROUNDING * (method != "LP")
        if self.whole and math.isfinite(value):
            value = math.floor(bound + ROUNDING)
        if value < self.value:
            self.value, self.method = value, method

    @property
    def settled(self) -> bool:
        """Whether the LP cannot get lower: each task can be served on time."""
        return self.value <= max(task.weight for task in self.tasks)

    @property
    def loose(self) -> bool:
        """Whether it is worth asking what whole tasks say: the LP serves neither only one nor all of many."""
        return not self.settled and (self.relaxed < self.all - ROUNDING or len(self.tasks) <= FEW)


def upper_bound(
    requests: Sequence[Request],
    profiles: Mapping[str, LatencyProfile],
    pools: Sequence[Pool],
    *,
    overhead_s: float = 0.0,
    time_limit_s: float = 100.0,
) -> Bound:
    """The most weight of `requests` that any scheduler could serve on time.

    Only for graphs whose calls are known in advance and have no sizes. Promises on outputs before the
    last are ignored; requests without a deadline count as served.

    Args:
        profiles: least seconds of a step, by stage.
        overhead_s: what each step takes on top.
        time_limit_s: after about so long the best bound found so far is returned.
    """
    clock = WallClock()
    stages, tasks, free = _tasks(requests, profiles, pools, overhead_s)
    groups = [_Group(tasks) for tasks in _overlapping(tasks)]
    build = partial(_program, stages=stages, workers=[pool.seats for pool in pools])
    _relax(groups, build, clock, time_limit_s)
    _tighten(groups, build, clock, time_limit_s)
    counts = Counter(group.method for group in groups)
    shares = {request.id: 0.0 for request in requests}
    for request in requests:
        if request.slo.total == math.inf:
            shares[request.id] = 1.0
    for group in groups:
        shares |= {task.id: share for task, share in zip(group.tasks, group.shares, strict=True)}
    return Bound(
        free + sum(group.value for group in groups),
        free + sum(group.relaxed for group in groups),
        ", ".join(f"{method} {count}" for method, count in counts.items()),
        clock.now(),
        shares,
    )


def _relax(groups: Sequence[_Group], build: Callable[..., _Program], clock: WallClock, until: float) -> None:
    """Improve `groups` by LPs on a coarse grid, so that each has a bound soon, and then on a fine one."""
    for columns in (COARSE, FINE):
        for group in groups:
            left = until - clock.now()
            if left > 0 and not group.settled and group.merged:
                program = build(group.tasks, columns=columns)
                group.merged = program.merged
                bound, group.shares = _share_lp(program, left) or (math.inf, group.shares)
                group.improve(bound, "LP")


def _tighten(groups: Sequence[_Group], build: Callable[..., _Program], clock: WallClock, until: float) -> None:
    """Improve `groups` by MILPs, small ones first; who does not get to the end of one gets no harder one."""
    for method, columns in (("MILP", COARSE), ("teams", COARSE), ("teams", MEDIUM)):
        now = clock.now()
        stop = until if columns == MEDIUM else (now + until) / 2
        for at, group in enumerate(groups):
            left = stop - clock.now()
            if left <= 0 or not group.loose or not (group.solved or method == "MILP"):
                continue
            program = build(group.tasks, columns=columns)
            if columns == MEDIUM and program.columns <= COARSE:
                continue  # as before
            bound, group.solved = _whole(program, method == "teams", min(left, 5 * left / (len(groups) - at)))
            group.improve(bound, method)


def slack_bound(
    requests: Sequence[Request],
    profiles: Mapping[str, LatencyProfile],
    pools: Sequence[Pool],
    *,
    overhead_s: float = 0.0,
) -> float:
    """A cheaper bound on the same, never below `Bound.relaxed` with exact slots; not rounded.

    A job's calls fit into its window one after the other, so their mean latency is given, and the
    least that they can be charged follows from the convex hull of (l(b), l(b)/b). A pool has to
    deliver that much in each job's window; the least bound of all pools counts.
    """
    stages, tasks, free = _tasks(requests, profiles, pools, overhead_s)
    if not tasks:
        return free
    best = math.inf
    for at, pool in enumerate(pools):
        charges = np.array([_least_charge(task, stages, at) for task in tasks])
        best = min(best, _flow(tasks, charges, pool.seats))
    return free + best


def _least_charge(task: _Task, stages: Sequence[_Stage], pool: int) -> float:
    """Least seconds of workers of `pool` that `task` costs: the best use of its slack is larger batches."""
    slack, charge = task.end - task.start, 0.0
    savings: list[tuple[float, float]] = []  # (seconds of slack, what each of them saves)
    for visit in task.visits:
        latency = stages[visit.stage].latency
        slack -= visit.calls * float(latency[0])
        if stages[visit.stage].pool == pool:
            corners = [(float(latency[b - 1]), float(latency[b - 1]) / b) for b in reversed(_useful(latency))]
            charge += visit.calls * corners[0][1]
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                savings.append((visit.calls * (x1 - x0), (y0 - y1) / (x1 - x0)))
    for seconds, saved in sorted(savings, key=lambda saving: -saving[1]):
        used = min(seconds, max(0.0, slack))
        slack, charge = slack - used, charge - used * saved
    return charge


def _flow(tasks: Sequence[_Task], charges: Floats, workers: int) -> float:
    """The most weight whose charges fit into the windows of their tasks, preempted and in fractions at will."""
    start, end = np.array([task.start for task in tasks]), np.array([task.end for task in tasks])
    cuts = np.unique(np.concatenate([start, end]))
    first, stop = np.searchsorted(cuts, start), np.searchsorted(cuts, end)
    job = np.repeat(np.arange(len(tasks)), stop - first)
    slot = np.concatenate([np.arange(*span) for span in zip(first, stop, strict=True)])
    use = len(tasks) + np.arange(len(job))
    parts = [
        (np.arange(len(tasks)), np.arange(len(tasks)), charges),
        (job, use, -np.ones(len(job))),
        (len(tasks) + slot, use, np.ones(len(job))),
    ]
    row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    weight = np.array([task.weight for task in tasks])
    found = linprog(
        np.concatenate([-weight, np.zeros(len(job))]),
        A_ub=csr_array((value, (row, column))),
        b_ub=np.concatenate([np.zeros(len(tasks)), workers * np.diff(cuts)]),
        bounds=[(0, 1)] * len(tasks) + [(0, None)] * len(job),
        method="highs-ipm",
    )
    return -float(found.fun)


# -- what has to be done ----------------------------------------------------------------------------


def _tasks(
    requests: Sequence[Request], profiles: Mapping[str, LatencyProfile], pools: Sequence[Pool], overhead_s: float
) -> tuple[list[_Stage], list[_Task], float]:
    """Stages, requests that can be served on time if alone, and the weight of those that cannot be late."""
    stages = _stages({request.graph: None for request in requests}, profiles, pools, overhead_s)
    places = {name: at for at, name in enumerate(stages)}
    tasks: list[_Task] = []
    free = 0.0
    for request in requests:
        calls = _calls(request)
        # one tick late is on time; another is for the rounding of whoever adds up latencies
        due = request.arrival + _promise(request, calls) + 2 * TICK
        seconds = [count * float(stages[stage.name].latency[0]) for stage, count in calls]
        if due == math.inf or not calls:
            free += request.slo.weight
        elif sum(seconds) <= due - request.arrival:
            work = [(places[stage.name], count) for stage, count in calls]
            tasks.append(_Task(request.id, float(request.slo.weight), _visits(work, seconds, request.arrival, due)))
    return list(stages.values()), tasks, free


def _stages(
    graphs: Iterable[Graph], profiles: Mapping[str, LatencyProfile], pools: Sequence[Pool], overhead_s: float
) -> dict[str, _Stage]:
    pool_of = {stage: at for at, pool in enumerate(pools) for stage in pool.stages}
    stages: dict[str, _Stage] = {}
    for graph in graphs:
        _check(graph.root, graph)
        for name, stage in graph.stages.items():
            if name not in pool_of:
                raise GraphError(f"stage {name!r} of graph {graph.name!r} is in no pool")
            if name not in profiles:
                raise ProfileError(f"stage {name!r} of graph {graph.name!r} has no profile")
            stages.setdefault(name, _Stage(pool_of[name], _latency(stage, profiles[name], overhead_s)))
    return stages


def _check(node: Node, graph: Graph) -> None:
    """GraphError unless it is known in advance which steps a job of `graph` takes, and how long they are."""
    match node:
        case Stage(size=None, model=""):
            pass
        case Stage():
            raise GraphError(f"no bound for graph {graph.name!r}: stage {node.name!r} has sized or fused steps")
        case Seq():
            for child in node.nodes:
                _check(child, graph)
        case Loop():
            if node.times is None or node.expect is not node.times:
                raise GraphError(f"no bound for graph {graph.name!r}: the length of a loop is not known in advance")
            _check(node.body, graph)
        case Switch():
            raise GraphError(f"no bound for graph {graph.name!r}: the way through a switch is not known in advance")


def _calls(request: Request) -> list[tuple[Stage, int]]:
    return list(Walk(request).ahead())


def _promise(request: Request, calls: Sequence[tuple[Stage, int]]) -> float:
    """Seconds from arrival in which the last call has to end."""
    slo = request.slo
    outputs = sum(count for stage, count in calls if stage.emits)
    if outputs and not calls[-1][0].emits:
        return slo.total
    if outputs <= 1:
        return min(slo.total, slo.first)
    return min(slo.total, slo.first + (outputs - 1) * slo.step) if slo.step < math.inf else slo.total


def _latency(stage: Stage, profile: LatencyProfile, overhead_s: float) -> Floats:
    most = min(stage.max_batch, profile.max_batch)
    seconds = np.array([profile.latency(batch) + overhead_s for batch in range(1, most + 1)])
    return np.minimum.accumulate(seconds[::-1])[::-1]


def _visits(work: Sequence[tuple[int, int]], seconds: Sequence[float], start: float, end: float) -> tuple[_Visit, ...]:
    """One visit a stage, in the window that calls of other stages before and after it leave."""
    names = [stage for stage, _ in work]
    visits = []
    for stage in dict.fromkeys(names):
        first = names.index(stage)
        last = len(names) - 1 - names[::-1].index(stage)
        # Of a loop over several stages only the first round is in order: what comes after a call of
        # such a stage may be in the loop too, unless it is the only place of its own stage.
        after = [at for at in range(last + 1, len(names)) if first == last or names.count(names[at]) == 1]
        head, tail = sum(seconds[:first]), sum(seconds[at] for at in after)
        visits.append(_Visit(stage, sum(n for s, n in work if s == stage), start + head, end - tail))
    return tuple(visits)


def _overlapping(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Tasks whose windows overlap, directly or through others; small groups first."""
    groups: list[list[_Task]] = []
    reach = -math.inf
    for task in sorted(tasks, key=lambda task: task.start):
        if task.start >= reach:
            groups.append([])
        groups[-1].append(task)
        reach = max(reach, task.end)
    return sorted(groups, key=len)


# -- the share program ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Program:
    """The share LP of a group of tasks on a grid of slots.

    An entry is a visit in one slot of its window, a pair is a job in one slot of its window, a row
    is a pool in one slot.
    """

    stages: Sequence[_Stage]
    weight: Floats  # by job
    job: Ints  # by visit
    stage: Ints  # by visit
    calls: Floats  # by visit
    capacity: Floats  # by row
    visit: Ints  # by entry
    limit: Ints  # by entry: the most jobs in a batch
    row: Ints  # by entry
    pair: Ints  # by entry
    pair_job: Ints  # by pair
    pair_seconds: Floats  # by pair
    merged: bool = False  # whether the grid has fewer cuts than there are edges of windows

    @property
    def columns(self) -> int:
        """About how many columns its matrix has: half of the batch sizes are useful."""
        return int(self.limit.sum()) // 2


def _program(group: Sequence[_Task], stages: Sequence[_Stage], workers: Sequence[int], columns: int) -> _Program:
    """The program of a group on the finest grid that keeps it below about so many columns."""
    cuts = np.unique([edge for task in group for visit in task.visits for edge in (visit.start, visit.end)])
    program = _on_grid(group, stages, workers, cuts)
    apart = float(np.diff(cuts).mean()) / 2
    most = float(np.mean([task.end - task.start for task in group])) / PART
    while program.columns > columns and apart < most:
        cuts, apart = _thinned(cuts, apart), 2 * apart
        program = _on_grid(group, stages, workers, cuts)
        program.merged = True
    return program


def _thinned(cuts: Floats, apart: float) -> Floats:
    """`cuts` without those that follow another within `apart`; the first and the last stay."""
    kept = [float(cuts[0])]
    for cut in cuts[1:-1].tolist():
        if cut >= kept[-1] + apart:
            kept.append(cut)
    return np.array([*kept, float(cuts[-1])])


def _on_grid(group: Sequence[_Task], stages: Sequence[_Stage], workers: Sequence[int], cuts: Floats) -> _Program:
    visits = [visit for task in group for visit in task.visits]
    job = np.array([at for at, task in enumerate(group) for _ in task.visits])
    stage = np.array([visit.stage for visit in visits])
    slots = len(cuts) - 1
    first = np.searchsorted(cuts, [visit.start for visit in visits], "right") - 1
    stop = np.searchsorted(cuts, [visit.end for visit in visits], "left")
    alive = np.zeros((len(stages), slots + 1), dtype=np.int64)
    np.add.at(alive, (stage, first), 1)
    np.add.at(alive, (stage, stop), -1)
    alive = np.minimum(alive.cumsum(axis=1), np.array([[len(s.latency)] for s in stages]))
    visit = np.repeat(np.arange(len(visits)), stop - first)
    slot = np.concatenate([np.arange(*span) for span in zip(first, stop, strict=True)])
    pairs, pair = np.unique(job[visit] * slots + slot, return_inverse=True)
    pair_job, pair_slot = np.divmod(pairs, slots)
    start, end = np.array([task.start for task in group]), np.array([task.end for task in group])
    seconds = np.minimum(cuts[pair_slot + 1], end[pair_job]) - np.maximum(cuts[pair_slot], start[pair_job])
    pool = np.array([s.pool for s in stages])
    return _Program(
        stages=stages,
        weight=np.array([task.weight for task in group]),
        job=job,
        stage=stage,
        calls=np.array([float(visit.calls) for visit in visits]),
        capacity=np.outer(workers, np.diff(cuts)).ravel(),
        visit=visit,
        limit=alive[stage[visit], slot],
        row=pool[stage[visit]] * slots + slot,
        pair=pair,
        pair_job=pair_job,
        pair_seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """Minimise `cost` where `matrix` times the columns is at most `right`; 0 <= columns <= `upper`.

    Rows: visits, then the program's rows, then pairs, then what teams add. Columns: jobs, then uses,
    then teams.
    """

    cost: Floats
    matrix: csr_array
    right: Floats
    upper: Floats


def _linear(program: _Program, teams: bool) -> _Linear:
    entry, batch, latency = _uses(program, teams)
    jobs, visits, rows, pairs = (len(x) for x in (program.weight, program.calls, program.capacity, program.pair_job))
    use = jobs + np.arange(len(entry))
    columns, height = jobs + len(entry), visits + rows + pairs
    parts = [  # row, column, value; progress is counted in parts of a visit, which keeps numbers near 1
        (np.arange(visits), program.job, np.ones(visits)),
        (program.visit[entry], use, -1 / (latency * program.calls[program.visit[entry]])),
        (visits + rows + program.pair[entry], use, np.ones(len(entry))),
        (visits + rows + np.arange(pairs), program.pair_job, -program.pair_seconds),
    ]
    if teams:
        kinds, sizes = len(program.stages), int(batch.max()) + 1
        stage = program.stage[program.visit[entry]]
        keys, team = np.unique((program.row[entry] * kinds + stage) * sizes + batch, return_inverse=True)
        row, size = keys // (kinds * sizes), keys % sizes
        run = columns + np.arange(len(keys))
        several = np.flatnonzero(batch > 1)  # of one, u <= z is the row before
        member = height + len(keys) + np.arange(len(several))
        parts += [
            (visits + row, run, np.ones(len(keys))),
            (height + team, use, np.ones(len(entry))),
            (height + np.arange(len(keys)), run, -size.astype(float)),
            (member, use[several], np.ones(len(several))),
            (member, run[team[several]], -np.ones(len(several))),
        ]
        columns, height = columns + len(keys), height + len(keys) + len(several)
    else:
        parts.append((visits + program.row[entry], use, 1 / batch))
    at, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    right = np.zeros(height)
    right[visits : visits + rows] = program.capacity
    return _Linear(
        cost=np.concatenate([-program.weight, np.zeros(columns - jobs)]),
        matrix=csr_array((value, (at, column)), shape=(height, columns)),
        right=right,
        upper=np.concatenate([np.ones(jobs), np.full(columns - jobs, np.inf)]),
    )


def _uses(program: _Program, teams: bool) -> tuple[Ints, Ints, Floats]:
    """Entry, batch size and latency of each column of time; without teams only sizes at corners."""
    stage = program.stage[program.visit]
    found = []
    for kind, limit in sorted(set(zip(stage.tolist(), program.limit.tolist(), strict=True))):
        latency = program.stages[kind].latency[:limit]
        entries = np.flatnonzero((stage == kind) & (program.limit == limit))
        for batch in range(1, limit + 1) if teams else _useful(latency):
            found.append((entries, np.full(len(entries), batch), np.full(len(entries), latency[batch - 1])))
    entry, batches, seconds = (np.concatenate(part) for part in zip(*found, strict=True))
    return entry, batches, seconds


def _useful(latency: Floats) -> list[int]:
    """Batch sizes, falling, at the corners of the concave hull of (1 / batch, 1 / latency) and the origin.

    These are charge and progress per second. The same sizes are at the corners of the convex hull of
    (latency, latency / batch): the map between the two planes keeps lines straight.
    """
    corners = [(0.0, 0.0, 0)]
    for batch in range(len(latency), 0, -1):
        x, y = 1 / batch, 1 / float(latency[batch - 1])
        if y <= corners[-1][1]:
            continue
        while len(corners) > 1:
            (x0, y0, _), (x1, y1, _) = corners[-2:]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, y, batch))
    return [batch for _, _, batch in corners[1:]]


def _share_lp(program: _Program, seconds: float) -> tuple[float, Sequence[float]] | None:
    """What prices certify, and how much of each job is served; None if there are none in time."""
    linear = _linear(program, teams=False)
    found = linprog(
        linear.cost,
        A_ub=linear.matrix,
        b_ub=linear.right,
        bounds=np.stack([np.zeros(len(linear.upper)), linear.upper], axis=1),
        method="highs-ipm",
        options={"time_limit": seconds},
    )
    if found.status != 0:
        return None
    visits, rows = len(program.calls), len(program.capacity)
    prices = np.maximum(0.0, -found.ineqlin.marginals)
    bound = _certified(program, prices[:visits] / program.calls, prices[visits : visits + rows])
    return bound, found.x[: len(program.weight)].tolist()


def _certified(program: _Program, step_price: Floats, slot_price: Floats) -> float:
    """The bound by weak duality, for any prices of steps (by visit) and of workers' seconds (by row)."""
    stage = program.stage[program.visit]
    gain = np.zeros(len(program.visit))
    for kind, s in enumerate(program.stages):
        for batch, latency in enumerate(s.latency.tolist(), start=1):
            some = np.flatnonzero((stage == kind) & (program.limit >= batch))
            price = step_price[program.visit[some]] / latency - slot_price[program.row[some]] / batch
            gain[some] = np.maximum(gain[some], price)
    best = np.zeros(len(program.pair_job))
    np.maximum.at(best, program.pair, gain)
    jobs = len(program.weight)
    cost = np.bincount(program.job, step_price * program.calls, jobs)
    cost -= np.bincount(program.pair_job, best * program.pair_seconds, jobs)
    return float(slot_price @ program.capacity + np.maximum(0.0, program.weight - cost).sum())


def _whole(program: _Program, teams: bool, seconds: float) -> tuple[float, bool]:
    """The solver's bound with whole jobs, `inf` if there is none in time, and whether it got to the end."""
    linear = _linear(program, teams)
    found = milp(
        linear.cost,
        constraints=LinearConstraint(linear.matrix, -np.inf, linear.right),
        bounds=Bounds(0.0, linear.upper),
        integrality=(np.arange(len(linear.cost)) < len(program.weight)).astype(int),
        options={"time_limit": seconds},
    )
    bound = math.inf if found.mip_dual_bound is None else -float(found.mip_dual_bound)
    return bound, found.status == 0
