"""Sets of a `LineUp`'s jobs that fit together."""

from __future__ import annotations

from itertools import compress

from neustream.core.policies.chances import EVEN, most_expected
from neustream.core.policies.feasibility import Line
from neustream.core.policies.line_up import LineUp

PASSED = 32
"""Jobs that do not fit and are passed over one by one."""


def committed(jobs: LineUp) -> list[int]:
    """The places of the jobs that are promised already, rising."""
    everyone = list(range(len(jobs.jobs)))
    return everyone if all(jobs.committed) else list(compress(everyone, jobs.committed))


def kept(jobs: LineUp, promised: list[int]) -> list[int]:
    """Of the promised jobs all, if all fit, else those with the most expected on time."""
    if jobs.plan.fits(promised, jobs.entries(promised)):
        return promised
    fit = _larger(jobs, fitting(jobs, sparsest_last(jobs, promised)), promised)
    return most_expected(jobs, promised, fit)


def _larger(jobs: LineUp, fit: list[int], promised: list[int]) -> list[int]:
    """`fit`, or those of `promised` with the most time per step that fit, if they weigh much more.

    One that has hardly any time left keeps out whole rows of others, and may have the most weight
    per charge. Much more is by more than the heaviest: what is left out now may fit a step later.
    """
    line = jobs.plan
    if not isinstance(line, Line):
        return fit
    loosest, _ = first_that_fit(jobs, [], sorted(promised, key=lambda index: -line.pace(index)))
    weights = [sum([jobs.jobs[index].weight for index in some]) for some in (fit, loosest)]
    heaviest = max([jobs.jobs[index].weight for index in promised])
    return loosest if weights[1] > weights[0] + heaviest + EVEN else fit


def sparsest_last(jobs: LineUp, places: list[int]) -> list[int]:
    """Those of the most weight per charge first."""
    return sorted(places, key=lambda index: -jobs.density[index])


def fitting(jobs: LineUp, ranked: list[int]) -> list[int]:
    """Those of `ranked` that fit together, each taken if it fits with the ones before it.

    Once so many did not (`PASSED`), all that do not fit at an instant are asked no more: on seats
    one may fit beside more that does not beside fewer, and would be missed.
    """
    chosen: list[int] = []
    passed = 0
    while ranked:
        if passed >= PASSED:
            ranked = list(compress(ranked, jobs.plan.fits_with(chosen, ranked)))
            if not ranked:
                break
        known = 1 if passed >= PASSED else 0
        chosen, ranked = first_that_fit(jobs, chosen, ranked, known)
        ranked = ranked[1:]  # the first one that does not
        passed += 1
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
