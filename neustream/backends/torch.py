"""What torch backends share: devices and dtypes by name, and what goes wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.engine.executor import StreamModule
from neustream.errors import BackendError, nearest
from neustream.profiling.measuring import measure, processor, profiles_of

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


def measured_on(
    device: str,
    graph: Graph,
    modules: Mapping[str, StreamModule],
    sample: Callable[[int], Mapping[str, Any]],
    repeats: int,
) -> dict[str, LatencyProfile]:
    """Profiles of a graph's torch modules on `device`; batches that do not fit its memory are left out."""
    place = device_of(device)
    measured = measure(
        graph,
        modules,
        sample,
        device=device,
        repeats=repeats,
        sync=partial(sync, place),
        out_of_memory=OUT_OF_MEMORY,
    )
    return profiles_of(measured, device_name(place))


def seeded(seed: int, device: str) -> torch.Generator:
    """A generator of its own for one request."""
    return torch.Generator(device).manual_seed(seed)


def sync(device: torch.device) -> None:
    """Wait until `device` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
