"""One request: the stock pipeline's own `__call__`, stopped wherever it calls a model.

Each request runs on its own view of the pipeline, in a greenlet of the worker's thread. The view
shares everything with the pipeline but what belongs to one request: its schedulers are copies, and
in place of its models there are stand-ins that park the request's greenlet with the call it wanted to
make. Whoever drives the runs carries out parked calls, many at once where they fit together,
and lets each request go on with its own result. So all that lies between two model calls is stock
code on stock values.
"""

from __future__ import annotations

import copy
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from greenlet import GreenletExit, greenlet

from neustream.backends.copies import twin
from neustream.backends.diffusers.adapters import scaled
from neustream.backends.diffusers.autocast import autocast_now, set_autocast
from neustream.backends.diffusers.calls import Call, Part
from neustream.backends.diffusers.journal import Journal, generators_of, may_move, noise_now, same
from neustream.backends.diffusers.locals import needed
from neustream.backends.diffusers.parts import Parts
from neustream.backends.diffusers.previews import Preview, preview_of
from neustream.backends.diffusers.request import tensors_of
from neustream.backends.diffusers.results import owned
from neustream.backends.diffusers.standins import StandIn, park, viewed
from neustream.backends.diffusers.stepping import Hooks, Step, is_stepped, own_scheduler, step_together
from neustream.backends.diffusers.writing import Watch, Written
from neustream.errors import BackendError, StageFailed

PATIENCE = 8
"""How often a call is told to end that does not (a callback that catches everything)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A request after a denoising step: step number `step` (from 1) of `total`, and its latents now."""

    step: int
    total: int
    latents: torch.Tensor
    run: Run | None = field(default=None, repr=False, compare=False)

    def preview(self) -> Preview:
        """What `submit` makes a picture of: the latents as the call would decode them, were this its last step.

        To be called while `on_step` is. BackendError where the pipeline has no previews.
        """
        if self.run is None:
            raise BackendError("this progress is of no request, so there is no preview")
        return preview_of(self.run)


