"""What an instance has to say, until it is fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from neustream.backends.ray.entries import Entry
from neustream.backends.ray.wire import News
from neustream.cluster import messages as to
from neustream.engine.events import Record


@dataclass(frozen=True, slots=True)
class Fetched:
    """`arrived`: outputs by request that went out with what was fetched before; they are there for certain."""

    news: Sequence[News]
    records: Sequence[Record]
    surprises: Sequence[str]
    arrived: Mapping[str, int]


class Outbox:
    """Filled by any thread, fetched by one.

    Args:
        woken: called when there is something that somebody waits for.
        observed: whether records are kept.

    Attributes:
        dirty: whether anything was put into it since its owner set that to False.
    """

    def __init__(self, woken: Callable[[], None], *, observed: bool) -> None:
        self.dirty = True
        self._woken = woken
        self._observed = observed
        self._lock = threading.Lock()
        self._news: list[News] = []
        self._records: list[Record] = []
        self._surprises: list[str] = []
        self._going: dict[str, int] = {}
        self._ended: list[Entry] = []
        self._ended_going: list[Entry] = []

    def put(self, report: to.Report, value: bytes = b"", *, hurry: bool = True, ended: Entry | None = None) -> None:
        """A report. Without `hurry` it goes with the next one: each way to the head costs both sides.

        `ended`: the request that is over by it.
        """
        with self._lock:
            news = News(report, value)
            self._news.append(news)
            if ended is not None:
                ended.over = news
                self._ended.append(ended)
            self.dirty = True
        if hurry:
            self._woken()

    def record(self, record: Record) -> None:
        """What observers hear; it waits for a report."""
        if self._observed:
            with self._lock:
                self._records.append(record)

    def surprise(self, id: str) -> None:
        """A request is not what it was taken for; that waits for a report, too."""
        with self._lock:
            self._surprises.append(id)

    def fetch(self) -> Fetched:
        """All of it; what was fetched before has arrived."""
        with self._lock:
            arrived, news = self._going, self._news
            made = [one.report for one in news if isinstance(one.report, to.Made)]
            self._going = {each.id: each.index + 1 for each in made}
            fetched = Fetched(news, self._records, self._surprises, arrived)
            self._news, self._records, self._surprises = [], [], []
            self._ended_going, self._ended = self._ended, []
        return fetched

    def begin_anew(self) -> Sequence[Entry]:
        """Nobody fetches what is here; the requests whose end may not have been heard of."""
        with self._lock:
            unheard = [*self._ended_going, *self._ended]
            self._news, self._records, self._surprises, self._going = [], [], [], {}
            self._ended_going, self._ended = [], []
        return unheard
