"""Linear layers on a CPU, with copies of their weights in the layout that oneDNN's kernels read.

The stock call lays the weights out anew in each call, or reads them as they lie: for a few rows
that takes up to twice as long. The layers are the model's own but for the time of a call, in its
own thread only.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from transformers.pytorch_utils import Conv1D

from neustream.backends.memory import free_bytes
from neustream.backends.transformers.lent import Lent, lent, own_forward
from neustream.errors import BackendError

SMALLEST = 1 << 18
"""Weights of a layer from which it gains: calling the kernel costs 10 us more than the stock one."""
ROWS = 16
"""For so many rows the layout is chosen; it serves others as well."""
STOCK = (torch.nn.Linear.forward, Conv1D.forward)
LOOKS = 8
"""Steps in which all values are looked at that tell whether weights are what they were."""
PIECE = 2048
"""Values of a weight that are looked at together."""
OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


SHARE = 0.25
"""Of the memory that is free, what copies may take that nobody asked for."""

_Copy = tuple[torch.Tensor, torch.Tensor | None]
"""The weights of a layer in oneDNN's layout, and its bias."""
_Kind = tuple[int, bool]
"""The id of a weight, and whether it is transposed."""
_Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    return found


SHOWN = """
def linear(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
"""
"""The same for torch's tracer, which does not know how to take down its empty list."""


@functools.cache  # what was taken down with it needs it as long as it is there
def _shown() -> torch.jit.CompilationUnit:
    return torch.jit.CompilationUnit(SHOWN)


class _Here(threading.local):
    """What this thread reads: copies, by the id of the layer; and what computes with them."""

    copies: Mapping[int, _Copy] = MappingProxyType({})
    linear: _Linear = staticmethod(_linear)


_here = _Here()


class Forward(Lent):
    """A layer that reads copies, in threads that have them."""

    __slots__ = ()

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        copy = _here.copies.get(id(self.stock.__self__))
        if copy is None:
            found: torch.Tensor = self.stock(input)
            return found
        return _here.linear(input, *copy)


class Prepacked:
    """The larger linear layers of a model, with a second copy of their weights.

    Args:
        beside: of a model that may have the same weights, which are copied once then.

    Raises:
        BackendError: it has no layer that could have a copy.
    """

    def __init__(self, model: torch.nn.Module, beside: Prepacked | None = None) -> None:
        name = type(model).__name__
        _check(model)
        self._layers = [layer for layer in model.modules() if _may(layer)]
        if not self._layers:
            raise BackendError(
                f"prepack: {name} has no stock linear layer of {SMALLEST} weights or more in "
                f"{' or '.join(str(one) for one in _dtypes())}"
            )
        kinds = {(id(layer.weight), isinstance(layer, Conv1D)): layer for layer in self._layers}
        self._next = 0
        self._looks: list[list[torch.Tensor]]
        self._values: list[list[bytes]]
        self._laid_out: dict[_Kind, torch.Tensor]
        if beside is not None and beside._laid_out.keys() == kinds.keys():
            self._looks, self._values, self._laid_out = beside._looks, beside._values, beside._laid_out
        else:
            self._lay_out(kinds)
        self._copies: dict[int, _Copy] = {
            id(layer): (self._laid_out[id(layer.weight), isinstance(layer, Conv1D)], layer.bias)
            for layer in self._layers
        }

    def _lay_out(self, kinds: Mapping[_Kind, torch.nn.Module]) -> None:
        pieces = [piece for layer in kinds.values() for piece in _some(layer.weight).split(PIECE)]
        self._looks = [pieces[first::LOOKS] for first in range(LOOKS)]
        self._values = [_read(some) for some in self._looks]  # first: what is written meanwhile is noticed
        self._laid_out = {kind: _laid_out(layer) for kind, layer in kinds.items()}

    def __len__(self) -> int:
        return len(self._layers)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let this thread's calls of the model read the copies, but for layers with a forward of their own."""
        before = _here.copies
        with lent(self._layers, Forward):
            _here.copies = self._copies
            try:
                yield
            finally:
                _here.copies = before

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight [outputs, inputs] as it lies, and its copy."""
        return [(_plain(layer), self._copies[id(layer)][0]) for layer in self._layers]

    @contextlib.contextmanager
    def shown(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let this thread's calls read `weights`, one for each of `pairs`, while torch's tracer takes them down."""
        before = _here.copies
        pairs = zip(self._layers, weights, strict=True)
        _here.copies = {id(layer): (weight, layer.bias) for layer, weight in pairs}
        _here.linear = _shown().linear
        try:
            yield
        finally:
            _here.copies, _here.linear = before, _linear

    def stale(self) -> bool:
        """Whether somebody wrote to the weights behind the copies; called after each step.

        Within `LOOKS` calls it has looked at values of each row and column of each weight. What is
        written through `weight.data`, torch itself does not count.
        """
        at, self._next = self._next, (self._next + 1) % LOOKS
        return _read(self._looks[at]) != self._values[at]


