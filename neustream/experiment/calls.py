"""What the calls for requests take of the process that serves them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class Calls:
    """The times in which some caller prepares a request, on one thread: each waits for the one before.

    Args:
        arrivals: when calls begin, ascending; seconds: what each takes.
    """

    def __init__(self, arrivals: Sequence[float], seconds: float) -> None:
        self._seconds = seconds
        self._ends: list[float] = []
        end = 0.0
        for arrival in arrivals:
            end = max(arrival, end) + seconds
            self._ends.append(end)

    def beside(self, start: float, seconds: float) -> float:
        """What a step that starts at `start`, and takes `seconds` alone, loses to calls: they hold the interpreter."""
        over = start + seconds
        for at in range(bisect_right(self._ends, start), len(self._ends)):
            begin = self._ends[at] - self._seconds
            if begin >= over:
                break
            over += self._ends[at] - max(begin, start)
        return over - start - seconds
