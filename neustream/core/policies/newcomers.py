"""What newcomers would add to the number of generations that are expected to be on time.

A newcomer makes all steps longer: it is worth its own chance less what it takes from those of
others. No single one has a veto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.policies.horizon import FOREVER, Floats
from neustream.core.policies.on_time import DOOMED, Odds, Outlook, chances
from neustream.core.types import TICK

WORTH = 0.4
"""Share of its own chance that a newcomer has to add: it may cost others the rest."""
PART = 0.125
"""Share of a prompt that a step computes at least."""
PROBE = 4
"""Typical newcomers by which it is found how much longer steps get with one more."""
IN_LINE = 8
"""Newcomers that are weighed at once as if all in front of each were taken in."""
ONE_BY_ONE = 4
"""Newcomers that are weighed at once as if none in front of them were."""


@dataclass(slots=True)
class Taken:
    """Some of the newcomers, one after another, and what is expected with them.

    Attributes:
        needs: of all that run with them; ahead: seconds of their prompts in the coming step.
        who: 1 for each of them, else 0 [waiting]; last: who came last.
        value: the weight that is expected to be on time, -1 as long as nobody asked; chance: that
            of the last one.
        further: them with one more, by who that is and the seconds of its prompt.
    """

    needs: Floats
    ahead: float
    who: Floats
    last: int = 0
    value: float = -1.0
    chance: float = 1.0
    further: dict[tuple[int, float], Taken] = field(default_factory=dict)


class Newcomers:
    """What those who wait would add to the number that is expected to be on time.

    Args:
        outlook: of those who run.
        back: those that lost their memory and have to be prefilled again: they count as running.
        waiting: the newcomers; `extra`: seconds that the prompt of each takes beside the others;
            `saved`: those that each takes less behind the first in one step.
        first: the most seconds of prompts in the coming step, if that is to cost no deadline.
        beside: whether the others decode in that step too.

    Attributes:
        weight: of each newcomer.
        nobody: none of them.
    """

    def __init__(
        self,
        outlook: Outlook,
        back: Sequence[Job],
        waiting: Sequence[Job],
        extra: Floats,
        saved: float,
        first: float,
        beside: bool,
    ) -> None:
        horizon = outlook.horizon
        self.horizon = horizon
        own = self._rows = horizon.rows(waiting, running=beside)
        needs = outlook.needs
        # who fills the coming step looks at the next output of each
        self.others = outlook.rows.limits.later()
        # in a step beside the others they do not decode
        self.own = own.limits.later() if beside else own.limits
        if back:
            again = horizon.rows(back, running=False)
            self.others = self.others.then(again.limits)
            needs = needs + again.needed()
        self._typical = own.needed() / len(waiting)
        self._each = own.needs.swapaxes(0, 1).copy()  # [waiting, 4, points]
        later = horizon.points > 0
        if beside:
            self._each[:, :2] *= later  # it keeps its memory
        brief = [job.slo.step == math.inf and job.due == math.inf for job in waiting]
        if any(brief):
            self._each[brief] *= ~later  # nothing is promised after the first output
        self._extra = extra
        self._behind = np.maximum(extra - saved, 0.0)
        self._first = first
        self._weight = np.array([job.weight for job in (*outlook.jobs, *back)])
        self.weight = np.array([job.weight for job in waiting])
        self._needs = needs
        self._spent = horizon.spent_by(needs) if back else outlook.spent
        all_at_once = float(self._behind.sum() + (extra - self._behind).max())
        everybody = needs + self._each.sum(0), needs + PROBE * self._typical
        self._most, self._probed = horizon.spent_by(
            np.stack(everybody, axis=1), np.array([[all_at_once], [0.0]])
        )
        self._tight = self._who_can_be_late()
        self.nobody = Taken(needs, 0.0, np.zeros(len(waiting)))

    def _who_can_be_late(self) -> NDArray[np.int64]:
        """Those of the others who are not on time for certain if all newcomers come."""
        late = self.others.time + TICK < self._most
        return np.flatnonzero(late.any(1)) if late.any() else np.zeros(0, dtype=np.int64)

    @cached_property
    def _watched(self) -> Odds:
        """Those of the others who can be late, and the newcomers."""
        return Odds(self.others.some(self._tight).then(self.own))

    @cached_property
    def _calm(self) -> tuple[Floats, float]:
        """Of the others who cannot be late: the least time at each point, and their weight."""
        calm = np.delete(np.arange(len(self._weight)), self._tight)
        time = self.others.time.take(calm, 0).min(0, initial=FOREVER)
        return time, float(self._weight[calm].sum())

    def gains(self) -> Floats:
        """What each adds if it comes alone, by its weight. Growth of steps is taken as linear."""
        own, others, spent = self.own, self.others, self._spent
        growth = (self._probed - spent) / PROBE
        size = self._rows.context / np.maximum(self._typical[1], TICK)
        number = self._rows.count / np.maximum(self._typical[0], TICK)
        parts = np.clip(self._extra, None, np.maximum(self._first, PART * self._extra))
        after = spent + growth * (size + number) / 2 + parts[:, None]
        own_chance = chances(own, after)
        if not len(self._weight):
            return own_chance
        cases = Odds(others).by_case(np.concatenate([spent[None], after]))
        with_it = cases[1:] @ self._weight
        gain: Floats = own_chance - (cases[0] @ self._weight - with_it) / self.weight
        return gain

    def memory_time(self) -> Floats | None:
        """Seconds that each takes of all of the memory until it ends; None where it is not short:
        where all of them are expected to find room."""
        kept, units = self._each[:, 2], self.horizon.units
        if (self._needs[2] + kept.sum(0)).max() <= units:
            return None
        steps = np.diff(self.horizon.held(self._needs), prepend=0.0)
        taken: Floats = np.maximum(kept @ steps / units, TICK)
        return taken

    def all_in_time(self) -> bool:
        """Whether nobody can be late if all of them come."""
        if len(self._tight):
            return False
        return not (self.own.time + TICK < self._most).any()

    def seconds(self, taken: Taken, index: int) -> float:
        """What the prompt of one more takes in a step with those that were taken."""
        each = self._behind if taken.ahead else self._extra
        return float(each[index])

    def adds(
        self, taken: Taken, index: int, seconds: float, behind: Sequence[int], refused: bool
    ) -> Taken | None:
        """Those that were `taken` and one more, if it adds enough beside them; else None.

        Args:
            seconds: of its prompt in the coming step.
            behind: who will be asked for next; `refused`: whether somebody in front was refused.
        """
        after = taken.further.get((index, seconds))
        if after is None:
            after = self._and(taken, index, seconds)
            self._weigh([after, *self._next(taken, after, behind, refused)])
        if after.chance < DOOMED:
            return None
        enough = WORTH * after.chance * float(self.weight[index])
        return after if after.value - taken.value >= enough else None

    def _and(self, taken: Taken, index: int, seconds: float) -> Taken:
        """Some newcomers and one more."""
        after = taken.further.get((index, seconds))
        if after is None:
            who = taken.who.copy()
            who[index] = 1.0
            after = Taken(taken.needs + self._each[index], taken.ahead + seconds, who, index)
            taken.further[index, seconds] = after
        return after

    def _next(
        self, taken: Taken, after: Taken, behind: Sequence[int], refused: bool
    ) -> Iterator[Taken]:
        """What will be asked for then: as long as nobody is refused most are not, and behind the
        first who is most are."""
        if refused:
            for index in behind[: ONE_BY_ONE - 1]:
                yield self._and(taken, index, self.seconds(taken, index))
            return
        if taken.value < 0:
            yield taken
        for index in behind[: IN_LINE - 1]:
            after = self._and(after, index, self.seconds(after, index))
            yield after

    def _weigh(self, cases: Sequence[Taken]) -> None:
        """Find out what is expected in each of several cases."""
        needs = np.array([case.needs for case in cases]).swapaxes(0, 1)
        ahead = np.array([case.ahead for case in cases])
        who = np.array([case.who for case in cases])
        chance, others = self._chances(self.horizon.spent_by(needs, ahead[:, None]))
        values = others + (chance * who) @ self.weight
        for case, value, each in zip(cases, values.tolist(), chance.tolist(), strict=True):
            case.value = value
            case.chance = each[case.last]

    def _chances(self, spent: Floats) -> tuple[Floats, Floats]:
        """In each of several cases [cases, points] the chances of those who wait [cases, waiting],
        and the weight of the others that is on time [cases]."""
        tight = len(self._tight)
        chance = self._watched.by_case(spent)
        time, calm = self._calm
        weight = calm + chance[:, :tight] @ self._weight[self._tight]
        for case in np.flatnonzero(np.any(time + TICK < spent, axis=1)):
            # a larger step takes less time: look at all
            weight[case] = self._weight @ chances(self.others, spent[case])
        return chance[:, tight:], weight
