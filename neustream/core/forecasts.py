"""What would become of a request at an instance, by its outlook. Pure.

A forecast is a hope with numbers: nobody knows how long generations get. The instance decides.

A router asks about one request at many instances. What does not depend on the instance is worked
out once (`Question`). An instance is looked at once, in order of the steps left there. The seats of
`feasibility.py` are tried only where sums do not refuse them.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, repeat, starmap
from operator import add, sub, truediv
from typing import NamedTuple

from neustream.core.outlook import FOREVER, Asked, Outlook, TextOutlook
from neustream.core.policies.curve import Curve
from neustream.core.policies.feasibility import SPARE, Line
from neustream.core.rates import Rates
from neustream.core.record import record
from neustream.core.types import TICK

SURELY = 1.0 + 1e-9
"""Sums that exceed their room by so much do so in whatever order they are added up."""


@record()
class Forecast:
    """What would become of a request at an instance.

    `fits`: whether it and all that are there are on time; `finish`: seconds until its end;
    `first`: until its first output; `charge`: device seconds that it costs there.
    """

    fits: bool
    finish: float
    first: float
    charge: float


def forecast(outlook: Outlook, asked: Asked, rates: Rates, now: float) -> Forecast:
    """What would become of a request there, at `now` on the cluster's clock.

    `rates` are those of the instance's device, `outlook` its latest with what was sent there since.
    """
    return Question(asked, rates).at(outlook, now)


class _Joint(NamedTuple):
    """A line with one more request in it, at `place`: see `Line`, which has the plans."""

    until: float
    curve: Curve
    speed: float
    left: list[float]
    due: list[float]
    behind: list[float]
    place: int

    def plan(self) -> tuple[bool, float]:
        """Whether all are on time in turns or on seats; when that one ends then, else in turns."""
        if self.too_full():
            return False, self.end_in_turns()
        if self.in_turns():
            return True, self.end_in_turns()
        end = self.end_on_seats() if self.may_sit() else None
        return (False, self.end_in_turns()) if end is None else (True, end)

    def too_full(self) -> bool:
        """Whether no plan can do: that one alone, or all together, need more time than there is."""
        until, curve, speed, left, due, behind, place = self
        if left[place] * curve.fast[0] * speed > (due[place] - until) * SURELY + 2 * TICK:
            return True
        batch = curve.best[min(len(left), curve.limit)]
        room = max(due) - until + max(behind) - sum(behind)
        return sum(left) * curve.seconds[batch] / batch * speed > room * SURELY + 2 * TICK

    def in_turns(self) -> bool:
        """Whether all are on time if they take turns."""
        count, speed, start = len(self.left), self.speed, self.until - TICK
        costs = self.curve.turn_list(count)[count:0:-1]
        passed = before = 0.0
        for turns, due, behind, cost in zip(self.left, self.due, self.behind, costs, strict=True):
            passed += (turns - before) * (speed * cost) + behind
            if passed - behind > due - start:
                return False
            before = turns
        return True

    def end_in_turns(self) -> float:
        """When that one ends if they take turns."""
        count, speed, first = len(self.left), self.speed, self.place + 1
        costs = self.curve.turn_list(count)[count:0:-1]
        end, before = self.until, 0.0
        for turns, behind, cost in zip(self.left[:first], self.behind, costs, strict=False):
            end += (turns - before) * (speed * cost) + behind
            before = turns
        return end

    def may_sit(self) -> bool:
        """Whether seats may do where turns do not: mostly they cannot.

        The tightest limits how many run in a step. By when the last of some is due all of their
        work has to be done.
        """
        until, curve, speed, left, due, behind, _ = self
        spare = map(sub, due, repeat(until))
        pace = min(map(truediv, spare, map(add, left, repeat(SPARE))))
        size = curve.best[min(bisect_right(curve.fast, pace / speed), len(left) - 1, curve.limit)]
        step = curve.seconds[size] * speed
        early = until + SPARE * step

        def too_much(steps: float, latest: float, after: float) -> bool:
            room = size * max(latest - early - after, 0.0)
            return steps * step > room * SURELY + 2 * TICK

        sums = zip(accumulate(left), accumulate(due, max), accumulate(behind), strict=True)
        return size > 0 and not any(starmap(too_much, sums))

    def end_on_seats(self) -> float | None:
        """When that one ends if all are on time on seats; None if they are not."""
        nothing = [0.0] * len(self.left)
        line = Line(self.until, self.curve, self.speed, self.left, self.due, self.behind, nothing)
        everyone = list(range(len(self.left)))
        seats = line.seats(everyone)
        if not seats:
            return None
        by_deadline = sorted(everyone, key=self.due.__getitem__)
        return line.seat_ends(everyone, 0.0, seats)[by_deadline.index(self.place)][1]


class Question:
    """A request that is asked about at instances of one kind of device. `rates`: of that."""

    def __init__(self, asked: Asked, rates: Rates) -> None:
        self._asked = asked
        self._rates = rates
        self._charge = rates.charge(asked.calls)
        looped = [name for name, each in asked.calls.items() if each.looped]
        self._stage = looped[0] if looped else ""
        self._curve: Curve | None = None
        self._count = self._due = self._behind = 0.0

    def at(self, outlook: Outlook, now: float) -> Forecast:
        """What would become of it at an instance, at `now` on the cluster's clock."""
        age = max(now - outlook.sent_at, 0.0)
        until = max(outlook.until - age, 0.0)
        if not self._stage:
            return self._once(outlook, until, age)
        for text in outlook.texts:
            if self._stage.startswith(f"{text.model}."):
                return self._of_text(text, until)
        return self._of_line(outlook, until, age)

    def _once(self, outlook: Outlook, until: float, age: float) -> Forecast:
        """Nothing loops: it comes after all that is there."""
        asked = self._asked
        alone = self._rates.alone(asked.calls)
        finish = until + max(outlook.backlog - age, 0.0) + alone
        fits = finish <= min(asked.due_in, asked.first_in)
        return Forecast(fits, finish, finish, self._charge)

    # -- loops ------------------------------------------------------------------------------------

    def _of_line(self, outlook: Outlook, until: float, age: float) -> Forecast:
        if self._curve is None:
            self._look_up()
        joint = self._joint(outlook, until, age)
        fits, finish = joint.plan()
        return Forecast(fits, finish, finish, self._charge * joint.speed)

    def _look_up(self) -> None:
        """The curve of its loop; when that must be over, and what comes behind it."""
        asked, stage = self._asked, self._stage
        call = asked.calls[stage]
        others = {name: each for name, each in asked.calls.items() if name != stage}
        self._count = float(call.count)
        self._behind = self._rates.alone(others)
        self._due = min(asked.due_in, FOREVER) - self._behind
        self._curve = self._rates.curve(stage, call.max_batch, call.size)

    def _joint(self, outlook: Outlook, until: float, age: float) -> _Joint:
        """The line `age` seconds later, with it: the steps that have run since are done."""
        curve = self._curve
        assert curve is not None
        speed = outlook.speed.get(self._stage, 1.0)
        count, limit, after = self._count, self._due, self._behind
        for line in outlook.lines:
            if line.stage == self._stage:
                break
        else:
            return _Joint(until, curve, speed, [count], [limit], [after], 0)
        turn = speed * curve.turn_list(len(line.left))[len(line.left)]
        done = age / turn if turn > 0 else 0.0
        left = [each - done if each > done else 0.0 for each in line.left]
        due = [each - age for each in line.due_in]
        behind = list(line.behind)
        place = bisect_right(left, count)
        left.insert(place, count)
        due.insert(place, limit)
        behind.insert(place, after)
        return _Joint(until, curve, speed, left, due, behind, place)

    # -- texts ------------------------------------------------------------------------------------

    def _of_text(self, text: TextOutlook, until: float) -> Forecast:
        """The first token comes after all prompts there; then a decode of everybody is a pace."""
        asked, profiles = self._asked, self._rates.profiles
        tokens, first, in_time = text.prompt_tokens + asked.tokens, until, True
        if f"{text.model}.prefill" in asked.calls:
            prefill = profiles[f"{text.model}.prefill"]
            prompts = min(text.prompts + 1, prefill.max_batch)
            first += prefill.latency(prompts, tokens, tokens * asked.tokens)
            in_time = first <= asked.first_in
        count = text.decodes + text.prompts + 1
        context = text.context + tokens
        profile = profiles[self._stage]
        pace = profile.latency(min(count, profile.max_batch), context)
        finish = first + pace * max(asked.calls[self._stage].count, 0)
        room = True
        if text.blocks:
            needed = -int(-asked.tokens // text.block_size)
            room = needed + text.waiting_blocks <= text.free
        slow = max(pace - min(asked.step, FOREVER), 0.0)
        fits = room and in_time and not slow and pace <= text.spare
        return Forecast(fits, finish, first, self._charge)
