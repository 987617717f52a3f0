"""Whether two sides of a cluster mean the same by what they send: a hash of what messages are made of.

Messages are pickled values. Where one side has another version of their classes, fields are read as others, and
nothing says so. So an instance is asked for its hash before anything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from types import ModuleType

from neustream.backends.ray import telling, wire
from neustream.cluster import happenings, messages, past
from neustream.core import carry, events, graph, node, nodes, outlook, types
from neustream.engine import crossing
from neustream.service import requests

MODULES: Sequence[ModuleType] = (
    carry,
    crossing,
    events,
    graph,
    happenings,
    messages,
    node,
    nodes,
    outlook,
    past,
    requests,
    telling,
    types,
    wire,
)
"""Where what is sent is defined."""


def format_of(modules: Sequence[ModuleType]) -> str:
    """A hash of the dataclasses of some modules: their names, and those of their fields in their order."""
    found = []
    for module in modules:
        for name, value in sorted(vars(module).items()):
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and dataclasses.is_dataclass(value):
                found.append((module.__name__, name, [field.name for field in dataclasses.fields(value)]))
    return hashlib.blake2b(repr(found).encode(), digest_size=6).hexdigest()


FORMAT = format_of(MODULES)
