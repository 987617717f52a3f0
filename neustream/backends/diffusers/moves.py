"""Runs that move: the stock call is made again elsewhere, up to the place where it was (`journal.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.journal import (
    Made,
    Packed,
    digest,
    generators_of,
    may_move,
    noise_now,
    packed,
    put_in,
    same,
    set_noise,
    state_of_scheduler,
    unpacked,
)
from neustream.backends.diffusers.results import rebuilt
from neustream.backends.diffusers.run import Run
from neustream.errors import StageFailed

CALLBACKS = ("callback", "callback_on_step_end")
"""Arguments whose effect on later steps cannot be told."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a run is. `scheduler`: class, config and state; None in front of the first step."""

    pipeline: str
    steps: int
    calls: list[Made]
    draws: dict[int, list[torch.Tensor]]
    began: list[torch.Tensor]
    generators: list[torch.Tensor]
    result: Any
    scheduler: tuple[str, Mapping[str, Any], dict[str, Any]] | None
    parked: str
    given: bytes
    needed: dict[str, bytes]


def export(run: Run) -> Packed:
    """Where a run is, as plain data; StageFailed if it could not be brought there elsewhere."""
    journal, parked, name = run.journal, run.parked, type(run.pipe).__name__
    if why := _bound(run):
        raise StageFailed(f"{name} cannot move in the middle of a call: {why}")
    assert isinstance(parked, Call)
    scheduler = None
    if (own := journal.scheduler) is not None:
        scheduler = (type(own).__name__, dict(own.config), state_of_scheduler(own))
    if run.steps:
        journal.prune()
    generators = [one.get_state() for one in generators_of(run.kwargs)]
    try:
        return packed(
            Place(
                name,
                run.steps,
                journal.made(),
                journal.draws,
                journal.began,
                generators,
                journal.result,
                scheduler,
                parked.part.name,
                digest(parked),
                run.needed(),
            )
        )
    except StageFailed as error:
        raise StageFailed(f"{name} cannot move in the middle of a call: {error}") from error


def _bound(run: Run) -> str:
    """Why a run's call cannot be made again elsewhere; empty if it can."""
    if run.nested:
        return "it has pipelines inside"
    if not may_move(run.pipe):
        return "it may keep more from step to step than its latents and its scheduler"
    for name in CALLBACKS:
        if run.kwargs.get(name) is not None:
            return f"its {name} may have changed it"
    if not isinstance(run.parked, Call):
        return "it waits for no model"
    return run.journal.secret


def bring(run: Run, given: Packed) -> None:
    """Bring a run that has not begun to where another one was; StageFailed if it gets elsewhere.

    No model runs, and nobody is told of the steps on the way.
    """
    name, device = type(run.pipe).__name__, run.parts.device
    place: Place = unpacked(given, device)
    try:
        with torch.inference_mode() if run.parts.inference else torch.no_grad():
            _repeat(run, place, device)
    except StageFailed as error:
        run.close()
        raise StageFailed(f"{name} cannot go on in the middle of a call: {error}") from error


def _repeat(run: Run, place: Place, device: torch.device) -> None:
    """Make the calls of `place` again, and end where it ended."""
    _begin(run, place)
    _resume(run, place, None, device)
    for number, made in enumerate(place.calls):
        parked = _parked(run, number, made.name)
        if parked.kind != made.kind:
            raise StageFailed(f"call {number}, of {made.name}, has other arguments here")
        result = made.result
        if made.blank:
            result = rebuilt(result, partial(torch.zeros_like, device=device))
        _resume(run, place, result, device)
    parked = _parked(run, len(place.calls), place.parked)
    now = [one.get_state() for one in generators_of(run.kwargs)]
    here = run.needed()
    kept = sorted(name for name in here | place.needed if here.get(name) != place.needed.get(name))
    if kept:
        raise StageFailed(f"after {run.steps} step(s) it keeps more than known, in {', '.join(kept)}")
    if run.steps != place.steps or digest(parked) != place.given or not same(now, place.generators):
        raise StageFailed(f"after {run.steps} step(s) it is not where it was")


def _begin(run: Run, place: Place) -> None:
    if type(run.pipe).__name__ != place.pipeline:
        raise StageFailed(f"it was a {place.pipeline}")
    generators = generators_of(run.kwargs)
    if len(generators) != len(place.began):
        raise StageFailed(f"it had {len(place.began)} generator(s), here are {len(generators)}")
    for one, state in zip(generators, place.began, strict=True):
        one.set_state(state)

    def arrived(scheduler: Any) -> None:
        assert place.scheduler is not None
        kind, config, state = place.scheduler
        if type(scheduler).__name__ != kind or _said(scheduler.config) != _said(config):
            raise StageFailed(f"its scheduler was a {kind} with another config")
        put_in(state, scheduler)
        for one, now in zip(generators, place.generators, strict=True):
            one.set_state(now)

    run.follow(place.steps, place.result, arrived)


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config, but for which values were defaults: a list in another order in each process."""
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def _parked(run: Run, number: int, name: str) -> Call:
    """The call that a run waits for: number `number`, of the part `name`."""
    if run.error is not None:
        raise run.error if isinstance(run.error, StageFailed) else StageFailed(str(run.error))
    parked = run.parked
    if not isinstance(parked, Call) or parked.part.name != name:
        here = parked.part.name if isinstance(parked, Call) else "no model"
        raise StageFailed(f"call {number} was of {name}, here of {here}")
    return parked


def _resume(run: Run, place: Place, result: Any, device: torch.device) -> None:
    """Let a run go on, with torch's own generators as they were in its first stretches."""
    states = place.draws.get(len(run.journal.calls) + (run.parked is not None))
    if states is None or run.steps:
        run.resume(result)
        return
    outside = noise_now(device)
    set_noise(states, device)
    run.resume(result)
    set_noise(outside, device)
