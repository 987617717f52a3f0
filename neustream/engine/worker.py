"""One worker of a `ThreadExecutor`: its thread, its modules, and what they keep of requests."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from neustream.core.batch import Batch, StepInput
from neustream.core.events import Update
from neustream.core.stage_names import named
from neustream.errors import NeustreamError, StageFailed, told

if TYPE_CHECKING:
    from neustream.engine.executor import StreamModule

log = logging.getLogger(__name__)

Pieces = Mapping[str, Any]
"""What modules kept of a request that moves, by the stage that each ran last for it."""


def movable(module: StreamModule) -> bool:
    """Whether requests that have begun on `module` can go on elsewhere.

    A module without `release` keeps nothing of them; one with it needs `export` and `adopt`.
    """
    leaves = hasattr(module, "export") and hasattr(module, "adopt")
    return leaves or not hasattr(module, "release")


class Worker:
    """A thread, its modules by stage name, and which of them keep something of a request."""

    def __init__(self, name: str, modules: Mapping[str, StreamModule]) -> None:
        self.modules = dict(modules)
        self._kept: dict[str, dict[int, str]] = {}
        """By request: the modules that keep something of it, each with the stage it ran last."""
        self._stepping = False
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=attend, args=(self._inbox,), daemon=True, name=name)
        self._thread.start()

    @property
    def releases(self) -> bool:
        """Whether any of its modules keeps something of requests."""
        return any(hasattr(module, "release") for module in list(self.modules.values()))

    def post(self, work: Callable[[], None] | None) -> None:
        """Do `work` on the thread, behind all that was posted before; None ends the thread."""
        self._inbox.put(work)

    def join(self) -> None:
        self._thread.join()

    def here(self) -> bool:
        """Whether the present thread is this worker's."""
        return threading.current_thread() is self._thread

    @property
    def free(self) -> bool:
        """Whether the present thread is this worker's, and in no step."""
        return self.here() and not self._stepping

    # -- on the thread ----------------------------------------------------------------------------

    def release(self, request: str) -> None:
        """Nothing of `request` is to be kept."""
        self._kept.pop(request, None)
        for module in self._modules():
            if hasattr(module, "release"):
                _freed(module, module.release, request)

    def put_aside(self, request: str) -> None:
        """What is in the KV blocks of `request` is to be kept elsewhere, by modules that can."""
        for module in self._modules():
            if hasattr(module, "put_aside"):
                _freed(module, module.put_aside, request)
            elif hasattr(module, "release"):
                _freed(module, module.release, request)

    def forgets(self, model: str) -> str:
        """Which of a model's modules has `release` and no `put_aside`; "": none."""
        for stage, module in list(self.modules.items()):
            if not named(stage, [model]) or hasattr(module, "put_aside"):
                continue
            if hasattr(module, "release"):
                kind = type(module).__name__
                return f"{kind}, of stage {stage!r}, has `release` and no `put_aside`"
        return ""

    def _modules(self) -> Collection[Any]:
        """Each of its modules once."""
        return {id(module): module for module in list(self.modules.values())}.values()

    def export(self, given: StepInput) -> dict[str, Any]:
        """What the modules keep of a request; StageFailed if one of them cannot part with it."""
        pieces: dict[str, Any] = {}
        for stage in self._kept.get(given.id, {}).values():
            module: Any = self.modules[stage]
            if not movable(module):
                raise StageFailed(_not_movable(stage, module, given.id))
            piece = _called(stage, partial(module.export, given))
            if piece is not None:
                pieces[stage] = piece
        return pieces

    def adopt(self, given: StepInput, pieces: Pieces) -> None:
        """Make what another worker exported of a request this one's; all of it, or StageFailed."""
        if given.id in self._kept:
            raise StageFailed(f"request {given.id!r} is here already")
        for stage in pieces:
            if stage not in self.modules:
                raise StageFailed(
                    f"stage {stage!r}: no module for it; modules: {sorted(self.modules)}"
                )
            if not hasattr(self.modules[stage], "adopt"):
                raise StageFailed(_not_movable(stage, self.modules[stage], given.id))
        try:
            for stage, piece in pieces.items():
                module: Any = self.modules[stage]
                _called(stage, partial(module.adopt, given, piece))
                self._kept.setdefault(given.id, {})[id(module)] = stage
        except StageFailed:
            self.release(given.id)
            raise

    def step(
        self, batch: Batch, inputs: Sequence[StepInput], *, check_finite: bool
    ) -> Sequence[Update | NeustreamError] | BaseException:
        """What the module of a step returned, or why it failed."""
        self._stepping = True
        try:
            module = self.modules.get(batch.stage)
            if module is None:
                raise StageFailed(f"no module for it; modules: {sorted(self.modules)}")
            if hasattr(module, "release"):
                for given in inputs:
                    self._kept.setdefault(given.id, {})[id(module)] = batch.stage
            results = _one_each(module.step(inputs))
            return [_finite(batch.stage, one) for one in results] if check_finite else results
        except BaseException as error:  # noqa: BLE001  a stage may raise anything
            return failed(batch.stage, error)
        finally:
            self._stepping = False


def _freed(module: StreamModule, leave: Callable[[str], None], request: str) -> None:
    """Let a module free what it has of a request; what fails is logged."""
    try:
        leave(request)
    except Exception:
        name = type(module).__name__
        log.exception("%s: request %r could not be released", name, request)


def attend(inbox: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """A worker's thread: one thing after the other, until None comes; whatever one of them raises.

    What callbacks of futures raise ends up here.
    """
    while (work := inbox.get()) is not None:
        try:
            work()
        except BaseException:
            log.exception("a callback on the thread of a worker raised")
        del work  # hold no finished request's tensors while idle


def _one_each(updates: object) -> list[Update | StageFailed]:
    """What a module returned, as a list of updates; StageFailed if it is none."""
    if isinstance(updates, Mapping) or not isinstance(updates, Iterable):
        raise StageFailed(f"must return one dict per job, got {type(updates).__name__}")
    results = list(updates)
    for result in results:
        if not isinstance(result, Mapping | StageFailed):
            raise StageFailed(f"must return one dict per job, got {type(updates).__name__}")
    return results


def _called(stage: str, function: Callable[[], Any]) -> Any:
    """What `function` of a stage's module returns; all that it raises becomes a StageFailed."""
    try:
        return function()
    except Exception as error:  # a module may raise anything
        raise failed(stage, error) from error


def failed(stage: str, error: BaseException) -> StageFailed:
    failed = StageFailed(f"stage {stage!r}: {told(error)}")
    failed.__cause__ = error
    return failed


def _not_movable(stage: str, module: object, id: str) -> str:
    return (
        f"stage {stage!r}: request {id!r} cannot move: {type(module).__name__} keeps something "
        "of it (it has `release`) and has no `export` and `adopt`"
    )


def _finite(stage: str, update: Update | StageFailed) -> Update | StageFailed:
    if isinstance(update, StageFailed):
        return update
    for key, value in update.items():
        if isinstance(value, float):
            finite = math.isfinite(value)
        elif hasattr(value, "isfinite"):  # torch
            finite = bool(value.isfinite().all())
        elif hasattr(value, "dtype") and value.dtype.kind in "fc":  # numpy
            finite = bool((abs(value) < math.inf).all())
        else:
            continue
        if not finite:
            return StageFailed(f"stage {stage!r} returned NaN or infinity in {key!r}")
    return update
