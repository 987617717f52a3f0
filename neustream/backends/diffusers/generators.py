"""Which torch.Generators requests under way draw from."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from neustream.backends.diffusers.journal import generators_of
from neustream.errors import RequestError


class Generators:
    """One request a generator at a time, or results would depend on the requests' order."""

    def __init__(self) -> None:
        self._used: dict[int, torch.Generator] = {}  # held, so that no other one is at their place
        self._lock = threading.Lock()

    def take(self, named: Mapping[str, Any]) -> None:
        """Those among a call's arguments are in use; RequestError if one is already."""
        wanted = {id(generator): generator for generator in generators_of(named)}
        with self._lock:
            if self._used.keys() & wanted.keys():
                raise RequestError("the generator is in use by another request: give each request its own")
            self._used |= wanted

    def free(self, named: Mapping[str, Any]) -> None:
        """They are free again."""
        with self._lock:
            for generator in generators_of(named):
                self._used.pop(id(generator), None)
