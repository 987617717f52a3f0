"""Which mount a model is served by: one at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from neustream.errors import BackendError

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By the id of a model, which its owner holds."""
_lock = threading.Lock()


def claim(owner: object, whose: str, models: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Let `owner` alone serve some models; BackendError, by their names, if another serves one."""
    named = list(models)
    with _lock:
        for name, model in named:
            if _owners.get(id(model), owner) is not owner:
                raise BackendError(f"{name} of {whose} is served already: close that service first")
        for _, model in named:
            _owners[id(model)] = owner


def free(owner: object, models: Iterable[torch.nn.Module]) -> None:
    """`owner` serves these models no more."""
    with _lock:
        for model in models:
            if _owners.get(id(model)) is owner:
                del _owners[id(model)]
