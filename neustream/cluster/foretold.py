"""What routers foretold of requests, beside what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from neustream.cluster.happenings import Routed
from neustream.core.events import Emitted, Ended
from neustream.core.forecasts import Forecast
from neustream.engine.tally import Distribution, Latest

FIRST, END = "first", "end"


class Foretold:
    """Forecasts of the latest route of each request, and outcomes.

    A forecast is of one instance. Where a request moved, or was begun anew, nothing is said of the
    error of the forecast that was made before.

    Args:
        heard: told of each error: of what ("first" output of a text, or "end"), and seconds that it
            came after its forecast; negative: before.
        kept: what of the errors is kept.

    Attributes:
        ends: requests by whether they were to fit and whether they were on time.
        errors: seconds, as `heard` is told.
    """

    def __init__(
        self,
        heard: Callable[[str, float], None] = lambda what, seconds: None,
        kept: Callable[[], Distribution | Latest] = Distribution,
    ) -> None:
        self.ends: Counter[tuple[bool, bool]] = Counter()
        self.errors = {FIRST: kept(), END: kept()}
        self._heard = heard
        self._routed: dict[str, tuple[str, float, Forecast]] = {}

    def routed(self, event: Routed) -> None:
        """A request was sent somewhere. Without a forecast what was said before is forgotten."""
        if event.forecast is None:
            self._routed.pop(event.id, None)
        else:
            self._routed[event.id] = event.instance, event.at, event.forecast

    def emitted(self, record: Emitted) -> None:
        """An output. The first one of what has no tokens is its end, or nothing was said of it."""
        known = self._routed.get(record.id)
        if record.index or known is None:
            return
        instance, at, forecast = known
        if record.member == instance and forecast.first < forecast.finish:
            self._add(FIRST, record.at - at - forecast.first)

    def ended(self, record: Ended) -> None:
        """It is over."""
        known = self._routed.pop(record.id, None)
        if known is None:
            return
        instance, at, forecast = known
        self.ends[forecast.fits, record.on_time] += 1
        if record.status == "done" and record.member == instance:
            self._add(END, record.at - at - forecast.finish)

    def _add(self, what: str, seconds: float) -> None:
        self.errors[what].add(seconds)
        self._heard(what, seconds)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Requests on time and not, by what was said of them."""
        said = {"fits": True, "does not fit": False}
        return {
            name: {"on_time": self.ends[fits, True], "not_on_time": self.ends[fits, False]}
            for name, fits in said.items()
            if self.ends[fits, True] + self.ends[fits, False]
        }

    def errors_as_dict(self) -> dict[str, dict[str, float | None]]:
        """Percentiles of the errors there are, seconds."""
        return {
            what: {f"p{q}": errors.percentile(q) for q in (5, 50, 95)}
            for what, errors in self.errors.items()
            if errors.count
        }
