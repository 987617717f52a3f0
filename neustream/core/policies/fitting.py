"""Sets of a `LineUp`'s jobs that fit together."""

from __future__ import annotations

from itertools import compress

from neustream.core.policies.chances import most_expected
from neustream.core.policies.line_up import LineUp


def committed(jobs: LineUp) -> list[int]:
    """The places of the jobs that are promised already, rising."""
    everyone = list(range(len(jobs.jobs)))
    return everyone if all(jobs.committed) else list(compress(everyone, jobs.committed))


def kept(jobs: LineUp, promised: list[int]) -> list[int]:
    """Of the promised jobs all, if all fit, else those with the most expected on time."""
    if jobs.plan.fits(promised, jobs.entries(promised)):
        return promised
    fit = fitting(jobs, sparsest_last(jobs, promised))
    return most_expected(jobs, promised, fit)


def sparsest_last(jobs: LineUp, places: list[int]) -> list[int]:
    """Those of the most weight per charge first."""
    return sorted(places, key=lambda index: -jobs.density[index])


def fitting(jobs: LineUp, ranked: list[int]) -> list[int]:
    """Those of `ranked` that fit together, each taken if it fits with the ones before it."""
    chosen: list[int] = []
    while ranked:
        chosen, ranked = first_that_fit(jobs, chosen, ranked)
        ranked = ranked[1:]  # the first one that does not
    return chosen


def first_that_fit(
    jobs: LineUp, promised: list[int], ranked: list[int], known: int = 0
) -> tuple[list[int], list[int]]:
    """`promised` with as many of `ranked`, from the front, as fit all together; and the others.

    By bisection, after a look at all of them; the first `known` are known to fit.
    """
    low = known  # so many fit
    high = len(ranked) + 1  # so many do not
    while high - low > 1:
        middle = (low + high) // 2 if high <= len(ranked) else len(ranked)
        joint = sorted(promised + ranked[:middle])
        if jobs.plan.fits(joint, jobs.entries(joint)):
            low = middle
        else:
            high = middle
    return sorted(promised + ranked[:low]), ranked[low:]
