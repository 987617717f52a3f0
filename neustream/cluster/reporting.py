"""How an instance tells its head how it is: with what it says of requests, and now and then.

Between two reports each line goes on as it was foretold (`forecasts.py`). So a step in which nobody
begins, makes an output or ends is not told, unless it took much longer than it should have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neustream.cluster import messages as say
from neustream.core.outlook import outlook_of
from neustream.core.rates import Rates
from neustream.engine.clock import Clock
from neustream.engine.events import Call, Finished
from neustream.engine.member import Drive

SURPRISE = 1.5
"""Times what it was expected to take at which the end of a step is news."""


@dataclass(frozen=True, slots=True)
class Reporting:
    """In seconds: how often an outlook is told at most, and if nothing is said.

    `lease_s`: how long requests are kept whose head is gone.
    """

    report_s: float = 0.05
    beat_s: float = 0.5
    lease_s: float = 60.0


class Reporter:
    """Tells outlooks of an instance.

    Args:
        send: takes a message to the head. offset_s: the cluster's clock less this one.

    Attributes:
        heard: the number of the latest request that was sent here (see `Outlook.heard`).
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        drive: Drive,
        rates: Rates,
        send: Callable[[str, say.Report], None],
        reporting: Reporting,
        offset_s: float,
    ) -> None:
        self.reporting = reporting
        self.offset_s = offset_s
        self._name = name
        self._clock = clock
        self._drive = drive
        self._rates = rates
        self._send = send
        self.heard = 0
        self._told_at = -1e9
        self._telling = False

    def hear(self, number: int) -> None:
        """A request came, or room for one was asked for."""
        self.heard = max(self.heard, number)

    def begin_anew(self) -> None:
        """Another head counts from 0."""
        self.heard = 0

    def finished(self, record: Finished) -> None:
        """A step ended."""
        step = record.step
        speed = self._drive.scheduler.times.speed.get(step.stage, 1.0)
        if record.at - step.started_at > SURPRISE * speed * step.expected_s:
            self.soon()

    def soon(self) -> None:
        """Something was said: tell how it is once what can start has started, not too often."""
        if not self._telling:
            self._telling = True
            at = max(self._clock.now(), self._told_at + self.reporting.report_s)
            self._clock.post(Call(self.tell, rank=4), at)

    def tell(self, now: float) -> None:
        """Tell how it is."""
        self._telling = False
        self._told_at = now
        outlook = outlook_of(
            self._drive.scheduler,
            self._name,
            self._rates,
            now,
            heard=self.heard,
            sent_at=now + self.offset_s,
            failing=self._drive.member.faults.failing(now),
        )
        self._send(say.HEAD, say.Told(outlook))

    def beat(self, now: float) -> None:
        """Tell how it is, if that was not done for long."""
        if now - self._told_at >= self.reporting.beat_s:
            self.tell(now)
