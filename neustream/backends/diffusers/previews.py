"""A request as it would look if it ended now: its own stock call, brought to its decoder with the latents of a step.

The call is made again: with the results of its encoders at hand, and with the latents of that step as
the result of all of its scheduler's steps. Nothing of it is computed but what lies between the steps.
What the decoder is given then, and what becomes of what it returns, is the stock call's own doing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.journal import Made, generators_of, noise_now, set_noise
from neustream.backends.diffusers.request import without_side_effects
from neustream.backends.diffusers.results import rebuilt
from neustream.backends.diffusers.signatures import signature_of
from neustream.errors import BackendError, StageFailed

if TYPE_CHECKING:
    from neustream.backends.diffusers.run import Run

ALL = 10**9
"""More steps than any call has."""


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """A request right behind step number `step` (from 1) of `total`; `submit` takes it as a request of its own.

    `arguments`: of its call; the others are what the call has done so far.
    """

    step: int
    total: int
    arguments: Mapping[str, Any]
    calls: Sequence[Made]
    draws: Mapping[int, list[torch.Tensor]]
    began: Sequence[torch.Tensor]
    result: Any


def preview_of(run: Run) -> Preview:
    """The preview of a run that a scheduler took a step of just now; BackendError if there can be none."""
    journal, name = run.journal, type(run.pipe).__name__
    if not journal.keeps or run.nested:
        raise BackendError(f"{name}: calls of this pipeline have no previews")
    if "decode" not in {part.role for parts in run.parts.values() for part in parts.values()}:
        raise BackendError(f"{name} has no decoder, so there are no previews")
    result = rebuilt(journal.result, torch.clone, strict=False)  # the next step may write into it
    return Preview(run.steps, run.total, run.kwargs, list(journal.made()), journal.draws, journal.began, result)


def arguments_of(pipe: Any, preview: Preview) -> dict[str, Any]:
    """Arguments of the call that shows a preview: no callbacks, generators of its own."""
    return without_side_effects(preview.arguments, {**signature_of(pipe).defaults, **preview.arguments})


def to_its_decoder(run: Run, preview: Preview) -> None:
    """Bring a run that has not begun to its decoder, with the latents of a preview; no model runs.

    StageFailed if it gets anywhere else.
    """
    for one, state in zip(generators_of(run.kwargs), preview.began, strict=False):
        one.set_state(state)
    known: dict[str, deque[Made]] = defaultdict(deque)
    for made in preview.calls:
        known[made.name].append(made)
    run.follow(ALL, preview.result, lambda scheduler: None)
    with torch.inference_mode() if run.parts.inference else torch.no_grad():
        _resume(run, preview, None)
        while isinstance(run.parked, Call) and run.parked.part.role != "decode":
            _resume(run, preview, _result(known[run.parked.part.name], run.parked, run.parts.device))
    if run.error is not None or not isinstance(run.parked, Call):
        why = "it ends before it decodes" if run.error is None else str(run.error)
        raise StageFailed(f"{type(run.pipe).__name__} has no preview after step {preview.step}: {why}")


def _result(known: deque[Made], parked: Call, device: torch.device) -> Any:
    """What a call gives: as it did, or zeros of that shape in place of what a denoiser says."""
    if not known:
        raise StageFailed(f"its call of {parked.part.name} is another one")
    made = known[0] if len(known) == 1 or known[0].blank else known.popleft()
    return rebuilt(made.result, partial(torch.zeros_like, device=device)) if made.blank else made.result


def _resume(run: Run, preview: Preview, result: Any) -> None:
    """Let a run go on, with torch's own generators as they were in that stretch; nobody else's draws change."""
    states = preview.draws.get(len(run.journal.calls) + (run.parked is not None))
    if states is None or run.steps:
        run.resume(result)
        return
    outside = noise_now(run.parts.device)
    set_noise(states, run.parts.device)
    run.resume(result)
    set_noise(outside, run.parts.device)
