"""Calls of a denoiser as CUDA graphs: its kernels are launched at once, without the Python between them.

A denoiser of a thousand kernels takes ten milliseconds or more of Python for each call, whatever the
GPU could do meanwhile. A graph computes with tensors that stay where they are, so there is one for
each kind of call: shapes, dtypes and all arguments that are no tensors. It launches the same kernels
on the same values, so results are those of the call to the last bit.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.module as torch_modules
from torch._dynamo.eval_frame import OptimizedModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neustream.backends.capturing import CAPTURES, Capture, NotCaptured
from neustream.backends.diffusers.adapters import scales_of
from neustream.backends.diffusers.foreign import has_own_parts, is_attention_torchs, is_stock, offloaded, processors_of
from neustream.backends.diffusers.results import Unshareable, rebuilt
from neustream.backends.torch import OUT_OF_MEMORY
from neustream.errors import BackendError, told

log = logging.getLogger("neustream")

MOST = 64
"""Graphs of one denoiser; the least recently used are given up."""
USES, USES_FULL = 2, 16
"""A graph is captured when a kind of call comes so often: one that never comes again is not worth it.

The second where another graph has to go: a capture takes as long as five calls.
"""
KNOWN = 1024
"""Kinds of calls that are counted at once."""
PLAIN = (bool, int, float, str, torch.dtype, torch.device)


class Replayed:
    """A denoiser, called as ever. Calls that come again are replayed, others run.

    Args:
        name: what the log calls it.
        model: in place, on a device for which there are graphs.

    Attributes:
        replays: how many calls were.
        why: it captures nothing any more, and why; empty: it does.
    """

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.replays = 0
        self.why = ""
        self._name, self._model = name, model
        self._hooks = [hooks for one in model.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._capture: Capture | None = None
        self._begin_anew()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._replayable():
            return self._model(*args, **kwargs)
        call = _Call()
        given = call.apart((args, kwargs))
        if call.unknown:
            return self._model(*args, **kwargs)
        key = (torch.is_inference_mode_enabled(), *call.key)
        graph = self._graph(key, given, call.tensors)
        if graph is None:
            return self._model(*args, **kwargs)
        self.replays += 1
        return graph(call.tensors)

    def _replayable(self) -> bool:
        """Whether calls may be replayed as things are now; forgets all graphs if weights are elsewhere."""
        if self.why or any(self._hooks) or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return False
        if list(map(torch.Tensor.data_ptr, self._weights)) != self._addresses:
            self._begin_anew()
        return [device.type in CAPTURES for device in self._devices] == [True]

    def _begin_anew(self) -> None:
        """No graphs; weights are where they are."""
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()
        self._counts: Counter[Any] = Counter()
        self._weights = [*self._model.parameters(), *self._model.buffers()]
        self._addresses = list(map(torch.Tensor.data_ptr, self._weights))
        self._devices = {weight.device for weight in self._weights}

    def _graph(self, key: Any, given: Any, tensors: Sequence[torch.Tensor]) -> _Graph | None:
        """The graph of a kind of call; None: it has none, or not yet."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if len(self._counts) >= KNOWN:
            self._counts.clear()
        self._counts[key] += 1
        if self._counts[key] < (USES if len(self._graphs) < MOST else USES_FULL):
            return None
        del self._counts[key]
        self._graphs[key] = graph = self._captured(given, tensors)
        while len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        return graph

    def _captured(self, given: Any, tensors: Sequence[torch.Tensor]) -> _Graph | None:
        """A graph of a call; None for a call that returns what is not there for each; or there are to be no more."""
        if self._capture is None:
            (device,) = self._devices
            self._capture = CAPTURES[device.type](device)
        inputs = [_writable(tensor) for tensor in tensors]

        def called() -> Any:
            args, kwargs = _filled(given, inputs)  # anew each time: models take things out of lists and dicts
            return self._model(*args, **kwargs)

        try:
            kept = _kept_by(called, {weight.untyped_storage()._cdata for weight in self._weights})
            return _Graph(inputs, self._capture(called), kept)
        except Unshareable:
            return None
        except OUT_OF_MEMORY:
            self._stop("there is no memory for them")
        except NotCaptured as error:
            self._stop(str(error))
        except Exception as error:  # noqa: BLE001  whatever code does that cannot be captured
            self._stop(f"a capture failed: {told(error)}")
        return None

    def _stop(self, why: str) -> None:
        self.why = why
        log.warning("%s: its calls are no CUDA graphs from now on, and may take longer: %s", self._name, why)


