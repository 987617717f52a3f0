"""What steps of new shapes take, from requests that nobody asked for, while the device idles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neustream.backends.diffusers.request import shortened
from neustream.backends.diffusers.shapes import Shape
from neustream.core.events import Ended
from neustream.engine.events import Finished, Record
from neustream.profiling.files import Measurement
from neustream.profiling.measuring import default_batches
from neustream.service.mount import REHEARSAL

STEPS = 6
"""Denoising steps of such a request."""
TRIES = 3
"""Rounds after which a shape counts as measured by what was seen."""


@dataclass(eq=False)
class Piece:
    """A shape whose steps are still to be timed.

    Args:
        arguments: of a call that has it; whole: those and the defaults of others.
        steps: that are asked for; None: as many as the call had, which the pipeline takes.
        seconds: of steps seen, by stage and by units.
    """

    shape: Shape
    arguments: Mapping[str, Any]
    whole: Mapping[str, Any]
    batches: list[int]
    steps: int | None = STEPS
    tries: int = 0
    seconds: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def missing(self) -> list[int]:
        """Batch sizes at which no denoising step was seen."""
        seen = self.seconds.get(self.shape.stages["denoise"], {})
        return [batch for batch in self.batches if batch not in seen]


class Rehearsals:
    """Makes such requests, and keeps what came of them.

    It is an observer: of steps that only rehearsals are in, it notes the time.

    Args:
        batches: the most requests in a step, by role.
        measure_s: batches that should take longer in all are left out.
        keep: takes what was measured of a shape, by stage.
    """

    def __init__(
        self,
        batches: Mapping[str, int],
        measure_s: float,
        keep: Callable[[Shape, Mapping[str, list[Measurement]]], None],
    ) -> None:
        self._batches = batches
        self._measure_s = measure_s
        self._keep = keep
        self._pieces: dict[Shape, Piece] = {}

    def add(self, shape: Shape, arguments: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        """Time a shape's steps when there is time."""
        if self._measure_s > 0:
            batches = default_batches(self._batches["denoise"])
            self._pieces[shape] = Piece(shape, arguments, whole, batches)

    def forget(self, shape: Shape) -> None:
        """A shape is gone."""
        self._pieces.pop(shape, None)

    def clear(self) -> None:
        """Nothing is served any more."""
        self._pieces.clear()
        self._keep = _nothing  # it may be all that a mount refers to itself by

    def next(self) -> tuple[Shape | None, list[dict[str, Any]]]:
        """The parameters of the next requests, and their shape; None if all is known."""
        while self._pieces:
            piece = next(iter(self._pieces.values()))
            missing = [batch for batch in piece.missing() if self._affordable(piece.shape, batch)]
            if missing and piece.tries < TRIES * len(piece.batches):
                piece.tries += 1
                return piece.shape, [self._params(piece) for _ in range(missing[0])]
            del self._pieces[piece.shape]
            self._finish(piece)
        return None, []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Ended) and record.status == "failed" and record.id.startswith(REHEARSAL):
            for piece in list(self._pieces.values())[:1]:  # they take turns
                piece.steps = None
        if not isinstance(record, Finished) or record.error:
            return
        step = record.step
        for piece in self._pieces.values():
            if step.stage not in piece.shape.stages.values():
                continue
            if all(id.startswith(REHEARSAL) for id in step.ids):
                seen = piece.seconds.setdefault(step.stage, {})
                seen.setdefault(len(step), []).append(record.at - step.started_at)

    def _affordable(self, shape: Shape, batch: int) -> bool:
        profile = shape.profiles["denoise"]
        size = min(batch, profile.max_batch)
        return STEPS * profile.latency(size, float(size)) <= self._measure_s

    def _params(self, piece: Piece) -> dict[str, Any]:
        own = {"steps": piece.steps or STEPS, "rows": piece.shape.rows, "samples": piece.shape.samples}
        return {"arguments": shortened(piece.arguments, piece.steps, piece.whole), **own}

    def _finish(self, piece: Piece) -> None:
        """What was seen of a shape, as far as it is all of one kind and begins with single ones."""
        measured = {}
        for stage, seen in piece.seconds.items():
            measured[stage] = [Measurement(stage, batch, tuple(seconds)) for batch, seconds in sorted(seen.items())]
        complete = set(measured) == set(piece.shape.stages.values())
        if complete and all(some[0].batch == 1 for some in measured.values()):
            self._keep(piece.shape, measured)


def _nothing(shape: Shape, measured: Mapping[str, list[Measurement]]) -> None:
    """Nobody keeps what was measured."""
