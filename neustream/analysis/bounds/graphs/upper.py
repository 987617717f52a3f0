"""The bound for graphs: linear programs on coarse and fine grids, then whole tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from neustream.analysis.bounds.bound import Bound, Group, known_weight, methods, overlapping
from neustream.analysis.bounds.graphs.grid import Grid, grid_of
from neustream.analysis.bounds.graphs.shares import share_bound, share_program, team_program
from neustream.analysis.bounds.graphs.tasks import Devices, Stage, Task, work_of
from neustream.analysis.bounds.linear import ROUNDING
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.types import Request
from neustream.engine.clock import WallClock

COARSE, MEDIUM, FINE = 2_000, 8_000, 100_000
"""How large the programs of a group may be, in columns, before slots are merged."""
FEW = 12
"""Groups of so few tasks are solved as whole tasks even if the LP serves all: it takes no time."""
PATIENCE = 5
"""A program with whole tasks gets so many times its even part of the time that is left."""


class StageGroup(Group[Task]):
    """A group, with what is known of its programs."""

    def __init__(self, tasks: Sequence[Task], known: float) -> None:
        super().__init__(tasks, known)
        self.shares: Sequence[float] = [1.0] * len(tasks)
        self.solved = False  # whether its last MILP was solved to the end
        self.merged = True  # whether its last LP had a coarser grid than there could be

    @property
    def settled(self) -> bool:
        """Whether the LP cannot get lower: each task can be served on time."""
        return self.value <= max(task.weight for task in self.tasks)

    @property
    def loose(self) -> bool:
        """Whether whole tasks may say more: the LP serves neither only one nor all of many."""
        few = len(self.tasks) <= FEW
        return not self.settled and (self.relaxed < self.all - ROUNDING or few)

    def solve_shares(self, grid: Grid, seconds: float) -> None:
        self.merged = grid.merged
        found = share_bound(grid, seconds)
        if found is not None:
            bound, self.shares = found
            self.improve(bound, "LP")


def upper_bound(
    requests: Sequence[Request],
    profiles: Mapping[str, LatencyProfile],
    pools: Sequence[Pool],
    *,
    others: Sequence[Devices] = (),
    overhead_s: float = 0.0,
    time_limit_s: float = 100.0,
    known: Sequence[Collection[str]] = (),
) -> Bound:
    """The most weight of `requests` that any scheduler could serve on time.

    Only for graphs whose calls are known in advance and have no sizes. Promises on outputs before
    the last are ignored; requests without a deadline count as served.

    Requests may go from any worker to any other between two steps, and that costs nothing: this
    bounds clusters too, whatever routes and moves. Devices alike are a pool of more workers.

    Args:
        profiles: least seconds of a step, by stage.
        others: devices of other kinds beside; a stage runs on whatever has it in a pool.
        overhead_s: what each step takes on top.
        time_limit_s: after about so long the best bound found so far is returned.
        known: ids of requests that are on time, of each of some schedules of this load. What
            the solver claims is dropped where one of them serves more.

    Raises:
        GraphError: the calls of a request are not known in advance, or a stage is in no pool.
        ProfileError: a stage has no profile.
        NeustreamError: one of `known` serves more than was proven to be possible.
    """
    clock = WallClock()
    work = work_of(requests, [Devices(profiles, pools), *others], overhead_s)
    parts = overlapping(work.tasks, lambda task: task.end)
    groups = [StageGroup(tasks, known_weight(tasks, known)) for tasks in parts]
    search = _Search(groups, work.stages, work.workers, clock, time_limit_s)
    search.relax()
    search.tighten()
    shares = {request.id: float(request.slo.total == math.inf) for request in requests}
    for group in groups:
        shares |= {task.id: x for task, x in zip(group.tasks, group.shares, strict=True)}
    return Bound(
        work.free + sum(group.value for group in groups),
        work.free + sum(group.relaxed for group in groups),
        work.free + sum(group.proven for group in groups),
        methods(groups),
        clock.now(),
        shares,
    )


class _Search:
    """Improves groups until the time limit, in seconds from the start of `clock`."""

    def __init__(
        self,
        groups: Sequence[StageGroup],
        stages: Sequence[Stage],
        workers: Sequence[int],
        clock: WallClock,
        until: float,
    ) -> None:
        self.groups, self.stages, self.workers = groups, stages, workers
        self.clock, self.until = clock, until

    def _grid(self, group: StageGroup, columns: int) -> Grid:
        return grid_of(group.tasks, self.stages, self.workers, columns)

    def relax(self) -> None:
        """By LPs on a coarse grid, so that each group has a bound soon, and then on a fine one."""
        for columns in (COARSE, FINE):
            for group in self.groups:
                left = self.until - self.clock.now()
                if left > 0 and not group.settled and group.merged:
                    group.solve_shares(self._grid(group, columns), left)

    def tighten(self) -> None:
        """By whole tasks, small programs first; whose MILP did not end gets no harder one."""
        self._solve_whole("MILP", COARSE, self._half_of_rest())
        self._solve_whole("teams", COARSE, self._half_of_rest())
        self._solve_whole("teams", MEDIUM, self.until)

    def _half_of_rest(self) -> float:
        return (self.clock.now() + self.until) / 2

    def _solve_whole(self, method: str, columns: int, stop: float) -> None:
        for at, group in enumerate(self.groups):
            left = stop - self.clock.now()
            if left <= 0 or not group.loose or not (group.solved or method == "MILP"):
                continue
            grid = self._grid(group, columns)
            if columns == MEDIUM and grid.columns <= COARSE:
                continue  # as before
            teams = method == "teams"
            program = team_program(grid) if teams else share_program(grid).program
            seconds = min(left, PATIENCE * left / (len(self.groups) - at))
            group.solved = group.improve_by_whole(program, method, seconds)
