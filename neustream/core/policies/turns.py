"""Jobs of one line that take turns (`feasibility.py`), with each one of several others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream.core.policies.curve import Floats
from neustream.core.policies.seats import sums
from neustream.core.types import TICK


@dataclass
class Turns:
    """Seconds that the jobs of a line have and need, in order of their steps left.

    `turns`: seconds of a common turn of 0, 1, ... jobs, up to one more than there are. `due` counts
    from the start of the loop.
    """

    left: Floats
    due: Floats
    behind: Floats
    turns: Floats

    def with_one(
        self, place: NDArray[np.int64], left: Floats, due: Floats, behind: Floats, entry: Floats
    ) -> OneMore:
        """With each one of several, who come before the jobs from `place` on in the order.

        Jobs before the new one wait for a larger batch; those behind it wait for all of its turns
        as well.
        """
        count = len(self.left)
        steps, after = _gaps(self.left), sums(self.behind)
        without, together = self.turns[count::-1], self.turns[count + 1 : 0 : -1]
        ends = sums(steps * without[:-1])
        ends_with = sums(steps * together[:-1])
        own_due = self.due - after[:-1]
        beyond = left - np.concatenate([self.left, [0.0]])[place - 1]
        end = entry + ends_with[place] + beyond * together[place]
        delay = end - ends[place] - beyond * without[place] + behind
        own = due - (end + after[place])
        return OneMore(place, own_due - ends_with[1:], own_due - ends[1:], own, entry, delay)


@dataclass
class OneMore:
    """Slack of jobs in turns beside each one of several others.

    A job before the new one's `place` has its `before` less `entry`, one behind it its `behind`
    less `delay`; the new one has its `own`.
    """

    place: NDArray[np.int64]
    before: Floats
    behind: Floats
    own: Floats
    entry: Floats
    delay: Floats

    def fit(self) -> list[bool]:
        """Whether nobody is late, for each of the others. Prefix and suffix minima decide."""
        before = np.concatenate([np.minimum.accumulate(self.before), [np.inf]])  # [-1]: nobody
        later = np.concatenate([np.minimum.accumulate(self.behind[::-1])[::-1], [np.inf]])
        slack = np.minimum(self.own, before[self.place - 1] - self.entry)
        fit: list[bool] = (np.minimum(slack, later[self.place] - self.delay) >= -TICK).tolist()
        return fit

    def late(self) -> NDArray[np.bool_]:
        """Who is late, by others and jobs; the last column are the others themselves."""
        places = np.arange(len(self.before))
        slack = np.where(
            places < self.place[:, None],
            self.before - self.entry[:, None],
            self.behind - self.delay[:, None],
        )
        late: NDArray[np.bool_] = np.column_stack([slack, self.own]) < -TICK
        return late


def _gaps(x: Floats) -> Floats:
    """The differences of neighbours, the first one to 0."""
    out = x.copy()
    out[1:] -= x[:-1]
    return out
