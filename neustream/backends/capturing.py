"""CUDA graphs: the kernels of a call launched at once, without the Python that stands between them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neustream.backends.torch import attention_as_chosen

SYNCS = "synchronizing CUDA operation"
"""What torch warns of where a call waits for the device."""
PROTOTYPE = "Synchronization debug mode is a prototype feature"
"""What it warns of when it is first asked to: an error where warnings are errors, and the mode is on by then."""

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


@dataclass(frozen=True, slots=True)
class Replay(Generic[Output]):
    """What launches a graph, what it writes to, and the function whose tensors it reads: a graph keeps none of them."""

    launch: Callable[[], None]
    output: Output
    function: Function[Output]

    def __call__(self) -> Output:
        self.launch()
        return self.output


class Graphs:
    """Captures functions of one device: a trial shows what no graph can do, then operations are taken down."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, function: Function[Output]) -> Function[Output]:
        """NotCaptured if the function waits for the device, draws random numbers, or reads what is gone behind it."""
        with attention_as_chosen(), _one:  # in this order: who has it off may come to wait for the lock
            self.trial(function)
            launch, output = self.record(function)
        return Replay(launch, output, function)

    def trial(self, function: Function[Any]) -> None:
        """Calls before the capture make what kernels keep, and show what no graph can do."""
        with Reads(self.device) as reads:
            function()
        reads.check()
        function()

    def record(self, function: Function[Output]) -> tuple[Callable[[], None], Output]:
        """What launches the operations of a call again, and what they write to."""
        raise NotImplementedError


class CudaGraphs(Graphs):
    """Captures functions as CUDA graphs, which share one pool of memory: what one gave is gone when another runs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        free = _free.setdefault(device, [])
        self._stream = free.pop() if free else torch.cuda.Stream(device)
        weakref.finalize(self, free.append, self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._made = weakref.WeakSet[torch.cuda.CUDAGraph]()

    def __call__(self, function: Function[Output]) -> Function[Output]:
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(here):  # a capture that fails leaves another
            return super().__call__(function)

    def trial(self, function: Function[Any]) -> None:
        """It is asked before: a capture that fails would leave torch's random numbers unusable."""
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            with Reads(self.device) as reads:
                function()
            reads.check()
            before = torch.cuda.get_rng_state(self.device)
            with _no_syncs():
                function()
            if not torch.equal(before, torch.cuda.get_rng_state(self.device)):
                torch.cuda.set_rng_state(before, self.device)
                raise NotCaptured("its calls draw random numbers")
        here.wait_stream(self._stream)

    def record(self, function: Function[Output]) -> tuple[Callable[[], None], Output]:
        if not self._made:  # torch takes no pool again whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            output = function()
        self._made.add(graph)
        return graph.replay, output


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""What captures, by the type of device."""

COPIES = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_")
"""Operations that copy what is on the host, also single values; others are given these as numbers."""


class Reads(TorchDispatchMode):
    """What operations of a call on a device read.

    A graph reads the same memory again: a copy from or to the host would go on with memory that
    somebody else has by then, and so would one that reads a tensor which was made for the call
    without an operation, as indices of a Python list are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._made: dict[int, StorageWeakRef] = {}  # weak, and as long as they are here no other has their numbers
        self._given: dict[int, tuple[StorageWeakRef, str]] = {}  # what no operation made, and what read it last
        self._why = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        for one in given:
            self._read(one, str(function))
        output = function(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(output) if isinstance(one, torch.Tensor)]
        for one in made:
            storage = one.untyped_storage()
            if storage._cdata not in self._given:
                self._made.setdefault(storage._cdata, StorageWeakRef(storage))
        if not self._why and self._crosses(function, given, made):
            self._why = f"its calls copy between the host and the device ({function})"
        return output

    def _read(self, tensor: torch.Tensor, by: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._made or tensor.device.type != self._device.type or _is_number(tensor):
            return
        ref, _ = self._given.get(storage._cdata) or (StorageWeakRef(storage), "")
        self._given[storage._cdata] = ref, f"{by} of {list(tensor.shape)}"

    def _crosses(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
        if self._device.type == "cpu":
            return False
        copies: bool = function._schema.name in COPIES
        places = {one.device.type for one in given if copies or not _is_number(one)}
        return len(places | {one.device.type for one in made}) > 1

    def check(self) -> None:
        """NotCaptured if what was read cannot be read again; once the call is over."""
        gone = next((what for ref, what in self._given.values() if ref.expired()), "")
        if gone:
            self._why = self._why or f"its calls read a tensor that is gone behind them ({gone})"
        if self._why:
            raise NotCaptured(self._why)


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.dim()


def _filter(action: Literal["always", "ignore"], words: str) -> Any:
    """A filter of warnings that have these words, before all others from now on."""
    warnings.filterwarnings(action, f".*{words}")
    return warnings.filters[0]


@contextmanager
def _no_syncs() -> Iterator[None]:
    """NotCaptured if this thread waits for a device. What others are warned of goes where it went before."""
    me, seen = threading.get_ident(), list[str]()
    before, show = torch.cuda.get_sync_debug_mode(), warnings.showwarning

    def look(message: Warning | str, kind: type[Warning], file: str, line: int, *more: Any, **how: Any) -> None:
        if SYNCS not in str(message):
            show(message, kind, file, line, *more, **how)
        elif threading.get_ident() == me:
            seen.append(f"{file.rpartition('/')[2]}, line {line}")
        elif before:  # somebody wants to know of them
            show(message, kind, file, line, *more, **how)

    own = [_filter("always", SYNCS), _filter("ignore", PROTOTYPE)]
    told: Any = look
    warnings.showwarning = told
    try:
        torch.cuda.set_sync_debug_mode("warn")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        if warnings.showwarning is told:
            warnings.showwarning = show
        for one in own:
            with suppress(ValueError):  # somebody has put others in the place of all of them
                warnings.filters.remove(one)  # type: ignore[attr-defined]  # a list
    if seen:
        raise NotCaptured(f"its calls wait for the device ({seen[0]})")
