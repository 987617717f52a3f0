"""The programs of a group on a grid: shares of batches, and teams (README.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.graphs.grid import Grid
from neustream.analysis.bounds.linear import Floats, Ints, Program


@dataclass(frozen=True, slots=True)
class Uses:
    """Columns u of time: an `entry` in batches of `batch` jobs, `latency` seconds each."""

    entry: Ints
    batch: Ints
    latency: Floats


@dataclass(frozen=True, slots=True)
class Shares:
    """A program, and where the prices of steps (by visit) and of workers' time (by cell) are."""

    program: Program
    steps: slice
    capacity: slice


def share_program(grid: Grid) -> Shares:
    """Who shares a batch shares its time, 1/b of it each."""
    uses = _uses(grid, corners=True)
    program, use = _with_uses(grid, uses)
    steps = _steps(program, grid, uses, use)
    capacity = program.rows(grid.capacity, (grid.cell[uses.entry], use, 1 / uses.batch))
    _presence(program, grid, uses, use)
    return Shares(program, steps, capacity)


def team_program(grid: Grid) -> Program:
    """In place of shares: z[b], the time in which batches of b jobs run, by stage and slot."""
    uses = _uses(grid, corners=False)
    program, use = _with_uses(grid, uses)
    kinds, sizes = len(grid.stages), int(uses.batch.max()) + 1
    stage = grid.stage[uses.entry]
    places = (grid.cell[uses.entry] * kinds + stage) * sizes + uses.batch
    keys, team = np.unique(places, return_inverse=True)
    cell, size = keys // (kinds * sizes), keys % sizes
    count, teams = len(keys), np.arange(len(keys))
    run = np.array(program.columns(count, math.inf, grid.capacity[cell]))
    _steps(program, grid, uses, use)
    program.rows(grid.capacity, (cell, run, np.ones(count)))
    _presence(program, grid, uses, use)
    full = (team, use, np.ones(len(use))), (teams, run, -size.astype(float))
    program.rows(np.zeros(count), *full)
    several = np.flatnonzero(uses.batch > 1)  # of one, u <= z is the row before
    ones, member = np.ones(len(several)), np.arange(len(several))
    joined = (member, use[several], ones), (member, run[team[several]], -ones)
    program.rows(np.zeros(len(several)), *joined)
    return program


def share_bound(grid: Grid, seconds: float) -> tuple[float, Sequence[float]] | None:
    """What prices certify, and how much of each job is served; None if not in `seconds`."""
    shares = share_program(grid)
    found = shares.program.relaxed(seconds, interior=True)
    if found is None:
        return None
    bound = certified(grid, found.prices[shares.steps] / grid.calls, found.prices[shares.capacity])
    return bound, found.columns[: len(grid.weight)].tolist()


def certified(grid: Grid, step_price: Floats, time_price: Floats) -> float:
    """The bound by README.md, "Certificate": for any q[j,m] (by visit) and p[k] (by cell) >= 0."""
    stage = grid.stage
    gain = np.zeros(len(grid.visit))
    for kind, one in enumerate(grid.stages):
        for batch, latency in enumerate(one.latency.tolist(), start=1):
            some = np.flatnonzero((stage == kind) & (grid.limit >= batch))
            price = step_price[grid.visit[some]] / latency - time_price[grid.cell[some]] / batch
            gain[some] = np.maximum(gain[some], price)
    best = np.zeros(len(grid.pair_job))
    np.maximum.at(best, grid.pair, gain)
    jobs = len(grid.weight)
    cost = np.bincount(grid.job, step_price * grid.calls, jobs)
    cost -= np.bincount(grid.pair_job, best * grid.pair_seconds, jobs)
    return float(time_price @ grid.capacity + np.maximum(0.0, grid.weight - cost).sum())


def useful(latency: Floats) -> list[int]:
    """Batch sizes, falling, at corners of the concave hull of (1/b, 1/l(b)) and the origin.

    These are charge and progress per second. The same sizes are at the corners of the convex hull
    of (l(b), l(b)/b): the map between the two planes keeps lines straight.
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


def _uses(grid: Grid, corners: bool) -> Uses:
    """Columns for all batch sizes up to N[m,k], or only those that are `useful`."""
    stage = grid.stage
    found = []
    for kind, limit in sorted(set(zip(stage.tolist(), grid.limit.tolist(), strict=True))):
        latency = grid.stages[kind].latency[:limit]
        entries = np.flatnonzero((stage == kind) & (grid.limit == limit))
        for batch in useful(latency) if corners else range(1, limit + 1):
            size = np.full(len(entries), batch)
            found.append((entries, size, np.full(len(entries), latency[batch - 1])))
    entry, batches, seconds = (np.concatenate(part) for part in zip(*found, strict=True))
    return Uses(entry, batches, seconds)


def _with_uses(grid: Grid, uses: Uses) -> tuple[Program, Ints]:
    """A program with columns for `uses`, none of which is longer than its pair, and those."""
    program = Program(grid.weight)
    seconds = grid.pair_seconds[grid.pair[uses.entry]]
    return program, np.array(program.columns(len(uses.entry), math.inf, seconds))


def _steps(program: Program, grid: Grid, uses: Uses, use: Ints) -> slice:
    """Rows "its calls are made", in parts of a visit, which keeps numbers near 1."""
    visits = len(grid.calls)
    visit = grid.visit[uses.entry]
    return program.rows(
        np.zeros(visits),
        (np.arange(visits), grid.job, np.ones(visits)),
        (visit, use, -1 / (uses.latency * grid.calls[visit])),
    )


def _presence(program: Program, grid: Grid, uses: Uses, use: Ints) -> None:
    """Rows "a job is in one batch at a time"."""
    pairs = len(grid.pair_job)
    program.rows(
        np.zeros(pairs),
        (grid.pair[uses.entry], use, np.ones(len(use))),
        (np.arange(pairs), grid.pair_job, -grid.pair_seconds),
    )
