"""Sessions: calls that an orchestrator elsewhere makes one after the other, under one promise.

The first call opens a session with a budget for all of them. Each call is due by the end of its share
of what is left then, so that time which a call saved goes to those behind it.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        self._open: defaultdict[str, OrderedDict[str, Session]] = defaultdict(OrderedDict)

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

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
        session = self._known(self._open[key], name, headers, warnings, now)
        if session is None:
            return None
        left_s = session.due - now
        if left_s <= 0:
            over = f"the {session.budget_s * 1e3:g} ms of this session were over {-left_s * 1e3:.0f} ms ago"
            raise HTTPError(504, over, "late")
        ahead = _number(headers, AHEAD, warnings, 0, MOST_AHEAD, "a whole number") or 0
        session.calls += 1
        session.seen_at = now
        return Share(left_s / (1 + ahead), session.calls == 1, lambda: (session.due - self._clock()) * 1e3)

    def _known(
        self,
        theirs: OrderedDict[str, Session],
        name: str,
        headers: Mapping[str, str],
        warnings: list[str],
        now: float,
    ) -> Session | None:
        """A caller's session that is open, or is opened now; None, with a warning, without a budget."""
        self._forget(theirs, now)
        found = theirs.get(name)
        if found is not None:
            theirs.move_to_end(name)
            return found
        budget_ms = _number(headers, BUDGET, warnings, 0.001, DAY_MS, "milliseconds above 0 and up to a day")
        if budget_ms is None:
            if BUDGET not in headers:
                warnings.append(f"{NAME}: not open, and no {BUDGET} that opens it")
            return None
        if len(theirs) >= self._config.max_open:
            text = f"{len(theirs)} sessions are open, at most {self._config.max_open}"
            raise HTTPError(429, text, "too_many", retry_after_s=self._config.forget_s)
        theirs[name] = Session(budget_ms / 1e3, now + budget_ms / 1e3, now)
        return theirs[name]

    def _forget(self, theirs: OrderedDict[str, Session], now: float) -> None:
        """Forget sessions that are over, and of which nothing was heard for long."""
        while theirs:
            name, oldest = next(iter(theirs.items()))
            if now < max(oldest.due, oldest.seen_at) + self._config.forget_s:
                return
            del theirs[name]


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
