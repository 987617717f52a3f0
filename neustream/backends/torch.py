"""What torch backends share: devices and dtypes by name, and what goes wrong with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from neustream.backends import ConfigModel
from neustream.backends.memory import free_bytes
from neustream.errors import BackendError, nearest
from neustream.profiling.measuring import processor

try:
    import torch
except ImportError as error:
    raise BackendError(
        "this backend needs torch: pip install 'neustream[diffusion]' (or [llm] for language models)"
    ) from error

OUT_OF_MEMORY: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError)
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BackendError(f"unknown dtype {name!r}; {nearest(name, DTYPES)}")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """The device, checked to be there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}; allowed: cpu, cuda:0, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {name!r} is not here: {torch.cuda.device_count()} CUDA device(s) found")
    return device


def device_name(device: torch.device) -> str:
    """What profiles measured on `device` are labelled with: the GPU's or the processor's own name."""
    if device.type == "cuda":
        name: str = torch.cuda.get_device_name(device)
        return name
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def seeded(seed: int, device: str) -> torch.Generator:
    """A generator of its own for one request."""
    return torch.Generator(device).manual_seed(seed)


def tensor_on(device: torch.device, values: Sequence[Any]) -> torch.Tensor:
    """A tensor of numbers on `device`; nobody waits for the copy to a GPU."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def sync(device: torch.device) -> None:
    """Wait until `device` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_cached(device: torch.device) -> None:
    """Give back the memory that torch keeps of tensors that are gone."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a device, or that torch keeps there of tensors that are gone; None: not known."""
    if device.type == "cpu":
        return free_bytes()
    if device.type != "cuda":
        return None
    free_cached(device)
    return int(torch.cuda.mem_get_info(device)[0])


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory; on a CPU torch has no type of its own for that."""
    return isinstance(error, OUT_OF_MEMORY) or "allocate" in str(error)


class _Cudnn:
    """Who wants torch's attention without cuDNN's, and who wants it as the user chose: not both at once.

    The switch is one for all of the process.
    """

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._here = threading.local()  # calls of this thread within one another
        self._calls = 0
        self._kept = False
        self._was_on = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Without cuDNN's; waits while somebody has it as chosen."""
        depth = getattr(self._here, "depth", 0)
        with self._turns:
            if not depth:
                self._turns.wait_for(lambda: not self._kept)
            if not self._calls:
                self._was_on = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._calls += 1
            self._here.depth = depth + 1
        try:
            yield
        finally:
            with self._turns:
                self._calls -= 1
                self._here.depth = depth
                if not self._calls:
                    torch.backends.cuda.enable_cudnn_sdp(self._was_on)
                    self._turns.notify_all()

    @contextlib.contextmanager
    def as_chosen(self) -> Iterator[None]:
        """As the user chose: waits until others' calls without are over, and keeps new ones waiting.

        Within a call of this thread that wants it off, it stays off.
        """
        if getattr(self._here, "depth", 0):
            yield
            return
        with self._turns:
            self._turns.wait_for(lambda: not self._kept)
            self._kept = True
        try:  # what waits may be interrupted
            with self._turns:
                self._turns.wait_for(lambda: not self._calls)
            yield
        finally:
            with self._turns:
                self._kept = False
                self._turns.notify_all()


_cudnn = _Cudnn()


def without_cudnn_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Have torch attend without cuDNN, where it would; in all of the process meanwhile.

    cuDNN's attention, which torch prefers on newer GPUs, first makes a plan for each pair of lengths:
    tens of milliseconds, where texts bring another pair with nearly each prompt.
    """
    return _cudnn.off() if device.type == "cuda" else contextlib.nullcontext()


def attention_as_chosen() -> contextlib.AbstractContextManager[None]:
    """Have torch attend as the user chose, while another thread's calls would have it without cuDNN: they wait."""
    return _cudnn.as_chosen()


class TorchModel(ConfigModel):
    """What pipelines and language models of configs share: a stock object with weights on a device."""

    out_of_memory = OUT_OF_MEMORY

    def __init__(self, stock: object, models: Iterable[torch.nn.Module], dtype: str, place: torch.device) -> None:
        weights = sum(weight.numel() for model in models for weight in model.parameters())
        self.model_name = f"{type(stock).__name__}, {weights / 1e6:.1f} M parameters"
        self.dtype = dtype
        self._place = place

    def label(self, place: str) -> str:
        return device_name(device_of(place))

    def sync(self) -> None:
        sync(self._place)


class Samples:
    """The value in the middle of each of some weights: who writes to all of one changes it.

    What is written through `weight.data`, torch itself does not count.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._here: list[memoryview] = []
        elsewhere: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for weight in weights:
            if not weight.numel():
                continue
            middle = tuple(size // 2 for size in weight.shape)
            value = weight.detach()[middle].view(1)
            if value.device.type == "cpu":  # read as memory: torch would take ten times as long
                self._here.append(np.from_dlpack(value.view(torch.uint8)).data)
            else:
                elsewhere.setdefault((value.device, value.dtype), []).append(value)
        self._elsewhere = list(elsewhere.values())
        self._asked: list[torch.Tensor] = []

    def ask(self) -> None:
        """Have devices send the values, as they are behind what they do now; the next `read` gives these."""
        self._asked = [_sent(torch.cat(some)) for some in self._elsewhere]

    def read(self) -> list[bytes]:
        """The values as bytes: those on the host, then by device and dtype; waits for the devices."""
        if self._asked:
            for device in {some[0].device for some in self._elsewhere}:
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        asked, self._asked = self._asked or [torch.cat(some).cpu() for some in self._elsewhere], []
        return [b"".join(self._here), *[some.view(torch.uint8).numpy().tobytes() for some in asked]]


def _sent(values: torch.Tensor) -> torch.Tensor:
    """Values on their way to the host."""
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return there.copy_(values, non_blocking=True)
