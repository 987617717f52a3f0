"""What a request sees in place of the pipeline and of its models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from greenlet import getcurrent
from tqdm import tqdm

from neustream.backends.diffusers.calls import Call, Part
from neustream.backends.diffusers.stepping import Step
from neustream.backends.diffusers.writing import Writing, with_own_weights
from neustream.errors import BackendError


def park(wanted: Call | Step) -> Any:
    """Stop the current request with what it wants; returns the result."""
    hub = getcurrent().parent
    assert hub is not None
    return hub.switch(wanted)


CHANGES = (
    "set_attn",
    "set_adapter",
    "enable_freeu",
    "disable_freeu",
    "fuse_",
    "unfuse_",
    "register_forward",
    "load_attn",
    "add_adapter",
)
"""How names of methods begin that change a model."""


class StandIn:
    """A model's place in a view: calls of its parts park the request, everything else is the model's.

    Calls of the role `inline` are not shared: they run at once, inside their request. A model that is
    the request's `own` may be changed. A method that writes to weights, by what `writing` knows, is
    called on a copy that has weights of its own, which takes the model's place for this request.
    """

    def __init__(
        self, model: Any, parts: Mapping[str, Part], writing: Writing, inline: str = "", *, own: bool = False
    ) -> None:
        self.__dict__.update(_model=model, _parts=parts, _inline=inline, _cast=None, _own=own, _writing=writing)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks for
        return type(self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self._parts.get("")
        if part is None or part.role == self._inline:
            return self._model(*args, **kwargs)
        return park(part.call(args, kwargs, self._cast))

    @property
    def dtype(self) -> Any:
        """The model's, which searches all of its modules for it at each question; or what this request made it."""
        return self._cast or next(iter(self._parts.values())).dtype

    @property
    def device(self) -> Any:
        """The model's; of one that is not here, where the pipeline runs."""
        return next(iter(self._parts.values())).place or self._model.device

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        """Cast the model for this request (SDXL decodes in float32); others have it in the dtype that they want."""
        device, dtype = asked_of_to(*args, **kwargs)
        if device is not None and device.type != self.device.type:
            raise BackendError(f"a pipeline that moves {type(self._model).__name__} in its call cannot share it")
        if dtype is not None:
            self.__dict__["_cast"] = dtype
            self._model.to(dtype=dtype)
        return self

    def __getattr__(self, name: str) -> Any:
        part = self._parts.get(name)
        if part is None or part.role == self._inline:
            if name.startswith(CHANGES) and not self._own:
                raise BackendError(f"a pipeline that calls {name}() of a model in its call cannot share that model")
            value = getattr(self._model, name)
            return value if self._writing is None else self._writing.guarded(name, value, self._copied)
        return lambda *args, **kwargs: park(part.call(args, kwargs, self._cast))

    def _copied(self) -> Any:
        """The request's own model from now on, with weights of its own."""
        copied = with_own_weights(self._model)
        whose = object()
        parts = {name: part.of(copied, name, whose) for name, part in self._parts.items()}
        self.__dict__.update(_model=copied, _parts=parts, _own=True, _writing=None)
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        if self._own:
            setattr(self._model, name, value)
            return
        raise BackendError(f"a pipeline that sets {name!r} of a model in its call cannot share that model")


def asked_of_to(
    *args: Any, device: Any = None, dtype: torch.dtype | None = None, **_: Any
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype in the arguments of a `Module.to`, None where it leaves them."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif not isinstance(arg, bool):  # non_blocking
            device = arg
    return (None if device is None else torch.device(device)), dtype


class View:
    """What views do in their own way; mixed into the pipeline's class."""

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None, **options: Any) -> Any:
        """One that shows nothing: those of requests side by side would write over each other."""
        return tqdm(iterable, total=total, disable=True)

    def maybe_free_model_hooks(self) -> None:
        """Models are offloaded when the engine ends, not when one of its requests does."""

    @property
    def _execution_device(self) -> torch.device:
        """Where the pipeline runs, asked once for all. Stock code searches all modules for it, again and again."""
        device: torch.device = self.__dict__["_neustream_device"]
        return device


class DryView(View):
    """A view that has its own copy of a scheduler only once it is asked for it."""

    def __getattr__(self, name: str) -> Any:
        stepped = self.__dict__.get("_neustream_stepped", {})
        if name not in stepped:
            return super().__getattr__(name)  # type: ignore[misc]
        value = self.__dict__[name] = copy.deepcopy(stepped[name])
        return value


@cache
def viewed(kind: type) -> Any:
    """The class of the views of a class of pipelines."""
    return _mixed(View, kind)


@cache
def dry(kind: type) -> Any:
    """The class of the views of a class of pipelines in which their call checks its arguments."""
    return _mixed(DryView, kind)


def _mixed(view: type, kind: type) -> Any:
    return type(kind.__name__, (view, kind), {"__module__": kind.__module__})
