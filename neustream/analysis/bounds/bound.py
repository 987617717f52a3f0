"""What is said of a load: the bound, and the groups of tasks whose bounds it adds up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from neustream.analysis.bounds.linear import ROUNDING, Program
from neustream.analysis.bounds.whole import examined
from neustream.errors import NeustreamError

SEARCH_S = 5.0
"""Seconds that a claim is tried for at most."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No scheduler serves more than `value` (requests, or their weight) on time.

    `relaxed` is the bound of the linear programs, certified by their prices. `proven` is the least
    bound that takes no solver at its word. It is `value`, unless a claim about whole tasks was
    neither proven nor refuted by our own search.

    `method` says how many groups of requests got their part of `value` from what. For graphs that
    is "all" (perhaps all can be served), "LP", "MILP" or "teams"; for generations "all", "windows"
    or "starts", and "time" where the program of time is below their sum. `seconds` is the time it
    took. `shares` is how much of each request (by id) the LP's solution serves, 1 where all of its
    group may be: whom an ideal scheduler would tend to starve.
    """

    value: float
    relaxed: float
    proven: float
    method: str
    seconds: float
    shares: Mapping[str, float] = field(repr=False)

    def above(self, served: float) -> float:
        """`value`, or `proven` if a schedule serves more than `value`.

        Raises:
            NeustreamError: it serves more than was proven to be possible.
        """
        if served <= self.value + ROUNDING:
            return self.value
        if served <= self.proven + ROUNDING:
            return self.proven
        raise NeustreamError(_contradiction(self.proven, served))


class Task(Protocol):
    """A request that can be served on time if it is alone."""

    @property
    def id(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def start(self) -> float: ...


T = TypeVar("T", bound=Task)


class Group(Generic[T]):
    """Tasks that compete with each other, and the least bound known for them.

    `known` is the weight that some schedule serves of them.
    """

    def __init__(self, tasks: Sequence[T], known: float = 0.0) -> None:
        self.tasks = tasks
        self.known = known
        self.all = sum(task.weight for task in tasks)
        self.value = self.relaxed = self.proven = self.all
        self.method = "all"

    def improve(self, bound: float, method: str, *, proven: bool = True) -> None:
        """By a bound of prices. It is not `proven` if rows lean on claims about whole tasks.

        Raises:
            NeustreamError: it is proven, and a schedule serves more.
        """
        value = rounded(bound, self.tasks)
        lowered = self._lower(value, method, proven)
        if proven and not lowered:
            raise NeustreamError(_contradiction(value, self.known))
        if proven:
            self.relaxed = min(self.relaxed, bound)

    def improve_by_whole(self, program: Program, method: str, seconds: float) -> bool:
        """By what the solver claims of whole tasks; whether it got to the end and was not refuted.

        A claim is dropped if a schedule or a solution that we find is worth more.
        """
        claim = program.whole(seconds)
        step = 1.0 if whole_weights(self.tasks) else 0.0
        value = rounded(claim.bound, self.tasks) if step else claim.bound + ROUNDING
        if value >= self.value:
            return claim.done
        target = value if step else claim.bound
        holds = examined(program, target, step, min(seconds, SEARCH_S))
        return holds is not False and self._lower(value, method, holds is True) and claim.done

    def _lower(self, value: float, method: str, proven: bool) -> bool:
        """Take `value` where it is lower; False if a schedule serves more."""
        if value < self.known - ROUNDING * max(1.0, self.known):
            return False
        if proven:
            self.proven = min(self.proven, value)
        if value < self.value:
            self.value, self.method = value, method
        return True


def rounded(bound: float, tasks: Iterable[Task]) -> float:
    """`bound`, down to a whole number if all weights are whole."""
    if math.isfinite(bound) and whole_weights(tasks):
        return math.floor(bound + ROUNDING)
    return bound


def whole_weights(tasks: Iterable[Task]) -> bool:
    """Whether all weights are whole numbers."""
    return all(float(task.weight).is_integer() for task in tasks)


def overlapping(tasks: Iterable[T], end: Callable[[T], float]) -> list[list[T]]:
    """Tasks whose windows, from `start` to `end`, overlap, directly or through others.

    Small groups come first.
    """
    groups: list[list[T]] = []
    reach = -math.inf
    for task in sorted(tasks, key=lambda task: task.start):
        if task.start >= reach:
            groups.append([])
        groups[-1].append(task)
        reach = max(reach, end(task))
    return sorted(groups, key=len)


def known_weight(tasks: Sequence[Task], schedules: Sequence[Collection[str]]) -> float:
    """The most weight of `tasks` that one of `schedules`, ids of who is on time, serves."""
    return max(
        (sum(task.weight for task in tasks if task.id in served) for served in schedules),
        default=0.0,
    )


def methods(groups: Iterable[Group[T]], more: Sequence[str] = ()) -> str:
    """How many groups were bounded by what."""
    counts = Counter([*(group.method for group in groups), *more])
    return ", ".join(f"{method} {count}" for method, count in counts.items())


def _contradiction(bound: float, served: float) -> str:
    return (
        f"the bound is wrong: prices prove that at most {bound:g} can be on time, "
        f"and a schedule serves {served:g}; is it of the same load, profiles and pools?"
    )