def prepacked_of(model: torch.nn.Module, wanted: bool | None, beside: Prepacked | None = None) -> Prepacked | None:
    """Copies of a model's larger layers, if they are wanted; BackendError if there can be none.

    None: where they can be had, weights are float32, as rounding changes tokens of halves, and copies
    take a quarter of the free memory at most. `beside`: as of `Prepacked`; nobody says otherwise there.
    """
    if wanted is not None or beside is not None:
        return None if wanted is False else Prepacked(model, beside)
    with contextlib.suppress(BackendError):
        _check(model)
        weights = {id(layer.weight): layer.weight for layer in model.modules() if _may(layer)}.values()
        size, free = sum([weight.nbytes for weight in weights]), free_bytes()
        if weights and all(weight.dtype == torch.float32 for weight in weights) and size <= SHARE * (free or 0):
            return Prepacked(model)
    return None


def _check(model: torch.nn.Module) -> None:
    """BackendError if layers of this model cannot be used so here."""
    name, where = type(model).__name__, {weight.device.type for weight in model.parameters()}
    if where != {"cpu"}:
        raise BackendError(f"prepack is for models on a CPU, and {name} is on {', '.join(sorted(where))}")
    lacking = [one for one in OPERATIONS if not hasattr(torch.ops.mkldnn, one)]
    if not torch.backends.mkldnn.is_available() or lacking:
        raise BackendError(f"prepack: torch {torch.__version__} has no oneDNN layers here")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise BackendError(f"prepack: {name} is compiled, which sees to its layers itself")


def _dtypes() -> tuple[torch.dtype, ...]:
    """Of weights that the kernels compute with on this CPU."""
    halves = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if halves else (torch.float32,)


def _may(layer: torch.nn.Module) -> bool:
    """Whether a layer computes as the stock ones do, with weights of its own, and is large enough."""
    if type(layer).forward not in STOCK or own_forward(layer.__dict__) is not None:
        return False
    weight = layer._parameters.get("weight")  # None: it is computed from others
    if type(weight) is not torch.nn.Parameter or not weight.is_contiguous():
        return False
    return weight.dtype in _dtypes() and weight.numel() >= SMALLEST


def _some(weight: torch.Tensor) -> torch.Tensor:
    """A view of some values of a matrix: of each row at least one, and of each column."""
    rows, columns = weight.shape
    apart = min(rows, columns)
    while math.gcd(apart, columns) > 1:  # so that it comes to each column
        apart -= 1
    return weight.detach().view(-1)[::apart]


def _read(some: Sequence[torch.Tensor]) -> list[bytes]:
    return [values.contiguous().view(torch.uint8).numpy().tobytes() for values in some]


def _plain(layer: torch.nn.Module) -> torch.Tensor:
    """The weights of a layer, [outputs, inputs]."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight  # there [inputs, outputs]


def _laid_out(layer: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(_plain(layer), ROWS)
    return found
