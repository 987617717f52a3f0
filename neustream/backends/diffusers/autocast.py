"""Torch's autocast of a thread: that of the stock call whose turn it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

Autocast = tuple[tuple[bool, torch.dtype], ...]
DEVICES = ("cpu", "cuda")


def autocast_now() -> Autocast:
    """Torch's autocast of this thread, by kind of device."""
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    return (enabled("cpu"), dtype("cpu")), (enabled("cuda"), dtype("cuda"))  # asked at each turn of a call


def set_autocast(state: Autocast, now: Autocast) -> None:
    """Have `state` in place of what is there `now`."""
    if state != now:
        for kind, (enabled, dtype) in zip(DEVICES, state, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextlib.contextmanager
def autocast(state: Autocast) -> Iterator[None]:
    outside = autocast_now()
    set_autocast(state, outside)
    try:
        yield
    finally:
        set_autocast(outside, autocast_now())
