"""What newcomers would add to the number of generations that are expected to be on time.

A newcomer makes all steps longer: it is worth its own chance less what it takes from those of
others. No single one has a veto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.horizon import Floats
from neustream.core.policies.on_time import DOOMED, Odds, Outlook
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
        value: the weight that is expected to be on time; chance: that of the last one.
        further: them with one more, by who that is and the seconds of its prompt.
    """

    needs: Floats
    ahead: float
    who: Floats
    last: int = 0
    value: float = 0.0
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
        gains: what each adds if it comes alone, by its weight; all_add: whether each of them adds
            enough, whoever of the others comes.
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
        horizon = self.horizon = outlook.horizon
        own = self._rows = horizon.rows(waiting, running=beside)
        # who fills the coming step looks at the next output of each
        others, needs = outlook.rows.limits.later(), outlook.needs
        if back:
            again = horizon.rows(back, running=False)
            others, needs = others.then(again.limits), needs + again.needed()
        # in a step beside the others they do not decode
        self._odds = Odds(others.then(own.limits.later() if beside else own.limits))
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
        most, self._probed = horizon.spent_by(
            np.stack(everybody, axis=1), np.array([[all_at_once], [0.0]])
        )
        self.nobody = Taken(needs, 0.0, np.zeros(len(waiting)))
        self.all_add = not self._odds.any_late(most)
        self.gains = np.ones(len(waiting)) if self.all_add else self._compare(most)

    def _compare(self, most: Floats) -> Floats:
        """What each adds if it comes alone, by its weight. Growth of steps is taken as linear.

        What all of them cost together, at most, is seen with it (`most`: seconds until each point
        then): who adds enough beside that does so whoever of the others comes.
        """
        spent, running = self._spent, len(self._weight)
        growth = (self._probed - spent) / PROBE
        size = self._rows.context / np.maximum(self._typical[1], TICK)
        number = self._rows.count / np.maximum(self._typical[0], TICK)
        parts = np.clip(self._extra, None, np.maximum(self._first, PART * self._extra))
        after = spent + growth * (size + number) / 2 + parts[:, None]
        chance = self._odds.by_case(np.concatenate([[spent, most], after]))
        others, own = chance[:, :running] @ self._weight, chance[:, running:]
        lost = float(others[0] - others[1] + (own[0] - own[1]) @ self.weight)
        least = float((self.weight * own[1]).min())
        self.nobody.value = float(others[0])
        self.all_add = bool(own[1].min() >= DOOMED) and lost <= (1 - WORTH) * least
        gain: Floats = np.diag(own[2:]) - (others[0] - others[2:]) / self.weight
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
        for index in behind[: IN_LINE - 1]:
            after = self._and(after, index, self.seconds(after, index))
            yield after

    def _weigh(self, cases: Sequence[Taken]) -> None:
        """Find out what is expected in each of several cases."""
        needs = np.array([case.needs for case in cases]).swapaxes(0, 1)
        ahead = np.array([case.ahead for case in cases])
        who = np.array([case.who for case in cases])
        chance = self._odds.by_case(self.horizon.spent_by(needs, ahead[:, None]))
        running = len(self._weight)
        values = chance[:, :running] @ self._weight
        values += (chance[:, running:] * who) @ self.weight
        for case, value, each in zip(cases, values.tolist(), chance, strict=True):
            case.value = value
            case.chance = float(each[running + case.last])
