"""Sessions: calls that an orchestrator elsewhere makes one after the other, under one promise.

The first call opens a session with a budget for all of them. Each call is due by the end of its share
of what is left then, so that time which a call saved goes to those behind it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from neustream.engine.clock import stopwatch
from neustream.server.config import SessionConfig
from neustream.server.errors import HTTPError

NAME = "x-neustream-session"
BUDGET = "x-neustream-session-e2e-ms"
AHEAD = "x-neustream-session-calls-ahead"
LEFT = "x-neustream-session-left-ms"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
MOST_AHEAD = 10_000
DAY_MS = 86_400_000.0


@dataclass
class Session:
    """One of them.

    Args:
        budget_s: of all its calls together, from when the first one came.
        due: when that ends, by the clock of `Sessions`; seen_at: when its last call came.
        calls: that came so far.
    """

    budget_s: float
    due: float
    seen_at: float
    calls: int = 0


@dataclass
class Caller:
    """The sessions of one caller by name; `ends`: when each might be forgotten, soonest first."""

    open: dict[str, Session] = field(default_factory=dict)
    ends: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """What one call of a session has.

    Args:
        total_s: by when it is due, from now on.
        first: whether no call came before it.
        left_ms: what is left of the session's budget whenever it is asked; negative: it is over.
    """

    total_s: float
    first: bool
    left_ms: Callable[[], float]


class Sessions:
    """The sessions of one server. Callers with different keys have different ones.

    Args:
        config: how many there are, and when one is forgotten.
        clock: seconds.
    """

    def __init__(self, config: SessionConfig, clock: Callable[[], float] = stopwatch) -> None:
        self._config = config
        self._clock = clock
        self._callers: defaultdict[str, Caller] = defaultdict(Caller)

    def __len__(self) -> int:
        return sum([len(caller.open) for caller in self._callers.values()])

    def share(self, key: str, headers: Mapping[str, str], warnings: list[str]) -> Share | None:
        """What a call has by its session; None: it is of none.

        What is wrong with a header is not taken, and told in `warnings`.

        Raises:
            HTTPError: the session's budget is over (504), or there are too many sessions (429).
        """
        name = headers.get(NAME)
        if name is None:
            return None
        if not ID.fullmatch(name):
            warnings.append(f"{NAME}: not 1 to 128 letters, digits, dots, colons, dashes, underscores")
            return None
        now = self._clock()
        session = self._known(self._callers[key], name, headers, warnings, now)
        if session is None:
            return None
        session.seen_at = now
        left_s = session.due - now
        if left_s <= 0:
            over = f"the {session.budget_s * 1e3:g} ms of this session were over {-left_s * 1e3:.0f} ms ago"
            raise HTTPError(504, over, "late")
        ahead = _number(headers, AHEAD, warnings, 0, MOST_AHEAD, "a whole number") or 0
        session.calls += 1
        return Share(left_s / (1 + ahead), session.calls == 1, lambda: (session.due - self._clock()) * 1e3)

    def _known(
        self,
        theirs: Caller,
        name: str,
        headers: Mapping[str, str],
        warnings: list[str],
        now: float,
    ) -> Session | None:
        """A caller's session that is open, or is opened now; None, with a warning, without a budget."""
        self._forget(theirs, now)
        if name in theirs.open:
            return theirs.open[name]
        budget_ms = _number(headers, BUDGET, warnings, 0.001, DAY_MS, "milliseconds above 0 and up to a day")
        if budget_ms is None:
            if BUDGET not in headers:
                warnings.append(f"{NAME}: not open, and no {BUDGET} that opens it")
            return None
        if len(theirs.open) >= self._config.max_open:
            text = f"{len(theirs.open)} sessions are open, at most {self._config.max_open}"
            raise HTTPError(429, text, "too_many", retry_after_s=self._config.forget_s)
        opened = theirs.open[name] = Session(budget_ms / 1e3, now + budget_ms / 1e3, now)
        heappush(theirs.ends, (self._end(opened), name))
        return opened

    def _end(self, session: Session) -> float:
        """When a session may be forgotten, if nothing more is heard of it."""
        return max(session.due, session.seen_at) + self._config.forget_s

    def _forget(self, theirs: Caller, now: float) -> None:
        """Forget sessions that are over, and of which nothing was heard for long."""
        while theirs.ends and theirs.ends[0][0] <= now:
            _, name = heappop(theirs.ends)
            end = self._end(theirs.open[name])
            if end <= now:
                del theirs.open[name]
            else:  # its last call came since
                heappush(theirs.ends, (end, name))


def late_for_session(error: HTTPError) -> HTTPError:
    """An error of a call that earlier calls of its session left no time for: late, not its client's mistake."""
    if error.code != "unattainable":
        return error
    return HTTPError(504, f"earlier calls of its session left too little time: {error.message}", "late")


def _number(
    headers: Mapping[str, str], name: str, warnings: list[str], least: float, most: float, allowed: str
) -> float | None:
    """A header's number; None, with a warning, for what is none."""
    text = headers.get(name)
    if text is None:
        return None
    pattern = r"[0-9]{1,5}" if allowed == "a whole number" else r"[0-9]{1,12}(\.[0-9]{1,9})?"
    if re.fullmatch(pattern, text.strip()) and least <= float(text) <= most:
        return float(text)
    warnings.append(f"{name}: not {allowed}" + (f" from 0 to {most}" if least == 0 else ""))
    return None
