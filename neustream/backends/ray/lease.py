"""How long an instance goes on without a head."""

from __future__ import annotations

from collections.abc import Callable

from neustream.engine.clock import stopwatch

LATE_S = 0.1
"""By so much a thread may wake up late, and was still able to hear."""


class Lease:
    """Seconds in which a head is heard at least once, or the instance ends.

    A `make` that holds Python's lock lets nobody be heard, and no thread run that would count that.
    Whoever watches the lease looks at it every so often (`ended`): time in which it could not is no
    silence of the head.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = stopwatch) -> None:
        self.seconds = seconds
        self._now = now
        self._heard_at = self._looked_at = now()

    def heard(self) -> None:
        """A head spoke."""
        self._heard_at = self._now()

    def ended(self, pause_s: float) -> bool:
        """Whether it is over, after a pause of `pause_s` since the last look."""
        now = self._now()
        late = now - self._looked_at - pause_s
        if late > LATE_S:
            self._heard_at = min(self._heard_at + late, now)
        self._looked_at = now
        return now > self._heard_at + self.seconds
