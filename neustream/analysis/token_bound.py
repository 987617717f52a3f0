"""The most weight of generations that any scheduler of one LLM worker could serve on time, told everything in advance.

Output k (from 0) of a request that arrives at a is due at d[k]: a + first + k * step, and at a + total at the latest.
Take any schedule, and let S be the requests whose outputs are all on time. Only work for S is counted; a step that
does more is no shorter than what is claimed of it here, since everything that is claimed rises with the work.

*Steps.* `_Costs` has lower bounds of a step's seconds, proven from the profile where they are made:

    least[T]                               any step that computes T or more tokens of prompts; none is below `base`
    start + token * T + job * D + read * C each of `prompts`, for a step with T > 0 such tokens, D decodes, context C
    start + job * D + read * C             `decodes`, for any other step

An output after the first may also come from a recomputation, after an eviction, whose tokens are at least as many as
the context that a decode would have read. Lines with `token` less than `job + read` count no decodes, so that each of
those tokens costs no less than the token of context, and its part of a decode, that it is counted as.

*Windows.* The steps that compute the prompt of i in S lie in [a, d[0]]. So those of all i in S with both ends in [s, t]
lie in there, one after the other. With most(w) the tokens that whole steps can compute in w seconds (by dynamic
programming over `least`), sum over these i of prompt * x <= most(t - s). Prompts above most + 1 count as most + 1: one
of them alone is too much, so x = 0 or nothing changes.

*Starts.* Cut time into cells of base / n seconds; put a step into the cell that it starts in. A step of seconds l keeps
the starts after it l behind, so floor(l / cell) cells: with w[c,k] (steps of class k that start in cell c; class k has
at most size[k] tokens and takes at least length[k]) at most one step covers a cell. A step that computes a part y[i,c]
of i's prompt starts no earlier than a and no later than d[0] - length[k]. So, with x = sum over c of y,

    y[i,c] <= sum of w[c,k] over k whose steps can end by d[0] of i
    sum of prompt * y[i,c] <= sum of size[k] * w[c,k]     over k <= K, and those i for whom k > K would end too late
    sum of w[c,k] over steps that cover a cell <= 1

(the second since a step of class k > K has none of those i). Requests whose [a, d[0]] do not overlap, directly or
through others, share no step of prompts: these programs are solved group by group, as LPs, and with whole x.

*Time.* In buckets of time, a step counts in each with the share of its seconds that lies there. With P and Q the steps
with prompts of S and the others, y[i,t] parts of prompts, u and v tokens of context that i reads in either, for all
lines, buckets t, and d[k]:

    decodes and line, with T = sum of prompt * y, C = sum of u or v, D = sum of u or v / (most context of i)  <= seconds
    sum of P + Q from a to d[k] >= (k + 1) * x             a step emits one output of a request
    sum of y from a to d[0] >= x,   sum of u + v from a to d[k] >= x * (what outputs 1 to k read)   early, if at all
    T + C <= memory * steps                                who is in a step has its memory
    D <= 2 * max_batch * P,   D <= max_batch * Q           in a step with prompts as many may decode and recompute

Windows of requests count all the buckets that they meet. The values of groups and the rows of windows bound x here
too. Recomputed tokens count as u when they are computed: after the first output and before the one that they give.

*Certificate.* For any prices p >= 0 of the rows of "max c * z, A z <= b, 0 <= z <= top", c * z is at most
p * b + sum of max(0, c - p * A) * top. Numpy evaluates this at the duals of the LPs. Of programs with whole x, the dual
bound of HiGHS is taken at its word. Where no solver is done in time, the bounds found before stand.

What is left out: that memory is held between steps, that waiting for a step under way costs time (starts are not
linked to decodes), and that mixed steps cost more than their lines say.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

from neustream.analysis.bound import ROUNDING, Bound
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile, LinearProfile
from neustream.core.steps import DecodeGrid, PrefillTable, StepLatency, StepProfile
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

TOKENS = 4096
"""Tokens up to which windows are looked at."""
PROGRAMS = ((0, False), (0, True), (6, False), (16, False), (6, True), (16, True))
"""Programs of groups, in this order: cells that the shortest step is cut into (0: windows), whether x are whole."""
COLUMNS = 60_000
"""A group with more columns than that keeps its coarser program."""
ENTRIES = 200_000
"""Of the windows of a group so many are left out that their rows have about so many entries."""
BUCKETS = 8
"""Buckets of time in the mean life of a generation."""
SLACK = 2 * TICK
"""Tolerance: one TICK late still counts as on time, a second one absorbs rounding in sums."""


def token_bound(
    requests: Sequence[Request],
    lengths: Mapping[str, int],
    steps: StepLatency,
    pool: Pool,
    *,
    max_batch: int = 256,
    scale: float = 1.0,
    overhead_s: float = 0.0,
    time_limit_s: float = 60.0,
) -> Bound:
    """The most weight of generations that any scheduler could serve on time.

    Requests that were promised nothing count as served. `Bound.relaxed` is the bound before it is rounded down. Groups
    in `Bound.method` are of requests whose prompts compete with each other, by what bounds them; "time": the program of
    time is below what they add up to.

    Args:
        lengths: outputs of each request.
        steps: a `StepProfile` of tables; others tell too little about themselves to be bounded.
        max_batch: the most decodes in a step.
        scale, overhead_s: a step takes its profiled seconds times `scale`, and `overhead_s` on top.
        time_limit_s: after about so long the best bound found so far is returned.
    """
    clock = WallClock()
    every = [_task(request, lengths[request.id]) for request in sorted(requests, key=lambda one: one.arrival)]
    memory = None if pool.kv_cache is None else pool.kv_cache.capacity
    context = max((task.prompt + task.outputs for task in every), default=1)
    costs = _costs(steps, context, max_batch, memory, scale, overhead_s)
    promised = [task for task in every if len(task.due)]
    shares = {task.id: 0.0 if len(task.due) else 1.0 for task in every}
    free = sum(task.weight for task in every) - sum(task.weight for task in promised)
    tasks = [task for task in promised if _alone(task, costs, memory)]
    groups = [_Group(some, costs) for some in _overlapping(tasks)]
    for cells, whole in PROGRAMS:
        for group in groups:
            if (left := time_limit_s / 3 - clock.now()) > 0:
                group.improve(cells, whole, left)
    value, relaxed = sum(group.value for group in groups), sum(group.relaxed for group in groups)
    method = Counter(group.method for group in groups)
    if tasks:
        program = _time_program(tasks, groups, costs, memory, max_batch)
        bound, x = program.bound(time_limit_s - clock.now()) or (math.inf, [1.0] * len(tasks))
        shares |= {task.id: share for task, share in zip(tasks, x, strict=True)}
        relaxed = min(bound, relaxed)
        bound = math.floor(bound + ROUNDING) if _whole(tasks) and math.isfinite(bound) else bound
        if bound < value:
            value = bound
            method["time"] = 1
    names = ", ".join(f"{name} {count}" for name, count in method.items())
    return Bound(free + value, free + relaxed, names, clock.now(), shares)


# -- what has to be done ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """A request of so many `outputs`; `due` are the deadlines of those, from the first on, that have one."""

    id: str
    weight: float
    start: float
    prompt: int
    outputs: int
    due: Floats

    @property
    def end(self) -> float:
        return float(self.due[-1])

    @property
    def first(self) -> float:
        return float(self.due[0])

    @property
    def most(self) -> int:
        """The most tokens that one of its decodes reads."""
        return self.prompt + self.outputs - 1

    def read(self, outputs: int) -> float:
        """Tokens that are read for so many outputs, the first of which is the prefill's."""
        return (outputs - 1) * self.prompt + outputs * (outputs - 1) / 2


