"""CUDA graphs: the kernels of a call launched at once, without the Python that stands between them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

SYNCS = "synchronizing CUDA operation"
"""What torch warns of where a call waits for the device."""

Output = TypeVar("Output")
Function = Callable[[], Output]
Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Makes of a function of tensors that stay where they are one that computes the same anew."""


class NotCaptured(Exception):
    """A call cannot be a graph, and why."""


_free: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams on which nobody captures or has captured. cuBLAS keeps memory for each, which its graphs write to."""
_one = threading.Lock()
"""One capture at a time, whoever asks for it."""


class CudaGraphs:
    """Captures functions as CUDA graphs, which share one pool of memory: what one gave is gone when another runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free = _free.setdefault(device, [])
        self._stream = free.pop() if free else torch.cuda.Stream(device)
        weakref.finalize(self, free.append, self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._made = weakref.WeakSet[torch.cuda.CUDAGraph]()

    def __call__(self, function: Function[Output]) -> Function[Output]:
        """NotCaptured if the function waits for the device, or draws random numbers."""
        here = torch.cuda.current_stream(self._device)
        with _one, torch.cuda.device(self._device), torch.cuda.stream(here):  # a capture that fails leaves another
            self._warm_up(function, here)
            if not self._made:  # torch takes no pool again whose graphs are all gone
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = function()
            self._made.add(graph)
        return _Replay(graph, function, output)

    def _warm_up(self, function: Function[Output], here: torch.cuda.Stream) -> None:
        """Calls before the capture make what kernels keep, and show what no graph can do.

        It is asked before: a capture that fails would leave torch's random numbers unusable.
        """
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            function()
            before = torch.cuda.get_rng_state(self._device)
            with _no_syncs():
                function()
            if not torch.equal(before, torch.cuda.get_rng_state(self._device)):
                torch.cuda.set_rng_state(before, self._device)
                raise NotCaptured("its calls draw random numbers")
        here.wait_stream(self._stream)


@dataclass(frozen=True, slots=True)
class _Replay(Generic[Output]):
    """A graph, what it writes to, and the function whose tensors it reads: a graph keeps none of them."""

    graph: torch.cuda.CUDAGraph
    function: Function[Output]
    output: Output

    def __call__(self) -> Output:
        self.graph.replay()
        return self.output


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""What captures, by the type of device."""


@contextmanager
def _no_syncs() -> Iterator[None]:
    """NotCaptured if this thread waits for a device."""
    me, seen = threading.get_ident(), list[str]()
    before = torch.cuda.get_sync_debug_mode()

    def show(message: Warning | str, kind: type[Warning], file: str, line: int, *more: Any, **how: Any) -> None:
        if threading.get_ident() == me and SYNCS in str(message):
            seen.append(f"{file.rpartition('/')[2]}, line {line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]  # other names
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if seen:
        raise NotCaptured(f"its calls wait for the device ({seen[0]})")
