"""Linear layers on a CPU, with copies of their weights in the layout that oneDNN's kernels read.

The stock call lays the weights out anew in each call, or reads them as they lie: for a few rows
that takes up to twice as long. The layers are the model's own but for the time of a call, in its
own thread only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from neustream.errors import BackendError

SMALLEST = 1 << 18
"""Weights of a layer from which it gains: calling the kernel costs 10 us more than the stock one."""
ROWS = 16
"""For so many rows the layout is chosen; it serves others as well."""
DTYPES = (torch.float32, torch.bfloat16)
STOCK = (torch.nn.Linear.forward, Conv1D.forward)
OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise")


class _Here(threading.local):
    on = False


_here = _Here()


class Forward:
    """What a layer does while one of our calls runs; in other threads, what it does ever."""

    __slots__ = ("_bias", "_call", "_stock", "_weight")

    def __init__(self, layer: torch.nn.Linear | Conv1D, weight: torch.Tensor) -> None:
        self._stock = layer.forward
        self._weight, self._bias = weight, layer.bias
        self._call = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if not _here.on:
            stock: torch.Tensor = self._stock(input)
            return stock
        found: torch.Tensor = self._call(input, self._weight, self._bias, "none", [], "")
        return found


class Prepacked:
    """The larger linear layers of a model, with a second copy of their weights.

    BackendError if it has none that could have one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        name = type(model).__name__
        self._own: list[tuple[dict[str, Any], Forward]] = []
        _check(model)
        copies: dict[int, torch.Tensor] = {}
        for layer in model.modules():
            if not _may(layer):
                continue
            key = layer.weight.data_ptr()
            if key not in copies:
                copies[key] = _laid_out(layer)
            self._own.append((layer.__dict__, Forward(layer, copies[key])))
        if not self._own:
            raise BackendError(
                f"prepack: {name} has no stock linear layer of {SMALLEST} weights or more in "
                f"{' or '.join(str(one) for one in DTYPES)}"
            )

    def __len__(self) -> int:
        return len(self._own)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let this thread's calls of the model read the copies."""
        for own, forward in self._own:
            own["forward"] = forward
        _here.on = True
        try:
            yield
        finally:
            _here.on = False
            for own, forward in self._own:
                if own.get("forward") is forward:  # else somebody has put another one there
                    del own["forward"]


def own_forward(own: dict[str, Any]) -> Any:
    """The forward that somebody has given a module with these attributes, whether or not a call runs."""
    found = own.get("forward")
    return None if type(found) is Forward else found


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


def _may(layer: torch.nn.Module) -> bool:
    """Whether a layer computes as the stock ones do, and is large enough."""
    if type(layer).forward not in STOCK or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return plain and weight.dtype in DTYPES and weight.numel() >= SMALLEST


def _laid_out(layer: torch.nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach()
    if isinstance(layer, Conv1D):  # [inputs, outputs]
        weight = weight.t().contiguous()
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return found
