"""How long one step takes: measured tables, their sums, and linear fits for sized steps.

A profile answers `latency(batch, total, square)`: `total` and `square` are the sum and the sum of
squares of the jobs' sizes (tokens of a prefill, context of a decode); stages without a second
axis pass neither. Demand outside of what was measured, a profile raises; it never guesses.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from neustream.errors import ProfileError


class LatencyProfile(Protocol):
    """Latency of one step of one stage on one device; compared and hashed by identity."""

    name: str
    device: str
    max_batch: int

    def __hash__(self) -> int: ...

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        """Seconds of a step of `batch` jobs; ProfileError outside of what was measured."""
        ...


def largest_batch(profile: LatencyProfile, budget: float) -> int:
    """The largest batch whose latency fits `budget` seconds, 0 if none does.

    On a table that is not monotone this may be larger than a batch that does not fit: the table
    says that the device is faster there, and it is believed.
    """
    return max(
        (b for b in range(1, profile.max_batch + 1) if profile.latency(b) <= budget), default=0
    )


def check_table(name: str, what: str, axis: Sequence[int], latency_s: Sequence[float]) -> None:
    """ProfileError unless `axis` rises from 1 or more, with a latency for each of its points."""
    if not axis or len(axis) != len(latency_s):
        raise ProfileError(
            f"profile {name!r}: {what} and latency_s must be equally long and not empty, "
            f"got {len(axis)} and {len(latency_s)}"
        )
    check_rising(name, what, axis)
    if bad := [x for x in latency_s if not (math.isfinite(x) and x > 0)]:
        raise ProfileError(
            f"profile {name!r}: latencies must be finite and greater than 0, got {bad[0]!r}"
        )


def check_rising(name: str, what: str, axis: Sequence[int]) -> None:
    """ProfileError unless `axis` rises from 1 or more."""
    if any(x < 1 for x in axis) or any(a >= b for a, b in itertools.pairwise(axis)):
        raise ProfileError(f"profile {name!r}: {what} must rise from 1 or more, got {list(axis)}")


class TableProfile:
    """Latencies measured at some batch sizes.

    Between two measured sizes the latency is interpolated linearly; below the smallest or above the
    largest it is an error. A table need not be monotone (some devices are faster at a larger
    batch); it is used as measured, and `monotone` tells.

    Raises:
        ProfileError: sizes do not rise from 1 or more, or a latency is not above 0 and finite; in
            `latency`, a batch that was not measured.
    """

    def __init__(
        self, name: str, batch: Sequence[int], latency_s: Sequence[float], *, device: str = ""
    ) -> None:
        check_table(name, "batch", batch, latency_s)
        self.name = name
        self.device = device
        self.batch = tuple(batch)
        self.latency_s = tuple(latency_s)
        self.max_batch = batch[-1]
        self.monotone = all(a <= b for a, b in itertools.pairwise(latency_s))
        covered = range(batch[0], batch[-1] + 1)
        self._dense = [math.nan] * batch[0] + [
            float(x) for x in np.interp(covered, batch, latency_s)
        ]

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        if not self.batch[0] <= batch <= self.max_batch:
            raise ProfileError(
                f"profile {self.name!r} was not measured at batch {batch} "
                f"(smallest: {self.batch[0]}, largest: {self.max_batch})"
            )
        return self._dense[batch]


class UnitProfile:
    """A table for steps whose jobs are not alike: its axis counts units, a step has the sum of its
    jobs' sizes.

    A request of two images counts as two where the table was measured with requests of one; where
    the sum is no size of the table, latencies are interpolated. Below the table's smallest size a
    step counts as one of that size (fewer rows take no longer); above the largest it runs in
    several calls, as many full ones as there are and one for the rest. Without sizes, jobs count as
    1.
    """

    def __init__(self, table: TableProfile) -> None:
        self.table = table
        self.name = table.name
        self.device = table.device
        self.max_batch = table.max_batch

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        table = self.table
        sizes, seconds = table.batch, table.latency_s
        units = total or batch
        whole = 0.0
        if units > sizes[-1]:
            calls, units = divmod(units, sizes[-1])
            whole = calls * seconds[-1]
            if not units:
                return whole
        index = bisect_left(sizes, units)
        if index == 0:
            return whole + seconds[0]
        below, above = sizes[index - 1], sizes[index]
        share = (units - below) / (above - below)
        return whole + seconds[index - 1] + share * (seconds[index] - seconds[index - 1])


def units_of(profile: LatencyProfile) -> LatencyProfile:
    """A profile of steps whose jobs are not alike: of a table, its axis in units."""
    return UnitProfile(profile) if isinstance(profile, TableProfile) else profile


class GuessedProfile(UnitProfile):
    """Latencies that nobody measured, in units: steps correct them from the first on, unbounded."""


GUESS_S = 0.005
"""Seconds of a step of which nothing is known; too few rather than too many: then it is tried."""


def unmeasured(name: str, max_batch: int) -> GuessedProfile:
    """A guess where nothing is known: half of a step is overhead."""
    sizes = [1] if max_batch == 1 else [1, max_batch]
    return GuessedProfile(TableProfile(name, sizes, [GUESS_S * (1 + size) / 2 for size in sizes]))


def guessed(table: TableProfile, ratio: float = 1.0) -> GuessedProfile:
    """A guess: so many times the latencies of a table that is another stage's."""
    seconds = [latency * ratio for latency in table.latency_s]
    return GuessedProfile(TableProfile(table.name, table.batch, seconds, device=table.device))


