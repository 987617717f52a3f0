"""Which mount a model is served by: one at a time."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

import torch

from neustream.errors import BackendError


class Owner(Protocol):
    """What serves models."""

    def make_way(self) -> bool:
        """Give them back, if nobody can miss it (see `Host`); whether it did."""
        ...


_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
"""By the id of a model, which its owner holds."""
_lock = threading.RLock()


def claim(owner: Owner, whose: str, models: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Let `owner` alone serve some models; BackendError, by their names, if another serves one."""
    named = list(models)
    if _others(owner, named):
        gc.collect()  # services that nobody refers to any more, but for cycles
        for other in _others(owner, named):
            other.make_way()
    with _lock:
        for name, model in named:
            if _owners.get(id(model), owner) is not owner:
                raise BackendError(f"{name} of {whose} is served already: close that service first")
        for _, model in named:
            _owners[id(model)] = owner


def _others(owner: Owner, named: Iterable[tuple[str, torch.nn.Module]]) -> list[Owner]:
    """Who serves some of the models now, beside `owner`."""
    with _lock:
        found = [_owners.get(id(model)) for _, model in named]
    return [one for one in dict.fromkeys(found) if one is not None and one is not owner]


def free(owner: object, models: Iterable[torch.nn.Module]) -> None:
    """`owner` serves these models no more."""
    with _lock:
        for model in models:
            if _owners.get(id(model)) is owner:
                del _owners[id(model)]