class Run:
    """A request's way through the stock call. All but `__init__` happens on the worker's thread.

    Args:
        pipe: the pipeline; never changed.
        parts: its shared parts.
        kwargs: of the pipeline's `__call__`.
        expected: denoising steps that it is expected to take, until its schedule is known.
        on_step: told of each denoising step; if it raises, the request fails.

    `parked` is the call or step it waits for, None before the start and after the end. `steps`
    counts its denoising steps. `output` and `error` say how it ended.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        parts: Parts,
        kwargs: Mapping[str, Any],
        *,
        expected: int = 1,
        on_step: Callable[[Progress], None] | None = None,
        stepped: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe: DiffusionPipeline | None = pipe
        self._stepped_by = stepped  # None: by those of the pipeline as it is then
        self.parts = parts
        self.kwargs = kwargs
        self._on_step = on_step
        self._expected = expected
        self._view: Any = None
        self._greenlet: Any = None
        self._autocast = autocast_now()  # of the stock call, put back whenever it goes on
        self._grad = False  # the same of torch's gradients
        self.alone = False  # whether its scheduler's steps find nobody to share with
        self.nested = False  # whether there are pipelines inside the pipeline
        self.steps_counted = False  # whether a scheduler of its own counts its steps
        self.journal = Journal(may_move(pipe))
        self.parked: Call | Step | None = None
        self.steps = 0
        self.over = False
        self.output: Any = None
        self._known = 0  # scheduler steps ahead that were taken elsewhere
        self._arrived: Callable[[Any], None] = _nothing
        self.error: BaseException | None = None
        self.brought = ""  # tensors of a call that failed, which its error may be about
        self._closing = False
        self._watch: Watch | None = None  # over the weights that it shares, until its like is known
        self._watched = on_step is not None or any("callback" in name for name in kwargs)

    @classmethod
    def ended(cls, output: Any) -> Run:
        """One that ended elsewhere with `output`."""
        run = cls.__new__(cls)
        run.parked = run.error = run._greenlet = run._view = None
        run.steps, run._expected, run.over, run.output = 0, 1, True, output
        return run

    @property
    def started(self) -> bool:
        return self.over or self._greenlet is not None

    @property
    def denoising(self) -> bool:
        """Whether it waits for a denoiser's call, for the step behind one, or for something between two."""
        parked = self.parked
        if parked is None or isinstance(parked, Step):
            return parked is not None
        return parked.part.role == "denoise" or 0 < self.steps < (self._scheduled or 0)

    @property
    def total(self) -> int:
        """Denoising steps from first to last: those of its schedule, once that is known."""
        return max(self.steps, self._scheduled or self._expected)

    @property
    def left(self) -> int:
        """Denoising steps ahead, at least one."""
        return max(1, self.total - self.steps)

    @property
    def _scheduled(self) -> int | None:
        if self._view is None:
            return None
        known = self._view.__dict__.get("_num_timesteps")
        if isinstance(known, int):
            return known
        return self._expected if self.nested else None  # pipelines inside it have their own schedules

    def needed(self) -> dict[str, bytes]:
        """Digests of the variables that the stock call may still read, by function and name."""
        return needed(self._greenlet.gr_frame, Run._main.__code__)

    # -- moving on ------------------------------------------------------------------------------------

    def resume(self, value: Any = None) -> None:
        """Go on with the result of the parked call (an exception is raised there) up to the next one."""
        if self.over:
            return
        if self._watched and not isinstance(value, BaseException):
            value = owned(value)  # the caller gets to see it
        parked, journal = self.parked, self.journal
        if self._greenlet is None:
            self._greenlet = greenlet(self._main)
            self._watch = self.parts.writing.watch(self.kwargs)
            journal.began = [one.get_state() for one in generators_of(self.kwargs)]
        elif isinstance(parked, Call):
            value = journal.called(parked, value, self.steps)
            self.steps += not self.steps_counted and parked.part.role == "denoise"
        if self.steps or not journal.keeps:
            self._go_on(value)
            return
        before = noise_now(self.parts.device)
        self._go_on(value)
        if not same(before, noise_now(self.parts.device)):
            journal.draws[len(journal.calls)] = before

    def _go_on(self, value: Any) -> None:
        """Let the stock call run up to the next thing that it waits for, or to its end."""
        self.parked = None
        outside, grad = autocast_now(), torch.is_grad_enabled()
        set_autocast(self._autocast, outside)
        torch.set_grad_enabled(self._grad)
        go_on = self._greenlet.throw if isinstance(value, BaseException) else self._greenlet.switch
        if self._watch is None:
            parked = go_on(value)
        else:
            parked, watched = self._watch.during(go_on, value)
            self._watch = self._watch if watched else None
        self._autocast, self._grad = autocast_now(), torch.is_grad_enabled()
        set_autocast(outside, self._autocast)
        torch.set_grad_enabled(grad)
        if self._greenlet.dead:
            self._forget()
        else:
            self.parked = parked

    def close(self) -> None:
        """End it where it stands; its tensors are free at once."""
        if self._greenlet is not None and not self._greenlet.dead:
            outside, grad = autocast_now(), torch.is_grad_enabled()
            set_autocast(self._autocast, outside)
            self._closing = True
            for _ in range(PATIENCE):
                if not self._greenlet.dead:
                    self._greenlet.throw(GreenletExit)
            set_autocast(outside, autocast_now())
            torch.set_grad_enabled(grad)
        self.output = None
        self._forget()

    def _forget(self) -> None:
        self.over = True
        self.pipe = self.parked = self._view = self._greenlet = self._on_step = self._watch = None
        self.kwargs, self._stepped_by = {}, None
        self.journal = Journal()

    def _main(self, _: Any = None) -> None:
        try:
            assert self.pipe is not None
            self._view = self._seen(self.pipe, self._stepped_by)
            self.output = owned(self._view(**self.kwargs))
            self.parts.writing.ended(self.kwargs)
        except Written as written:
            self.error = StageFailed(self.parts.writing.refuse(type(self.pipe).__name__, written.name))
        except BaseException as error:  # noqa: BLE001  the caller's own callbacks run in there
            if self._closing:
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            error.add_note(f"in {where.name}, {where.filename}:{where.lineno}")
            self.brought = tensors_of(self.kwargs, self.pipe)
            self.error = error.with_traceback(None)  # which would keep the request's tensors

    # -- the view ---------------------------------------------------------------------------------------

    def _seen(self, pipe: DiffusionPipeline, stepped: Mapping[str, Any] | None = None) -> Any:
        """The pipeline as this request sees it; `stepped`: in place of its schedulers of these names."""
        view = copy.copy(pipe)
        view.__class__ = viewed(pipe.__class__)
        own = view.__dict__
        own.update(stepped or {})
        own["_neustream_device"] = self.parts.device
        for name, value in list(own.items()):
            if id(value) in self.parts:
                own[name] = self._stand_in(value, self.parts[id(value)])
            elif isinstance(value, DiffusionPipeline):
                own[name] = self._seen(value)
                self.nested = True
            elif not is_stepped(value):
                continue
            elif callable(getattr(value, "step", None)):
                own[name] = own_scheduler(value, self._hooks())
                self.steps_counted = True
            else:
                own[name] = copy.deepcopy(value)
        return view

    def _hooks(self) -> Hooks:
        """What its schedulers tell."""
        return Hooks(park, self._stepped, lambda: self.alone, self._step_known, self._step_taken)

    def _stand_in(self, model: Any, parts: Mapping[str, Part]) -> StandIn:
        """What the view has in place of a model.

        Stock calls scale the adapters of their text encoders around the encoding, and some change their
        denoisers. Then they get their own model, on the same weights, and nobody shares its calls.
        """
        part, writing = parts.get(""), self.parts.writing
        if part is None:
            return StandIn(model, parts, writing)
        if part.role == "denoise" and self.parts.own:
            copied = twin(model)
            shared = {name: one.of(copied, name, self) for name, one in parts.items()}
            return StandIn(copied, shared, writing, own=True)
        if part.role == "encode" and part.scales and scaled(self.kwargs):
            return StandIn(twin(model), parts, writing, inline="encode", own=True)
        return StandIn(model, parts, writing)

    def follow(self, steps: int, result: Any, arrived: Callable[[Any], None]) -> None:
        """Take `steps` scheduler steps by their last `result`, then tell `arrived` of the scheduler."""
        self._known, self._arrived = steps, arrived
        self.journal.result = result

    def _step_known(self, scheduler: Any) -> Any:
        """The result of a step that was taken elsewhere; None for others."""
        if not self._known:
            return None
        self.steps += 1
        self._known -= 1
        if not self._known:
            self._arrived(scheduler)
            self.journal.goes_on(scheduler)
        return self.journal.result

    def _step_taken(self, scheduler: Any, result: Any) -> None:
        self.journal.stepped(scheduler, result)

    def _stepped(self, latents: torch.Tensor) -> None:
        self.steps += 1
        if self._on_step is not None:
            self._on_step(Progress(self.steps, self.total, latents, self))