def wrapped(name: str, model: torch.nn.Module, device: torch.device, graphs: bool | None) -> Callable[..., Any]:
    """A denoiser that is replayed, or itself. BackendError if `graphs` asks for what is not possible."""
    why = "" if graphs is False else _refusal(model, device)
    if graphs is not False and not why:
        return Replayed(name, model)
    if graphs:
        raise BackendError(f"graphs=True: calls of {name} cannot be CUDA graphs: {why}; leave graphs out")
    itself: Callable[..., Any] = model
    return itself


def _refusal(model: torch.nn.Module, device: torch.device) -> str:
    """Why calls of a model are never replayed; empty: they may be."""
    if device.type not in CAPTURES:
        return f"it is on {device}"
    if isinstance(model, OptimizedModule):
        return "it is compiled"
    if has_own_parts(model) or not all(map(is_stock, processors_of(model))) or not is_attention_torchs():
        return "parts of it are of somebody's own, which may do anything besides computing"
    if scales_of(model):
        return "it has adapters, whose scales calls may change"
    if offloaded(model):
        return "its weights are elsewhere between calls"
    return ""


class _Graph:
    """One captured call: `inputs` are its tensors, `kept` the memory of what else it reads."""

    def __init__(
        self, inputs: Sequence[torch.Tensor], replay: Callable[[], Any], kept: Sequence[torch.UntypedStorage]
    ) -> None:
        self._inputs, self._replay, self._kept = inputs, replay, kept
        rebuilt(replay(), torch.Tensor.detach)  # Unshareable for what cannot be handed out again and again

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        for mine, other in zip(self._inputs, tensors, strict=True):
            mine.copy_(other)
        return rebuilt(self._replay(), torch.Tensor.clone)  # the next replay writes over it


class _Seen(TorchDispatchMode):
    """The memory of all tensors that operations read or make, which it does not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, output)):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        return output


def _kept_by(function: Callable[[], Any], weights: Collection[int]) -> list[torch.UntypedStorage]:
    """What is there after a call that it read or made, but for weights: models keep tables for some kinds of calls.

    They forget them for others: a graph, which no model knows of, has to keep its own.
    """
    with _Seen() as seen:
        function()
    refs = [ref for at, ref in seen.storages.items() if at not in weights and not ref.expired()]
    return [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in refs]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes in a call's arguments."""

    at: int


class _Call:
    """The arguments of a call, taken apart: its `tensors`, and the `key` of calls that differ in these only.

    `unknown`: there is something of which nobody knows whether it is the same as before.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.key: list[Any] = []
        self.unknown = False

    def apart(self, value: Any) -> Any:
        """The same with places for its tensors."""
        if isinstance(value, torch.Tensor):
            return self._place(value)
        if isinstance(value, Mapping):
            self.key.append((type(value), *value))
            return {key: self.apart(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            self.key.append((type(value), len(value)))
            return type(value)(self.apart(inner) for inner in value)
        if value is not None and not isinstance(value, PLAIN):
            self.unknown = True
        else:
            self.key.append((type(value), value))
        return value

    def _place(self, tensor: torch.Tensor) -> _Place:
        if tensor.device.type not in CAPTURES or tensor.requires_grad:
            self.unknown = True
        self.key.append((tensor.shape, tensor.stride(), tensor.dtype))
        self.tensors.append(tensor)
        return _Place(len(self.tensors) - 1)


@torch.inference_mode(False)
def _writable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and layout that may be written to in any mode."""
    made = torch.empty_like(tensor, memory_format=torch.preserve_format)
    with torch.no_grad():
        return made.copy_(tensor)


def _filled(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """What was taken apart, with tensors in their places."""
    if isinstance(value, _Place):
        return tensors[value.at]
    if isinstance(value, Mapping):
        return {key: _filled(inner, tensors) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(inner, tensors) for inner in value)
    return value