class SumProfile:
    """Several profiles run back to back as one step (a VAE and a safety checker on one worker).

    Raises:
        ProfileError: there are no parts, or parts of several devices; in `latency`, a batch that
            some part was not measured at.
    """

    def __init__(self, name: str, parts: Sequence[LatencyProfile]) -> None:
        if not parts:
            raise ProfileError(f"profile {name!r} has no parts to add up")
        devices = {part.device for part in parts}
        if len(devices) > 1:
            raise ProfileError(
                f"profile {name!r} adds up parts of different devices: {sorted(devices)}"
            )
        self.name = name
        self.parts = tuple(parts)
        self.device = devices.pop()
        self.max_batch = min(part.max_batch for part in parts)

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        if batch > self.max_batch:
            raise ProfileError(
                f"profile {self.name!r} was not measured at batch {batch} "
                f"(largest: {self.max_batch})"
            )
        return sum(part.latency(batch, total, square) for part in self.parts)


class LinearProfile:
    """`base + per_job * batch + per_size * total + per_square * square`, in seconds.

    The shape of LLM steps: a prefill costs by its tokens and their squares, a decode by its batch
    and total context. Valid for batches up to `max_batch`; coefficients come from a fit whose
    origin the profile's file names.

    Raises:
        ProfileError: `max_batch` is less than 1; in `latency`, a batch beyond it, or a size at
            which the fit says 0 seconds or less.
    """

    def __init__(
        self,
        name: str,
        *,
        base: float,
        per_job: float = 0.0,
        per_size: float = 0.0,
        per_square: float = 0.0,
        max_batch: int,
        device: str = "",
    ) -> None:
        if max_batch < 1:
            raise ProfileError(f"profile {name!r}: max_batch must be 1 or more, got {max_batch}")
        self.name = name
        self.device = device
        self.max_batch = max_batch
        self.coefficients = (base, per_job, per_size, per_square)

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        if not 1 <= batch <= self.max_batch:
            raise ProfileError(
                f"profile {self.name!r} is not valid at batch {batch} (1 to {self.max_batch})"
            )
        base, per_job, per_size, per_square = self.coefficients
        seconds = base + per_job * batch + per_size * total + per_square * square
        if not seconds > 0:
            raise ProfileError(
                f"profile {self.name!r} gives {seconds:.4g} s at batch {batch}, size {total}: "
                "outside of its fit"
            )
        return seconds