def _nothing(scheduler: Any) -> None:
    """What a run that began here is told of."""


# -- driving several ------------------------------------------------------------------------------------


def advance(runs: Iterable[Run], done: Callable[[Run], bool]) -> None:
    """Carry out what runs are parked with, together where possible, until each is `done` or over."""
    active = [run for run in runs if not run.over and not done(run)]
    # stock calls set this mode for the thread that they all run on: set before, no end of one of them unsets it
    inference = any(run.parts.inference for run in active)
    with torch.inference_mode() if inference else torch.no_grad():
        while active:
            alike: dict[Any, list[Run]] = defaultdict(list)
            for run in active:
                run.alone = len(active) == 1
                alike[None if run.parked is None else run.parked.key].append(run)
            for some in alike.values():
                for run, value in zip(some, _results(some), strict=True):
                    run.resume(value)
            active = [run for run in active if not run.over and not done(run)]


def _results(runs: list[Run]) -> list[Any]:
    """The results of what runs are parked with, all of one key; None for those that have not begun."""
    first = runs[0].parked
    if isinstance(first, Call):
        return first.part.run([run.parked for run in runs if isinstance(run.parked, Call)])
    if isinstance(first, Step) and len(runs) > 1:
        return list(step_together([run.parked for run in runs if isinstance(run.parked, Step)]))
    return [None] * len(runs)


def encode(runs: Iterable[Run]) -> None:
    """Bring runs to their denoiser: text encoders, image encoders, the VAE's encoder."""
    advance(runs, lambda run: run.denoising)


def denoise(runs: Iterable[Run]) -> None:
    """Take one denoising step with each run (and what comes in front of it, if it has not begun)."""
    runs = list(runs)
    encode(runs)
    before = {run: run.steps for run in runs}

    def stepped(run: Run) -> bool:
        return not run.denoising or (run.steps > before[run] and isinstance(run.parked, Call))

    advance(runs, stepped)


def decode(runs: Iterable[Run], *, check_finite: bool = False) -> None:
    """Bring runs to their end: the VAE's decoder, and whatever else a pipeline does behind its steps.

    With `check_finite`, a run whose latents are not finite fails in place of being decoded.
    """
    runs = list(runs)
    for run in runs:
        parked = run.parked
        if not check_finite or not isinstance(parked, Call) or parked.part.role != "decode":
            continue
        if not all(bool(x.isfinite().all()) for x in parked.leaves if x.is_floating_point()):
            run.resume(StageFailed(f"the latents hold NaN or infinity after {run.steps} steps"))
    advance(runs, lambda run: False)
