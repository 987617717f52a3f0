"""Whether two sides of a cluster mean the same by what they send: a hash of what messages are made of.

Messages are pickled values. Where one side has another version of their classes, fields are read as others, and
nothing says so. So an instance is asked for its hash before anything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from neustream.backends.ray import telling, wire
from neustream.cluster import happenings, messages, past
from neustream.core import batch, carry, cursor, demand, events, frames, graph, node, nodes, outlook, profile, types
from neustream.engine import crossing
from neustream.engine import events as records
from neustream.service import requests

MODULES: Sequence[ModuleType] = (
    batch,
    carry,
    crossing,
    cursor,
    demand,
    events,
    frames,
    graph,
    happenings,
    messages,
    node,
    nodes,
    outlook,
    past,
    profile,
    records,
    requests,
    telling,
    types,
    wire,
)
"""Where what is sent is defined."""


def format_of(modules: Sequence[ModuleType]) -> str:
    """A hash of the classes of some modules that have fields: their names, and those of their fields in their order."""
    found = []
    for module in modules:
        for name, value in sorted(vars(module).items()):
            own = isinstance(value, type) and value.__module__ == module.__name__
            names = fields_of(value) if own else None
            if names is not None:
                found.append((module.__name__, name, names))
    return hashlib.blake2b(repr(found).encode(), digest_size=6).hexdigest()


def fields_of(kind: Any) -> list[str] | None:
    """The fields of a dataclass or a named tuple, in their order; None: it is neither."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind._fields) if issubclass(kind, tuple) and hasattr(kind, "_fields") else None


FORMAT = format_of(MODULES)
