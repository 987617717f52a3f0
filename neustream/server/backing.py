"""What is behind a front: a service in its own process, or a cluster of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from neustream.engine.report import Report
from neustream.engine.snapshot import InstanceStatus, Snapshot
from neustream.server.admission import Began
from neustream.service.answer import Answer
from neustream.service.service import Service


@dataclass(frozen=True, slots=True)
class InstanceState(InstanceStatus):
    """How an instance of a cluster is, with the requests that moved there (`moved_in`) and away (`moved_out`)."""

    moved_in: int = 0
    moved_out: int = 0


@dataclass(frozen=True, slots=True)
class Happened:
    """What happened between the instances of a cluster since it started.

    Args:
        moves: requests that moved, by reason; unmoved: moves that came to nothing, by why.
        downtime_s: percentiles of the seconds that a moved request stood still.
        restarted, lost: requests that began anew; instances that were lost.
        forecasts: requests on time and not, by what the router's forecast said of them.
        forecast_error_s: percentiles of the seconds that the first token, or the end, came after its forecast.
    """

    moves: Mapping[str, int]
    unmoved: Mapping[str, int]
    downtime_s: Mapping[str, float | None]
    restarted: int
    lost: int
    forecasts: Mapping[str, Mapping[str, int]]
    forecast_error_s: Mapping[str, Mapping[str, float | None]]


class Backing(Protocol):
    """Serves the models that have no engine of their own. All of it may be asked from any thread."""

    @property
    def models(self) -> Collection[str]:
        """Their names; "" of one that is alone."""
        ...

    @property
    def report(self) -> Report:
        """What became of all requests so far."""
        ...

    @property
    def jobs(self) -> Sequence[Mapping[str, Began]]:
        """Requests without an answer, by id."""
        ...

    @property
    def policies(self) -> Collection[str]:
        """The names of the policies that decide."""
        ...

    @property
    def instances(self) -> Mapping[str, InstanceState]:
        """Those of a cluster, by name."""
        ...

    @property
    def happened(self) -> Happened | None:
        """What happened between those; None: there is no cluster."""
        ...

    @property
    def lacking(self) -> str:
        """What is not there that was asked for; empty: all is."""
        ...

    def now(self) -> float:
        """The instant on its clock, seconds."""
        ...

    def wait_s(self, count: int) -> float | None:
        """Seconds in which `count` requests are done, at the pace of late; None: not known."""
        ...

    def snapshot(self) -> Snapshot:
        """How it is, without waiting."""
        ...

    def submit(self, *args: Any, model: str | None, id: str, **options: Any) -> Answer[Any]:
        """Ask a model; errors as of `Service.submit`."""
        ...

    def close(self, *, cancel: bool) -> None:
        """Serve what is open, or end it; then stop."""
        ...


class OfService:
    """A service as what is behind a front."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.submit = service.submit
        self.snapshot = service.snapshot
        self.report = service.report
        self.instances: Mapping[str, InstanceState] = {}
        self.happened: Happened | None = None
        self.lacking = ""

    @property
    def models(self) -> Collection[str]:
        return self._service.models.keys()

    @property
    def jobs(self) -> Sequence[Mapping[str, Began]]:
        return [member.scheduler.jobs for member in self._service.engine.members]

    @property
    def policies(self) -> Collection[str]:
        members = self._service.engine.members
        return {type(rule).__name__ for member in members for rule in member.scheduler.policies.values()}

    def now(self) -> float:
        return self._service.engine.clock.now()

    def wait_s(self, count: int) -> float | None:
        return self._service.engine.wait_s(count)

    def close(self, *, cancel: bool) -> None:
        self._service.close(cancel=cancel)