def _task(request: Request, outputs: int) -> _Task:
    slo = request.slo
    paces = np.arange(outputs) * slo.step if slo.step < math.inf else np.array([0.0] + [math.inf] * (outputs - 1))
    due = request.arrival + np.minimum(slo.first + paces, slo.total) + SLACK
    return _Task(request.id, float(slo.weight), request.arrival, _prompt(request), outputs, due[due < math.inf])


def _prompt(request: Request) -> int:
    """Tokens of its prompt; GraphError if its graph is not one call of a language model alone."""
    walk = Walk(request)
    phases = [stage.phase for stage in request.graph.stages.values()]
    if walk.stage is None or sorted(phases) != ["decode", "prefill"]:
        raise GraphError(f"no bound for graph {request.graph.name!r}: it is not a language model's")
    return int(walk.job.size)


def _alone(task: _Task, costs: _Costs, memory: int | None) -> bool:
    """Whether it could perhaps be on time if it were alone."""
    if memory is not None and task.most > memory:
        return False
    left = task.due - task.start - costs.whole(task.prompt) - costs.base * np.arange(len(task.due))
    return bool((left >= 0).all())


def _whole(tasks: Sequence[_Task]) -> bool:
    return all(task.weight.is_integer() for task in tasks)


def _overlapping(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Tasks whose windows of the first output overlap, directly or through others; small groups first."""
    groups: list[list[_Task]] = []
    reach = -math.inf
    for task in tasks:
        if task.start >= reach:
            groups.append([])
        groups[-1].append(task)
        reach = max(reach, task.first)
    return sorted(groups, key=len)


# -- what steps cost --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """At least `start + token * tokens + job * decodes + read * context` seconds."""

    start: float
    token: float
    job: float
    read: float


@dataclass(frozen=True, slots=True)
class _Costs:
    """Lower bounds of steps. `least[T]`: with T or more tokens of prompts; `within[T]`: whole steps for T or more."""

    base: float
    least: Floats
    within: Floats
    prompts: Sequence[_Line]
    decodes: _Line

    def whole(self, tokens: int) -> float:
        """Least seconds of steps that compute so many tokens."""
        return float(self.within[min(tokens, TOKENS)])

    def most(self, seconds: float) -> int | None:
        """Tokens that whole steps compute in `seconds` at most; None: more than is known."""
        tokens = int(np.searchsorted(self.within, seconds, "right")) - 1
        return None if tokens >= TOKENS else tokens


def _costs(
    steps: StepLatency, context: int, max_batch: int, memory: int | None, scale: float, overhead_s: float
) -> _Costs:
    """From a profile, for requests of at most `context` tokens.

    Write g for the prefill by tokens, f for g(1), d for the decode, m for `mixed`, and h for a rising lower bound of g.
    A step without decodes takes g(T) >= h(T), one without prompts d(D, C), and a mixed one

        m * max(d(D, C) + max(g(T) - f, 0), g(T + D) + d(D, C) - d(D, D))    or, `apart`, m * (g(T) + d(D, C)).

    Let s + e * T be a line below h, d(D, C) >= b + j * D + r * C, d(D, C) - d(D, D) >= k + q * (C - D) with j, r,
    q >= 0 >= k, and n = min(m, 1). Then the following are below every step with T > 0 tokens, with and without D:

        min(s, m * (b + s - f)) + n * (e * T + j * D + r * C)        (apart: min(s, m * (b + s)) + ...)
        min(s, m * (s + k)) + n * (e * (T + D) + q * (C - D))        (not if apart)

    and n * (b + j * D + r * C) is below every other step: if others' prompts are in it, it takes m * d or longer.
    """
    if not isinstance(steps, StepProfile) or not isinstance(steps.prefill, PrefillTable):
        raise ProfileError(f"no bound for steps {steps.name!r}: a {type(steps).__name__} says too little of itself")
    mixed, apart = steps.mixed, steps.sequential
    least = min(mixed, 1.0)
    batch = min(max_batch, steps.decode.max_batch)
    most = (batch * context if memory is None else memory) + batch
    tokens, seconds = _prefill(steps.prefill, context, most)
    floor = steps.prefill.latency(1, 1.0, 1.0)
    decode, reading = _decode(steps.decode, context, batch)
    lines = []
    for start, token in _hull(tokens, seconds):
        beside = start if apart else start - floor if token else max(start - floor, 0.0)
        rising = token >= decode.job + decode.read
        job, read = (least * decode.job, least * decode.read) if rising else (0.0, 0.0)
        lines.append(_Line(min(start, mixed * (decode.start + beside)), least * token, job, read))
        if not apart and token >= reading.read:
            read = least * reading.read
            lines.append(_Line(min(start, mixed * (start + reading.start)), least * token, least * token - read, read))
    alone = np.interp(np.arange(1, TOKENS + 1), tokens, seconds)
    beside_decodes = decode.start + decode.job + (alone if apart else np.maximum(alone - floor, 0.0))
    first = np.minimum(alone, mixed * beside_decodes)
    after = min(float(seconds[tokens >= TOKENS].min(initial=math.inf)), float(first[-1]))
    after = min(after, mixed * (decode.start + max(after - floor, 0.0)))
    first = np.minimum.accumulate(np.append(first, after)[::-1])[::-1][:-1]
    lines = [_Line(x.start * scale + overhead_s, x.token * scale, x.job * scale, x.read * scale) for x in lines]
    shrunk = _Line(
        least * decode.start * scale + overhead_s, *(least * scale * x for x in (0.0, decode.job, decode.read))
    )
    one = first * scale + overhead_s
    base = min(float(one[0]), shrunk.start + shrunk.job + shrunk.read)
    return _Costs(base, np.concatenate([[0.0], one]), _within(one), _highest(lines), shrunk)


def _highest(lines: Sequence[_Line]) -> list[_Line]:
    """Those that are not below another."""

    def below(line: _Line, other: _Line) -> bool:
        pairs = zip(astuple(line), astuple(other), strict=True)
        return line is not other and all(x <= y for x, y in pairs)

    distinct = list(dict.fromkeys(lines))
    return [line for line in distinct if not any(below(line, other) for other in distinct)]


def _prefill(table: PrefillTable, context: int, most: int) -> tuple[Floats, Floats]:
    """Corners of a function that is linear between them and below the table, at 1 to `most` tokens.

    The squares of T tokens are between T and 2 * context * T.
    """
    last, (_, token, square) = table.tokens[-1], table.fit
    corners = {1.0: table.latency_s[0]} | dict(zip(table.tokens, table.latency_s, strict=True))
    if most > last:
        slope = token + (square if square >= 0 else 2 * context * square)
        high = table.latency_s[-1]
        there = high - token * last - square * last * last  # the line of `slope` that is below the fit, at 0

        def beyond(tokens: float) -> float:
            return max(there + slope * tokens, high) if slope > 0 else high

        corners[last] = high
        if slope > 0 and last < (kink := (high - there) / slope) < most:
            corners[kink] = high
        corners[float(most)] = beyond(most)
        if beyond(last) > high:  # it jumps up behind the last point
            corners[math.nextafter(last, math.inf)] = beyond(last)
    tokens = np.array(sorted(corners))
    return tokens, np.array([corners[t] for t in tokens.tolist()])


def _hull(x: Floats, y: Floats) -> list[tuple[float, float]]:
    """Start and slope of the lines of the lower convex hull that do not fall."""
    corners: list[tuple[float, float]] = []
    for at, height in zip(x.tolist(), np.minimum.accumulate(y[::-1])[::-1].tolist(), strict=True):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (at - x1) < (height - y1) * (x1 - x0):
                break
            corners.pop()
        corners.append((at, height))
    lines = [(float(y.min()), 0.0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        slope = (y1 - y0) / (x1 - x0)
        if slope > 0:
            lines.append((y0 - slope * x0, slope))
    return lines


def _decode(profile: LatencyProfile, context: int, batch: int) -> tuple[_Line, _Line]:
    """Lines below the decode by (jobs, context), and below what it takes beyond a context of 1 each, by (C - D).

    For a given batch the profile is linear between the contexts that are looked at.
    """
    if isinstance(profile, LinearProfile):
        base, job, read, _ = profile.coefficients
        if min(base, job, read) >= 0:
            return _Line(base, 0.0, job, read), _Line(0.0, 0.0, 0.0, read)
        each = [1.0, float(context)]
        lowest = -math.inf
    elif isinstance(profile, DecodeGrid):
        each = sorted({1.0, float(context), *(c for c in profile.context if 1 < c < context)})
        lowest = profile.latency_s[0][0] / 2
    else:
        raise ProfileError(f"no bound for decodes of a {type(profile).__name__}: it says too little of itself")
    jobs, total, seconds, more = [], [], [], []
    for count in range(1, batch + 1):
        values = [profile.latency(count, count * c) for c in each]
        clamped = [value <= lowest * (1 + 1e-9) for value in values]
        for at in range(len(each)):  # next to where it is clamped it is convex, not linear
            if any(clamped[max(at - 1, 0) : at + 2]):
                values[at] = min(values[at], lowest)
        jobs += [float(count)] * len(each)
        total += [count * c for c in each]
        seconds += values
        more += [value - profile.latency(count, float(count)) for value in values]
    d, c, y, z = (np.array(some) for some in (jobs, total, seconds, more))
    below = linprog(
        -np.array([1.0, d.mean(), c.mean()]), A_ub=np.stack([np.ones(len(d)), d, c], axis=1), b_ub=y, method="highs"
    )
    start, job, read = (float(v) for v in below.x)
    start -= max(float((start + job * d + read * c - y).max()), 0.0)
    slope = max(float(np.polyfit(c - d, z, 1)[0]), 0.0) if context > 1 else 0.0
    short = min(float((z - slope * (c - d)).min()), 0.0)
    return _Line(start, 0.0, job, read), _Line(short, 0.0, 0.0, slope)


def _within(least: Floats) -> Floats:
    """Least seconds of whole steps that compute 0, 1, 2, ... tokens; `least` is of one step with 1, 2, ..."""
    within = np.zeros(len(least) + 1)
    for tokens in range(1, len(least) + 1):
        within[tokens] = (least[:tokens] + within[tokens - 1 :: -1][:tokens]).min()
    return within


# -- programs ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Program:
    """Maximise the weight of x, the first columns, under rows that are at most their right sides; columns are >= 0."""

    weight: Floats
    top: list[float]
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def columns(self, count: int, top: float) -> list[int]:
        at = len(self.top)
        self.top += [top] * count
        return list(range(at, at + count))

    def add(self, columns: Sequence[int], values: Sequence[float], right: float = 0.0) -> None:
        self.row += [len(self.right)] * len(columns)
        self.column += columns
        self.value += values
        self.right.append(right)

    def _parts(self) -> tuple[Floats, csr_array, Floats, Floats]:
        top = np.array(self.top)
        cost = np.zeros(len(top))
        cost[: len(self.weight)] = -self.weight
        matrix = csr_array((self.value, (self.row, self.column)), shape=(len(self.right), len(top)))
        return cost, matrix, np.array(self.right), top

    def bound(self, seconds: float) -> tuple[float, list[float]] | None:
        """What prices certify, and x; None if there are none in time."""
        if seconds <= 0:
            return None
        if not self.right:
            return float(self.weight.sum()), [1.0] * len(self.weight)
        cost, matrix, right, top = self._parts()
        found = linprog(
            cost,
            A_ub=matrix,
            b_ub=right,
            bounds=np.stack([np.zeros(len(top)), top], axis=1),
            method="highs-ipm" if len(top) > 5000 else "highs",
            options={"time_limit": seconds},
        )
        if found.status != 0:
            return None
        prices = np.maximum(0.0, -found.ineqlin.marginals)
        bound = float(prices @ right + np.maximum(0.0, -cost - matrix.T @ prices) @ top)
        return bound, found.x[: len(self.weight)].tolist()

    def whole(self, seconds: float) -> float:
        """The solver's bound with whole x, inf if there is none in time."""
        cost, matrix, right, top = self._parts()
        found = milp(
            cost,
            constraints=LinearConstraint(matrix, -np.inf, right),
            bounds=Bounds(0.0, top),
            integrality=(np.arange(len(top)) < len(self.weight)).astype(int),
            options={"time_limit": seconds},
        )
        return math.inf if found.mip_dual_bound is None else -float(found.mip_dual_bound)


class _Group:
    """Tasks whose prompts compete with each other, and the least bound known for them."""

    def __init__(self, tasks: Sequence[_Task], costs: _Costs) -> None:
        self.tasks, self.costs = tasks, costs
        self.value = self.relaxed = sum(task.weight for task in tasks)
        self.method = "all"
        self.windows = _windows(tasks, costs)

    def improve(self, cells: int, whole: bool, seconds: float) -> None:
        """Bound it by windows (no `cells`) or starts; with `whole` requests only if fractions did not fit."""
        if len(self.tasks) == 1 or (not cells and not self.windows):
            return
        program = _Program(np.array([task.weight for task in self.tasks]), [1.0] * len(self.tasks))
        for columns, values, right in self.windows:
            program.add(columns, values, right)
        if cells and not _starts(program, self.tasks, self.costs, cells):
            return
        if whole:
            if self.method == "all":
                return
            bound = program.whole(min(seconds, 3.0)) + ROUNDING
        else:
            bound = (program.bound(seconds) or (math.inf, []))[0]
            self.relaxed = min(self.relaxed, bound)
        if math.isfinite(bound) and _whole(self.tasks):
            bound = math.floor(bound + ROUNDING)
        if bound < self.value:
            self.value, self.method = bound, "starts" if cells else "windows"


_Row = tuple[list[int], list[float], float]


def _windows(tasks: Sequence[_Task], costs: _Costs) -> list[_Row]:
    """For windows from an arrival to a deadline of a first output: which prompts do not fit together."""
    rows: list[_Row] = []
    order = sorted(range(len(tasks)), key=lambda at: tasks[at].first)
    first = np.array([tasks[at].first for at in order])
    begin = np.array([tasks[at].start for at in order])
    prompt = np.array([tasks[at].prompt for at in order])
    longest = float(costs.within[-1])
    starts = sorted({task.start for task in tasks})
    near = [int(((begin >= start) & (first - start < longest)).sum()) for start in starts]
    for start in starts[:: max(math.ceil(sum(count * count / 2 for count in near) / ENTRIES), 1)]:
        inside = np.flatnonzero((begin >= start) & (first - start < longest))
        total = np.cumsum(prompt[inside])
        for count, at in enumerate(inside.tolist(), start=1):
            most = costs.most(float(first[at]) - start)
            if most is None:
                break
            if count > 1 and total[count - 1] > most:
                some = inside[:count]
                values = np.minimum(prompt[some], most + 1).astype(float)
                rows.append(([order[k] for k in some.tolist()], values.tolist(), float(most)))
    return rows


def _starts(program: _Program, tasks: Sequence[_Task], costs: _Costs, cells: int) -> bool:
    """Add the rows of starts on cells of `costs.base / cells` seconds; False if there would be too many."""
    cell = costs.base / cells * (1 - 1e-9)
    longest = max(task.first - task.start for task in tasks)
    classes = _classes(costs, cell, longest)
    length = np.array([seconds for _, seconds in classes])
    cover = np.floor(length / cell).astype(int)
    origin = math.floor(tasks[0].start / cell)
    begin = [math.floor(task.start / cell - 1e-9) - origin for task in tasks]
    last = [np.floor((task.first - length) / cell + 1e-9).astype(int) - origin for task in tasks]
    count = max(int(ends[0]) for ends in last) + 1
    kinds = len(classes)
    if count * kinds + sum(max(int(e[0]) - b + 1, 0) for e, b in zip(last, begin, strict=True)) > COLUMNS:
        return False
    steps = np.array(program.columns(count * kinds, 1.0)).reshape(count, kinds)
    there: list[dict[int, int]] = [{} for _ in range(count)]  # by cell: column of each task, in parts of its prompt
    for at, (start, ends) in enumerate(zip(begin, last, strict=True)):
        places = range(max(start, 0), int(ends[0]) + 1)
        parts = program.columns(len(places), 1.0)
        for place, part in zip(places, parts, strict=True):
            there[place][at] = part
            some = steps[place, : _kinds(ends, place)].tolist()
            program.add([part, *some], [1.0] + [-1.0] * len(some))
        program.add([at, *parts], [1.0] + [-1.0] * len(parts))
    for place, parts_here in enumerate(there):
        most = {at: _kinds(last[at], place) for at in parts_here}
        for limit in sorted(set(most.values())):
            some = [at for at in parts_here if most[at] <= limit]
            program.add(
                [*(parts_here[at] for at in some), *steps[place, :limit].tolist()],
                [*(float(tasks[at].prompt) for at in some), *(-float(size) for size, _ in classes[:limit])],
            )
    covered = program.columns(count, 1.0)
    for place, here in enumerate(covered):  # as many as in the cell before, and who starts, without those who end
        ended = [steps[place - n, kind].item() for kind, n in enumerate(cover.tolist()) if n <= place]
        before = covered[place - 1 : place]
        columns = [here, *before, *steps[place].tolist(), *ended]
        program.add(columns, [-1.0, *itertools.repeat(1.0, len(before) + kinds), *itertools.repeat(-1.0, len(ended))])
    return True


def _kinds(ends: Ints, place: int) -> int:
    """How many classes of steps, short ones first, can start in a cell and end in time."""
    return int((ends >= place).sum())


def _classes(costs: _Costs, apart: float, longest: float) -> list[tuple[int, float]]:
    """Classes of steps by tokens: the most tokens, and the least seconds, about `apart` from each other."""
    classes: list[tuple[int, float]] = []
    tokens = 1
    while tokens <= TOKENS and float(costs.least[tokens]) <= longest:
        seconds = float(costs.least[tokens])
        stop = int(np.searchsorted(costs.least, seconds + apart, "right"))
        classes.append((stop - 1, seconds))
        tokens = stop
    if tokens > TOKENS:  # larger steps exist, and are as long at least
        classes[-1] = (2**31, classes[-1][1])
    return classes


def _time_program(
    tasks: Sequence[_Task], groups: Sequence[_Group], costs: _Costs, memory: int | None, max_batch: int
) -> _Program:
    """Rows of time, steps and memory in buckets."""
    place = {task.id: at for at, task in enumerate(tasks)}
    program = _Program(np.array([task.weight for task in tasks]), [1.0] * len(tasks))
    for group in groups:
        names = [place[task.id] for task in group.tasks]
        if group.method != "all":
            program.add(names, [task.weight for task in group.tasks], group.value)
        for columns, values, right in group.windows:
            program.add([names[at] for at in columns], values, right)
    begin, end = min(task.start for task in tasks), max(task.end for task in tasks)
    life = float(np.mean([task.end - task.start for task in tasks]))
    width = max(life / BUCKETS, (end - begin) / 2000, costs.base)
    count = max(math.ceil((end - begin) / width), 1)
    cuts: Floats = begin + width * np.arange(count + 1, dtype=np.float64)
    steps = (end - begin + width) / costs.base
    prompts, others = (program.columns(count + 1, steps) for _ in range(2))  # steps so far
    tokens: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    reads: list[list[tuple[int, int, float]]] = [[] for _ in range(count)]
    for at, task in enumerate(tasks):
        start = int(np.searchsorted(cuts, task.start, "right")) - 1
        stop = min(_bucket_after(cuts, task.first), count)
        parts = program.columns(stop - start, 1.0)
        for bucket, part in zip(range(start, stop), parts, strict=True):
            tokens[bucket].append((part, float(task.prompt)))
        program.add([at, *parts], [1.0] + [-1.0] * len(parts))
        program.add([at, prompts[start], prompts[stop]], [1.0, 1.0, -1.0])
        if len(task.due) < 2:
            continue
        stop = min(_bucket_after(cuts, task.end), count)
        all_read = task.read(len(task.due))
        both = [program.columns(stop - start, all_read) for _ in range(2)]
        for bucket, *pair in zip(range(start, stop), *both, strict=True):
            reads[bucket].append((pair[0], pair[1], 1 / task.most))
        for after in range(start + 1, stop + 1):
            by = len(task.due) if after == stop else int(np.searchsorted(task.due, cuts[after], "right"))
            if by > 1:
                some = both[0][: after - start] + both[1][: after - start]
                program.add([at, *some], [1.0] + [-1 / task.read(by)] * len(some))
                edges = [prompts[start], others[start], prompts[after], others[after]]
                program.add([at, *edges], [1.0, *(sign / by for sign in (1.0, 1.0, -1.0, -1.0))])
    for bucket in range(count):
        sums = program.columns(5, math.inf)  # tokens, context and jobs beside prompts, context and jobs of others
        named: list[list[tuple[int, float]]] = [
            tokens[bucket],
            [(beside, 1.0) for beside, _, _ in reads[bucket]],
            [(beside, job) for beside, _, job in reads[bucket]],
            [(other, 1.0) for _, other, _ in reads[bucket]],
            [(other, job) for _, other, job in reads[bucket]],
        ]
        for total, entries in zip(sums, named, strict=True):
            program.top[total] = sum(program.top[column] * value for column, value in entries)
            program.add([total, *(column for column, _ in entries)], [-1.0, *(value for _, value in entries)])
        here = [prompts[bucket + 1], prompts[bucket], others[bucket + 1], others[bucket]]
        program.add(here[:2], [-1.0, 1.0])
        program.add(here[2:], [-1.0, 1.0])
        other = costs.decodes
        for line in costs.prompts:
            line_steps = line.start, -line.start, other.start, -other.start
            program.add(
                [*here, *sums],
                [*line_steps, line.token, line.read, line.job, other.read, other.job],
                width,
            )
        if memory is not None:
            program.add([*here[:2], *sums[:2]], [-memory, memory, 1.0, 1.0])
            program.add([*here[2:], sums[3]], [-memory, memory, 1.0])
        program.add([*here[:2], sums[2]], [-2 * max_batch, 2 * max_batch, 1.0])
        program.add([*here[2:], sums[4]], [-max_batch, max_batch, 1.0])
    return program


def _bucket_after(cuts: Floats, time: float) -> int:
    """The first cut at or after `time`."""
    return int(np.searchsorted(cuts, time, "left"))
