"""Which service a model is served by: one at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.diffusers.parts import models_of
from neustream.errors import BackendError

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By the id of a model, which its owner holds."""
_lock = threading.Lock()


def claim(owner: object, pipes: Sequence[DiffusionPipeline]) -> None:
    """Let `owner` alone serve the models of some pipelines; BackendError if another one serves any."""
    with _lock:
        for pipe in pipes:
            for name, model in models_of(pipe):
                if _owners.get(id(model), owner) is not owner:
                    raise BackendError(f"{name} of {type(pipe).__name__} is served by another engine: close that first")
        for pipe in pipes:
            for _, model in models_of(pipe):
                _owners[id(model)] = owner


def free(owner: object, pipes: Sequence[DiffusionPipeline]) -> None:
    """`owner` serves these pipelines no more."""
    with _lock:
        for pipe in pipes:
            for _, model in models_of(pipe):
                if _owners.get(id(model)) is owner:
                    del _owners[id(model)]
