"""Stock calls that write to weights which requests share: seen before it happens.

A method of a model that writes to its model's weights (Shap-E's renderer puts a request's own
network into its layers) gets a copy of the model, for its request alone. A call that writes to them
by itself is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from neustream.backends.diffusers.foreign import offloaded
from neustream.backends.diffusers.journal import noise_now, set_noise
from neustream.backends.diffusers.weights import PLAIN

BY_OPERATOR = frozenset(
    ("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")))
)
"""Functions that write to their first argument, beside those whose names end with _."""
NO_VALUES = frozenset(("requires_grad_", "detach_", "share_memory_", "rename_"))
"""Those that change no value."""


class Written(BaseException):
    """A weight would be written to; `name` says which. No handler of stock code may take it for an error."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Watch(TorchFunctionMode):
    """Raises `Written` where Python code would write to a weight, in place of doing so.

    What is written past Python, through `weight.data = other` or by a model that moves or casts, is not seen.

    Args:
        models: by name.
    """

    def __init__(self, models: Iterable[tuple[str, torch.nn.Module]]) -> None:
        super().__init__()
        self._models = [(name, model) for name, model in models if not offloaded(model)]
        self._at = {_place(weight) for _, weight in self._weights()}

    def during(self, part: Callable[[Any], Any], value: Any) -> tuple[Any, bool]:
        """Run a part of a stock call: what it returns, and whether the next one may be watched too.

        Not if this one leaves a mode of its own on, which is to be on top when that is turned off.
        """
        with self:
            result = part(value)
            others = []
            while _get_current_function_mode() is not self:
                others.append(_pop_mode())
        for one in reversed(others):
            _push_mode(one)
        return result, not others

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            for tensor in _targets(func, args, kwargs):
                self._check(tensor)
        return func(*args, **kwargs)

    def _check(self, tensor: torch.Tensor) -> None:
        place = _place(tensor)
        if place not in self._at:
            return
        for name, weight in self._weights():  # one that was there may be gone, and its place another's
            if _place(weight) == place:
                raise Written(name)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, model in self._models:
            for name, weight in (*model.named_parameters(prefix), *model.named_buffers(prefix)):
                if _has_place(weight):
                    yield name, weight


class Writing:
    """What first calls showed: which methods of models write to their model's weights, and whether stock calls do.

    Args:
        models: that requests share, by name.

    `refused` says why the pipeline's calls cannot share its models; empty: they can.
    """

    def __init__(self, models: Sequence[tuple[str, torch.nn.Module]]) -> None:
        self._models = models
        self.refused = ""
        self._quiet: set[Any] = set()
        self._writing: set[Any] = set()
        self._ended: set[Any] = set()

    # -- stock calls --------------------------------------------------------------------------------------

    def watch(self, arguments: Mapping[str, Any]) -> Watch | None:
        """What stands between a stock call and the weights; None for one whose like ended without writing."""
        return None if _kind(arguments) in self._ended else Watch(self._models)

    def ended(self, arguments: Mapping[str, Any]) -> None:
        """A stock call that was watched wrote to no weight."""
        self._ended.add(_kind(arguments))

    def refuse(self, whose: str, name: str) -> str:
        """Why calls of a pipeline are refused from now on: one would write to the weight `name`."""
        self.refused = (
            f"{whose} writes to {name} in its call, and requests share that model: such a pipeline cannot be served"
        )
        return self.refused

    # -- methods of models --------------------------------------------------------------------------------

    def guarded(self, name: str, method: Any, own: Callable[[], Any]) -> Any:
        """A method of a model as a request may call it.

        Args:
            name: of the method, in its model.
            own: makes the request's model one with weights of its own, and returns it.
        """
        if not isinstance(method, MethodType) or _is_torchs(method) or method.__func__ in self._quiet:
            return method

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if method.__func__ not in self._writing:
                try:
                    return self._first(method, args, kwargs)
                except Written:
                    self._writing.add(method.__func__)
            return getattr(own(), name)(*args, **kwargs)

        return call

    def _first(self, method: MethodType, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a method, if it does not write; else noise is as it was."""
        model: Any = method.__self__
        generators = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Generator)]
        states = [one.get_state() for one in generators]
        noise = noise_now(model.device)
        try:
            with Watch([(type(model).__name__, model)]):
                result = method(*args, **kwargs)
        except Written:
            set_noise(noise, model.device)
            for one, state in zip(generators, states, strict=True):
                one.set_state(state)
            raise
        self._quiet.add(method.__func__)
        return result


def with_own_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model. Buffers that torch computed from others, as where a model was cast, are copied too."""
    computed = [buffer for buffer in model.buffers() if not buffer.is_leaf]
    known: dict[int, Any] = {id(one): one.detach().clone().requires_grad_() for one in computed}
    return copy.deepcopy(model, known)


def _kind(arguments: Mapping[str, Any]) -> Any:
    """Calls of one kind go the same way through their pipeline, as far as their arguments tell."""
    return tuple(sorted(arguments)), str(arguments.get("output_type"))


def _is_torchs(method: MethodType) -> bool:
    """Whether it is one that every module has."""
    return method.__func__ is getattr(torch.nn.Module, method.__func__.__name__, None)


def _targets(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a function of torch writes to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in NO_VALUES
    if args and (in_place or name in BY_OPERATOR):
        yield from _tensors(args[0])
    yield from _tensors(kwargs.get("out"))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    for one in value if isinstance(value, list | tuple) else (value,):
        while isinstance(one, torch.Tensor) and is_functorch_wrapped_tensor(one):  # as in torch.vmap
            one = get_unwrapped(one)
        if _has_place(one):
            yield one


def _has_place(value: Any) -> bool:
    return type(value) in PLAIN and value.layout is torch.strided and not value.is_meta and bool(value.numel())


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
