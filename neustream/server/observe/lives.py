"""The life of each request, put together from what the engine and the front tell."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.core.batch import StepInfo
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.types import SLO, TICK
from neustream.engine.events import Finished, Gone, Started
from neustream.server.observe.notes import Asked, Kind, Stopped, Told, Unasked

Outcome = Literal["on_time", "late", "dropped", "failed", "cancelled"]
Missed = Literal["ttft", "tpot", "e2e", "dropped", "failed"]
BOTH = "prefill+decode"
"""The module of a step in which some requests prefill and others decode."""

MOST_CANCELLED = 1000
"""Cancelled requests that are remembered until the engine hears of them, if ever it does."""


@dataclass(slots=True)
class Phase:
    """The steps of one stage that a request was in: when the first began and the last ended."""

    began: float
    ended: float | None = None
    steps: int = 0


@dataclass(slots=True)
class Life:
    """One request of the engine's, from its arrival to its end. Seconds of the engine's clock.

    Args:
        name: of the class; "" without one.
        steps: calls of looped stages that it is expected to take.

    Attributes:
        began: when its first step did; outputs: how many came, the first and the latest when.
        stepped: steps that ended; under_way: how many are running. Those of branches count.
        late: the first promise that was broken.
        outcome, ended: None while it is open. Texts that a stop string ended are done.
        finish: why a text ended: stop, length.
    """

    id: str
    model: str
    kind: Kind
    slo: SLO
    arrival: float
    steps: int
    prompt_tokens: int | None
    max_tokens: int | None
    began: float | None = None
    stepped: int = 0
    under_way: int = 0
    outputs: int = 0
    first: float | None = None
    latest: float | None = None
    late: Missed | None = None
    stopped: bool = False
    phases: dict[str, Phase] = field(default_factory=dict)
    outcome: Outcome | None = None
    code: str = ""
    ended: float | None = None
    finish: str = ""

    @property
    def name(self) -> str:
        return self.slo.name

    @property
    def running(self) -> bool:
        """Whether it has run; engines that tell of no steps tell of outputs."""
        return self.began is not None or self.outputs > 0

    @property
    def latency_s(self) -> float:
        assert self.ended is not None
        return self.ended - self.arrival

    @property
    def done(self) -> bool:
        return self.outcome in ("on_time", "late")

    @property
    def due(self) -> float:
        """When the next output is due, or its end; inf: never."""
        slo = self.slo
        whole = self.arrival + slo.total
        if slo.first == math.inf:
            return whole
        if slo.step == math.inf:
            return whole if self.outputs else min(whole, self.arrival + slo.first)
        return min(whole, self.arrival + slo.first + self.outputs * slo.step)


class Follower:
    """Told of lives as they go on; what a kind of follower does not care for does nothing."""

    def emitted(self, life: Life, gap_s: float | None) -> None:
        """An output came, so long after the one before it; None: the first."""

    def ended(self, life: Life) -> None:
        """A request is over."""

    def stepped(self, model: str, module: str, step: StepInfo, seconds: float) -> None:
        """A step ended."""

    def noted(self, note: Told) -> None:
        """What is of no life: corrections, HTTP."""


class Lives:
    """Follows requests by records and notes, in the order in which they were told.

    Args:
        models: that are served, by name.
        followers: told of what comes of it.
    """

    def __init__(self, models: Sequence[str] = (), followers: Sequence[Follower] = ()) -> None:
        self.open: dict[str, Life] = {}
        self.followers = list(followers)
        self.models = tuple(models)
        self._asked: dict[str, Asked] = {}
        self._cancelled: OrderedDict[str, Asked] = OrderedDict()
        self._modules: dict[str, tuple[str, str]] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            Asked: self._was_asked,
            Unasked: self._was_not,
            Stopped: self._was_stopped,
            Submitted: self._submitted,
            Emitted: self._emitted,
            Ended: self._ended,
            Gone: self._gone,
            Started: self._started,
            Finished: self._finished,
        }

    def __call__(self, told: Told) -> None:
        handler = self._handlers.get(type(told))
        if handler is not None:
            handler(told)
            return
        for follower in self.followers:
            follower.noted(told)

    def module_of(self, stage: str) -> tuple[str, str]:
        """The model and the module that a stage, or the label of a step, belongs to."""
        known = self._modules.get(stage)
        if known is None:
            known = self._modules[stage] = _parts(stage, self.models)
        return known

    # -- notes ------------------------------------------------------------------------------------

    def _was_asked(self, note: Asked) -> None:
        self._asked[note.id] = note

    def _was_not(self, note: Unasked) -> None:
        asked = self._asked.pop(note.id, None)
        if asked is None or not note.outcome or asked.kind == "preview":
            return
        if note.outcome == "cancelled":
            self._cancelled[note.id] = asked
            if len(self._cancelled) > MOST_CANCELLED:
                self._cancelled.popitem(last=False)
            return
        life = Life(note.id, asked.model, asked.kind, asked.slo, 0.0, 0, asked.prompt_tokens, asked.max_tokens)
        life.ended, life.outcome, life.code = 0.0, note.outcome, note.code
        life.late = note.outcome
        for follower in self.followers:
            follower.ended(life)

    def _was_stopped(self, note: Stopped) -> None:
        life = self.open.get(note.id)
        if life is not None:
            life.stopped = True

    # -- records ----------------------------------------------------------------------------------

    def _submitted(self, record: Submitted) -> None:
        asked = self._asked.pop(record.id, None) or self._cancelled.pop(record.id, None)
        if asked is None:  # not by the front
            model, _ = self.module_of(record.graph)
            asked = Asked(record.id, model, "text", record.slo)
        if asked.kind == "preview":
            return
        life = Life(
            record.id,
            asked.model,
            asked.kind,
            record.slo,
            record.arrival,
            record.steps,
            asked.prompt_tokens,
            asked.max_tokens,
        )
        self.open[record.id] = life

    def _emitted(self, record: Emitted) -> None:
        life = self.open.get(record.id)
        if life is None:
            return
        gap_s = None if life.latest is None else record.at - life.latest
        if life.first is None:
            life.first = record.at
        life.latest = record.at
        if record.late and life.late is None:
            life.late = _missed(life, record)
        life.outputs += 1
        life.finish = record.update.get("finish_reason") or ""  # where an engine says so itself
        for follower in self.followers:
            follower.emitted(life, gap_s)

    def _gone(self, record: Gone) -> None:
        self.open.pop(record.id, None)

    def _ended(self, record: Ended) -> None:
        life = self.open.pop(record.id, None)
        if life is None:
            return
        life.ended, life.code = record.at, record.code
        life.outcome = _outcome(life, record)
        if life.done:
            life.finish = _finish(life, record)
            if life.outcome == "late":
                life.late = life.late or "e2e"
        elif life.outcome in ("dropped", "failed"):
            life.late = "dropped" if life.outcome == "dropped" else "failed"
        for follower in self.followers:
            follower.ended(life)

    def _started(self, record: Started) -> None:
        _, module = self.module_of(record.step.stage)
        for id in record.step.ids:
            self._runs(id, 0, 1)
            life = self.open.get(id)
            if life is None:
                continue
            if life.began is None:
                life.began = record.at
            name = _phase(life, module)
            if name not in life.phases:
                life.phases[name] = Phase(record.at)

    def _finished(self, record: Finished) -> None:
        step = record.step
        model, module = self.module_of(step.stage)
        for id in step.ids:
            self._runs(id, 1, -1)
            life = self.open.get(id)
            phase = None if life is None else life.phases.get(_phase(life, module))
            if phase is not None:
                phase.ended = record.at
                phase.steps += 1
        for follower in self.followers:
            follower.stepped(model, module, step, record.at - step.started_at)

    def _runs(self, id: str, steps: int, under_way: int) -> None:
        """A step of a request, or of a branch of it (`request/branch`), began or ended."""
        life = self.open.get(id.partition("/")[0])
        if life is not None:
            life.stepped += steps
            life.under_way = max(life.under_way + under_way, 0)


def _outcome(life: Life, record: Ended) -> Outcome:
    if record.status == "done":
        return "on_time" if record.on_time else "late"
    if record.status == "cancelled" and life.stopped:
        late = life.late is not None or life.latency_s > life.slo.total + TICK
        return "late" if late else "on_time"
    if record.status == "dropped":
        return "dropped"
    return "cancelled" if record.status == "cancelled" else "failed"


def _missed(life: Life, record: Emitted) -> Missed:
    """Which promise an output that came too late has broken."""
    slo = life.slo
    if slo.first < math.inf and record.age > slo.first + record.index * slo.step + TICK:
        return "tpot" if record.index else "ttft"
    if not record.index and record.age > slo.first + TICK:
        return "ttft"
    return "e2e"


def _finish(life: Life, record: Ended) -> str:
    if life.kind != "text":
        return ""
    if life.stopped or (record.output or {}).get("ended"):
        return "stop"
    return life.finish or "length"


def _phase(life: Life, module: str) -> str:
    """What a step is for a request: one that is shared is prefill until its first output."""
    if module == BOTH:
        return "decode" if life.outputs else "prefill"
    return module


def _parts(stage: str, models: Sequence[str]) -> tuple[str, str]:
    """`sd/denoise@64x64` -> sd, denoise; `chat.decode` -> chat, decode; a step's label -> both."""
    rest = stage
    model = models[0] if len(models) == 1 else ""
    for name in sorted(models, key=len, reverse=True):
        if stage == name:
            return name, BOTH
        if stage.startswith((f"{name}.", f"{name}/")):
            model, rest = name, stage[len(name) + 1 :]
            break
    if rest == "llm":
        return model, BOTH
    return model, rest.partition("@")[0].removeprefix("llm.")
