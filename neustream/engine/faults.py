"""Which stages of a member fail step after step, and until when the member is passed over."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Hashable, Sequence

from neustream.core.events import Update
from neustream.errors import NeustreamError

log = logging.getLogger(__name__)

IN_A_ROW = 3
"""A member is passed over once so many steps of a stage, one after the other, brought nothing."""
DOUBLINGS = 6
"""It is passed over for 1 s at first, and twice as long each time, up to so many times: 64 s."""
QUIET_S = 60.0
"""Of faults of one kind, one is logged in so many seconds, with how many were not."""
MOST_KINDS = 100
"""So many kinds are told apart in `QUIET_S`; all others are one kind together."""


class Logged:
    """Which kinds of faults were logged of late, so that a log is not flooded.

    Whatever kinds come, at most `MOST_KINDS` and one are logged in `QUIET_S`.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, tuple[float, int]] = {}  # when it was logged; others since
        self._rest: tuple[float, int] = (-math.inf, 0)  # of kinds without room

    def may(self, kind: Hashable, now: float) -> int | None:
        """How many of its kind were not logged; None: one was in the last minute, this is not.

        Of a kind that there is no room for: how many of such kinds.
        """
        if kind not in self._kinds and not self._room(now):
            told, self._rest = _counted(self._rest, now)
            return told
        told, known = _counted(self._kinds.get(kind, (-math.inf, 0)), now)
        if told is not None:
            self._kinds.pop(kind, None)  # they are in the order in which they were logged
        self._kinds[kind] = known
        return told

    def _room(self, now: float) -> bool:
        """Whether one more kind can be told apart; the one logged longest ago may be forgotten."""
        if len(self._kinds) < MOST_KINDS:
            return True
        kind, (at, others) = next(iter(self._kinds.items()))
        if now < at + QUIET_S:
            return False
        del self._kinds[kind]
        self._rest = self._rest[0], self._rest[1] + others
        return True


def _counted(known: tuple[float, int], now: float) -> tuple[int | None, tuple[float, int]]:
    """How many to tell of (None: it is not logged), and when one was last, with others since."""
    at, others = known
    return (None, (at, others + 1)) if now < at + QUIET_S else (others, (now, 0))


class Faults:
    """Counts, for one member, the steps of each stage in a row that brought nothing.

    A device that is broken fails its steps at once. So it has the least work left, and without
    this would be given every request.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: dict[str, tuple[int, float]] = {}  # by stage: steps, and passed over until
        self._logged = Logged()

    def ended(
        self, stage: str, results: Sequence[Update | NeustreamError] | BaseException, now: float
    ) -> None:
        """A step came back at `now` (s): with an error of its own, or a result a job.

        Of steps in a row that brought nothing the first is logged with where its stage raised,
        if that is not the same as in the last minute.
        """
        if _fruitful(results):
            self._rows.pop(stage, None)
            return
        row = self._rows.get(stage, (0, now))[0] + 1
        cause = _cause(results)
        if row == 1 and cause is not None:
            self._failed(stage, cause, now)
        until = now
        if row >= IN_A_ROW:
            seconds = 2.0 ** min(row - IN_A_ROW, DOUBLINGS)
            until += seconds
            if self._logged.may((stage, seconds), now) is not None:
                log.warning(
                    "member %r, stage %r: %d failed steps in a row; it is passed over for %g s",
                    self._name, stage, row, seconds,
                )  # fmt: skip
        self._rows[stage] = row, until

    def _failed(self, stage: str, cause: BaseException, now: float) -> None:
        """Log what a stage raised, with its frames."""
        unsaid = self._logged.may((stage, type(cause)), now)
        if unsaid is None:
            return
        text = f"member {self._name!r}, stage {stage!r} failed"
        if unsaid:
            text += f"; {unsaid} more failures were not logged"
        log.warning("%s", text, exc_info=cause)

    def failing(self, now: float) -> tuple[str, ...]:
        """The stages for which it is passed over at `now` (s)."""
        return tuple([stage for stage, (_, until) in self._rows.items() if now < until])

    def passed_over(self, stages: Collection[str], now: float) -> bool:
        """Whether a request with these stages had better go elsewhere, at `now` (s)."""
        return any(stage in stages for stage in self.failing(now))


def _cause(results: Sequence[Update | NeustreamError] | BaseException) -> BaseException | None:
    """What a stage raised, for all of its jobs or one of them; None: nothing did."""
    each = (results,) if isinstance(results, BaseException) else results
    causes = [
        one if _foreign(one) else one.__cause__ for one in each if isinstance(one, BaseException)
    ]
    return next(filter(_foreign, causes), None)


def _foreign(error: object) -> bool:
    return isinstance(error, BaseException) and not isinstance(error, NeustreamError)


def _fruitful(results: Sequence[Update | NeustreamError] | BaseException) -> bool:
    """Whether some job of a step got something."""
    if isinstance(results, BaseException):
        return False
    return any(not isinstance(result, BaseException) for result in results)
