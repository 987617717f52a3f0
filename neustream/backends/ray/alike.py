"""Requests like one that an instance has looked at: what they ask for is known without a look.

A look costs a way to an instance and back before a request is routed. What it says depends on the
numbers and short texts among the arguments, and on how long other texts are. A guess only serves
to route: the instance that gets the request looks at its arguments itself, and refuses wrong ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from neustream.backends.ray.wire import Described
from neustream.core.types import SLO

REMEMBERED = 1024
SHORT = 24
"""Characters: longer texts are alike if they are about as long."""
STEP = 64
"""Characters that make a difference in length."""
DEEP = 3
MANY = 64
SEEDS = frozenset(("seed", "id", "like", "user"))
"""Parameters whose values change nothing of what a request costs."""


class Alike:
    """What instances said of requests, by what their arguments look like."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Described] = OrderedDict()

    def add(self, likeness: Hashable, described: Described) -> None:
        """Remember what an instance said."""
        if likeness is not None:
            self._known[likeness] = described
            self._known.move_to_end(likeness)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def get(self, likeness: Hashable, id: str) -> Described | None:
        """The same of another request; None if none like it was looked at."""
        found = None if likeness is None else self._known.get(likeness)
        if found is None:
            return None
        self._known.move_to_end(likeness)
        return replace(found, asked=replace(found.asked, id=id))


def likeness_of(model: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], slo: SLO | None) -> Hashable:
    """What requests that cost the same have in common; None if that cannot be told."""
    try:
        return model, slo, _like(args, DEEP), _like(dict(kwargs), DEEP)
    except ValueError:
        return None


def _like(value: Any, deep: int) -> Hashable:
    """ValueError for what is no plain data, or too much of it."""
    kind = type(value)
    if value is None or kind in (bool, int, float):
        return kind.__name__, value
    if kind is str:
        return value if len(value) <= SHORT and " " not in value else ("text", len(value) // STEP)
    if kind not in (list, tuple, dict) or not deep or len(value) > MANY:
        raise ValueError
    if kind is dict:
        some = [(key, _like(each, deep - 1)) for key, each in value.items() if key not in SEEDS]
        return kind.__name__, *some
    return kind.__name__, *[_like(each, deep - 1) for each in value]
