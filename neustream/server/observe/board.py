"""What the dashboard shows: one snapshot a second, from the lives of requests."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from heapq import nsmallest
from typing import Any

from neustream.core.batch import StepInfo
from neustream.server.observe.gauges import Gauges
from neustream.server.observe.lives import Follower, Life

POINTS = 120
"""Seconds that the lines of steps and tokens go back."""
WINDOWS = {"10s": 10.0, "60s": 60.0}
MISTAKES = ("auth", "invalid")
"""Why requests were refused that nobody would have served."""
MOST_OPEN = 200
MOST_DOTS = 1000


@dataclass(slots=True)
class Share:
    """Requests that ended, and how many of them on time."""

    ended: int = 0
    on_time: int = 0

    def add(self, on_time: bool) -> None:
        self.ended += 1
        self.on_time += on_time


@dataclass(slots=True)
class Module:
    """Steps of one module: of this second, and the means of seconds before; None: there were none."""

    steps: int = 0
    requests: int = 0
    seconds: float = 0.0
    batch: deque[float | None] = field(default_factory=lambda: deque(maxlen=POINTS))
    ms: deque[float | None] = field(default_factory=lambda: deque(maxlen=POINTS))

    def tick(self) -> None:
        """A second is over."""
        none = not self.steps
        self.batch.append(None if none else round(self.requests / self.steps, 2))
        self.ms.append(None if none else round(self.seconds / self.steps * 1e3, 3))
        self.steps = self.requests = 0
        self.seconds = 0.0


class Board(Follower):
    """Follows lives for those who watch.

    Args:
        open: the open requests.
    """

    def __init__(self, open: Mapping[str, Life]) -> None:
        self._open = open
        self._ends: deque[tuple[float, str, bool]] = deque()  # of the last minute
        self._shares: dict[str, Share] = {}
        self._modules: dict[tuple[str, str], Module] = {}
        self._tokens = 0
        self._per_s: deque[int] = deque(maxlen=POINTS)
        self._refused: Counter[str] = Counter()
        self._dots: deque[list[Any]] = deque(maxlen=MOST_DOTS)
        self._number = 0
        self._now = 0.0
        self._ticked: float | None = None

    # -- what happens -----------------------------------------------------------------------------

    def emitted(self, life: Life, gap_s: float | None) -> None:
        self._tokens += life.kind == "text"

    def ended(self, life: Life) -> None:
        if life.outcome == "cancelled":
            return
        self._end(life.name, life.outcome == "on_time")
        asked = life.steps if life.kind == "image" else life.max_tokens
        self._number += 1
        self._dots.append([self._number, life.kind, asked, round(life.latency_s, 4), life.outcome])

    def refused(self, reason: str) -> None:
        """A request never got to the engine; a client's own mistake is no promise broken."""
        self._refused[reason] += 1
        if reason not in MISTAKES:
            self._end("", False)

    def stepped(self, model: str, module: str, step: StepInfo, seconds: float) -> None:
        found = self._modules.setdefault((model, module), Module())
        found.steps += 1
        found.requests += len(step)
        found.seconds += seconds

    def tick(self, now: float) -> None:
        """It is `now`, in seconds of any clock; once a second a point is added to each line."""
        self._now = now
        if self._ticked is None:
            self._ticked = now
        while now - self._ticked >= 1.0:
            self._ticked = max(self._ticked + 1.0, now - POINTS)
            self._per_s.append(self._tokens)
            self._tokens = 0
            for module in self._modules.values():
                module.tick()
        while self._ends and now - self._ends[0][0] > max(WINDOWS.values()):
            self._ends.popleft()

    def _end(self, name: str, on_time: bool) -> None:
        self._shares.setdefault(name, Share()).add(on_time)
        self._ends.append((self._now, name, on_time))

    # -- what is shown ----------------------------------------------------------------------------

    def snapshot(self, gauges: Gauges, since: int = 0) -> dict[str, Any]:
        """All of it as JSON; of the dots only those behind number `since`."""
        running = sum([life.running for life in self._open.values()])
        return {
            "state": gauges.state,
            "reason": gauges.reason,
            "running": running,
            "waiting": len(self._open) - running,
            "wait_s": gauges.wait_s,
            "tokens_per_s": list(self._per_s),
            "kv": {name: [use.used, use.blocks] for name, use in gauges.kv.items()},
            "classes": self._classes(),
            "modules": [_line(*names, module) for names, module in sorted(self._modules.items())],
            "refused": dict(self._refused.most_common()),
            "open": list(self._rows(gauges.now)),
            "dots": [dot for dot in self._dots if dot[0] > since],
            "cluster": cluster_of(gauges),
        }

    def _classes(self) -> dict[str, Any]:
        """By class and window: on time, ended, and on time a second."""
        found: dict[str, Any] = {}
        for name, share in self._shares.items():
            found[name] = {"all": [share.on_time, share.ended, None]}
        for window, length in WINDOWS.items():
            shares = {name: Share() for name in found}
            for at, name, on_time in self._ends:
                if self._now - at <= length:
                    shares[name].add(on_time)
            for name, share in shares.items():
                found[name][window] = [share.on_time, share.ended, round(share.on_time / length, 2)]
        return found

    def _rows(self, now: float) -> Iterator[list[Any]]:
        """Open requests, those with the least slack first.

        Each: id, kind, class, age, outputs, of how many, slack, budget. Seconds.
        """
        for life in nsmallest(MOST_OPEN, self._open.values(), key=lambda life: life.due):
            slack = life.due - now
            budget = life.slo.total if life.slo.total < math.inf else life.slo.first
            most = life.steps if life.kind == "image" else life.max_tokens
            done = _steps(life) if life.kind == "image" else life.outputs
            row: list[Any] = [life.id, life.kind, life.name, round(now - life.arrival, 2), done, most]
            row += [_finite(slack), _finite(budget)]
            yield row


def cluster_of(gauges: Gauges) -> dict[str, Any] | None:
    """The instances of a cluster and what happened between them, as JSON; None: there is none."""
    if gauges.happened is None:
        return None
    return {"instances": {name: asdict(each) for name, each in gauges.instances.items()}, **asdict(gauges.happened)}


def _steps(life: Life) -> int:
    phase = life.phases.get("denoise")
    return 0 if phase is None else phase.steps


def _finite(seconds: float) -> float | None:
    return round(seconds, 3) if math.isfinite(seconds) else None


def _line(model: str, module: str, of: Module) -> dict[str, Any]:
    return {"model": model, "module": module, "batch": list(of.batch), "ms": list(of.ms)}
