"""Requests that are at an instance, and how those ended whose head did not hear of it."""

from __future__ import annotations

from collections.abc import Iterable

from neustream.cluster.messages import Made, Over, Report
from neustream.cluster.past import Remembered
from neustream.core.events import Ended, Update


def over_of(ended: Ended, term: int) -> Over:
    """How a request ended, for the head."""
    return Over(
        ended.id,
        term,
        ended.status,
        ended.reason,
        ended.output,
        ended.outputs,
        ended.waited_s,
        ended.attainable,
    )


def cancelled(id: str, term: int) -> Over:
    """How a request ended that was cancelled before it began."""
    return Over(id, term, "cancelled", "cancelled by the caller", None, 0, None, True)


class Served:
    """Requests by id.

    Attributes:
        terms: of each; began: those that were in a step here.
        made: outputs that were made here, with their numbers, and those that came unheard.
        orphans: those that no head hears of until one asks for them; how they ended, if they did.
        pasts: of requests anywhere, for the next head.
    """

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}
        self.began: set[str] = set()
        self.made: dict[str, list[tuple[int, Update]]] = {}
        self.orphans: dict[str, Over | None] = {}
        self.pasts = Remembered()

    def drop(self, id: str) -> None:
        """Nothing is known of a request any more."""
        del self.terms[id]
        self.began.discard(id)
        self.orphans.pop(id, None)
        self.made.pop(id, None)

    def lose_head(self) -> None:
        """The head is gone."""
        for id in self.terms:
            self.orphans.setdefault(id, None)

    def not_heard(self, reports: Iterable[Report]) -> None:
        """The head was gone before these reached it, in order: the next one is to hear of them."""
        made: dict[tuple[str, int], list[tuple[int, Update]]] = {}
        for report in reports:
            id = getattr(report, "id", "")
            term = getattr(report, "term", -1)
            if self.terms.get(id) == term:
                self.orphans.setdefault(id, None)
            elif isinstance(report, Made):
                made.setdefault((id, term), []).append((report.index, report.update))
            elif isinstance(report, Over) and id not in self.terms:
                self.terms[id], self.orphans[id] = term, report
                self.made[id] = made.pop((id, term), [])
