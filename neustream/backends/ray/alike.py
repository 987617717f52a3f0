"""Requests like some that instances have looked at: what they ask for is known without a look.

A look costs a way to an instance and back before a request is routed. Which arguments matter is
learnt: those that differed between requests that asked for the same do not, until one is found to.
Lengths always do. A guess only serves to route: the instance that gets the request looks at its
arguments itself, refuses wrong ones, and says so if it is not what was guessed; then one looks after all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neustream.backends.ray.wire import Described, Guess
from neustream.core.types import SLO

KINDS = 256
"""Kinds of requests that are remembered."""
SAMPLES = 1024
"""Requests of each kind that are."""
COMPARED = 64
"""The latest of these are what a new one is compared with."""
SHORT = 24
"""Characters: longer texts are alike if they are about as long."""
STEP = 64
"""Characters, or numbers, that make a difference in length."""
DEEP = 3
MANY = 64
MOST = 256
"""Values of one request: those of requests with more are not compared."""
SEEDS = frozenset(("seed", "id", "like", "user", "generator"))
"""Parameters whose values change nothing of what a request costs."""

Values = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a request's arguments look like. `kind`: their names and types; `values`: in that order.

    Values that say how long or how large something is are tuples, the others are not.
    """

    kind: Hashable
    values: Values


class Alike:
    """What instances said of requests, by what their arguments look like."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def add(self, likeness: Likeness | None, described: Described) -> None:
        """Remember what an instance said, also of one that was guessed at and is something else."""
        if likeness is None:
            return
        described = replace(described, profiles={}, asked=replace(described.asked, params={}))
        kind = self._kinds.setdefault(likeness.kind, _Kind())
        self._kinds.move_to_end(likeness.kind)
        kind.add(likeness.values, described)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)

    def get(self, likeness: Likeness | None, id: str, slo: SLO | None) -> Described | None:
        """The same of another request, with its own promise; None if none like it was looked at.

        Nothing is known of its `params`: these are empty.
        """
        kind = None if likeness is None else self._kinds.get(likeness.kind)
        if likeness is None or kind is None:
            return None
        self._kinds.move_to_end(likeness.kind)
        found = kind.get(likeness.values)
        if found is None:
            return None
        promised = found.slo if slo is None else slo
        first_in = min(promised.total, promised.first)
        asked = replace(
            found.asked,
            id=id,
            due_in=promised.total,
            first_in=first_in,
            step=promised.step,
            weight=promised.weight,
            slo=promised,
        )
        return replace(found, asked=asked, slo=promised)


class _Kind:
    """Requests whose arguments have the same names and types.

    `idle`: places of values that change nothing, as far as was seen; `matter`: of those that do;
    `vague`: samples that do not tell what others with the same values ask for.
    """

    def __init__(self) -> None:
        self._samples: OrderedDict[Values, Described] = OrderedDict()
        self._known: dict[Values, Values] = {}
        self._vague: set[Values] = set()
        self._idle: set[int] = set()
        self._matter: set[int] = set()

    def add(self, values: Values, described: Described) -> None:
        like = self._known.get(self._key(values))
        if like is not None:
            self._against(like, values, described)
        idle = set(self._idle)
        for other in list(reversed(self._samples))[:COMPARED]:
            if other in self._vague:
                continue
            apart = _apart(values, other)
            if _same(described, self._samples[other]):
                idle |= apart
            elif len(apart) == 1 or apart <= idle:
                self._matter |= apart
        self._samples[values] = described
        self._samples.move_to_end(values)
        if len(self._samples) > SAMPLES:
            old, _ = self._samples.popitem(last=False)
            self._known.pop(self._key(old), None)
            self._vague.discard(old)
        self._settle(idle)
        self._known[self._key(values)] = values

    def get(self, values: Values) -> Described | None:
        like = self._known.get(self._key(values))
        return None if like is None or like in self._vague else self._samples.get(like)

    def _against(self, like: Values, values: Values, described: Described) -> None:
        """Learn from a request what is wrong with the sample that stands for it."""
        apart, sample = _apart(like, values), self._samples[like]
        if like in self._vague or (not apart and not _same(described, sample)):
            self._vague.add(values)
        elif not _same(described, sample):
            self._matter |= apart

    def _settle(self, idle: set[int]) -> None:
        """These places are idle, but for those that matter."""
        idle = idle - self._matter
        if idle != self._idle:
            self._idle = idle
            self._known = {self._key(values): values for values in self._samples}

    def _key(self, values: Values) -> Values:
        """The values without those that change nothing."""
        idle = self._idle
        return tuple(
            [None if at in idle and not isinstance(value, tuple) else value for at, value in enumerate(values)]
        )


def _apart(values: Values, others: Values) -> set[int]:
    """The places where they differ."""
    return {at for at, (one, other) in enumerate(zip(values, others, strict=True)) if one != other}


def _same(one: Described, other: Described) -> bool:
    """Whether two requests ask for the same, whatever they were promised."""
    if one.graph.print != other.graph.print or one.streams != other.streams:
        return False
    if {name: each.count for name, each in one.asked.calls.items()} != {
        name: each.count for name, each in other.asked.calls.items()
    }:
        return False
    return one.asked.stage == other.asked.stage and Guess.of(one).holds(Guess.of(other), one.graph)


def likeness_of(
    model: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], slo: SLO | None
) -> Likeness | None:
    """What tells requests that cost the same from others; None if that cannot be told."""
    values: list[Hashable] = []
    try:
        kind = model, slo is None, _kind(args, DEEP, values), _kind(dict(kwargs), DEEP, values)
    except Exception:  # noqa: BLE001  anybody's objects; an instance looks at these
        return None
    return Likeness(kind, tuple(values))


def _kind(value: Any, deep: int, values: list[Hashable]) -> Hashable:
    """Names and types of an argument, its values put into `values`; ValueError for what is nothing of the kind."""
    kind = type(value)
    if len(values) > MOST:
        raise ValueError
    if value is None or kind in (bool, int, float):
        values.append(value)
        return kind.__name__
    if kind is str:
        values.append(value if len(value) <= SHORT and " " not in value else ("text", len(value) // STEP))
        return kind.__name__
    if _is_numbers(value):
        values.append(("numbers", len(value)) if len(value) <= MANY else ("long", len(value) // STEP))
        return kind.__name__, "numbers"
    if kind not in (list, tuple, dict) or not deep or len(value) > MANY:
        return _array(value, values)
    if kind is dict:
        some = [(key, _kind(each, deep - 1, values)) for key, each in value.items() if key not in SEEDS]
        return kind.__name__, *some
    return kind.__name__, *[_kind(each, deep - 1, values) for each in value]


def _is_numbers(value: Any) -> bool:
    """Whether it is a list of whole numbers, as tokens are; not one or two: those say what is wanted."""
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 2
    return several and all(type(each) is int for each in value)


def _array(value: Any, values: list[Hashable]) -> Hashable:
    """An array, a tensor or an image by its size; ValueError for what is none."""
    shape = getattr(value, "shape", None)
    shape = getattr(value, "size", None) if shape is None else shape
    if not isinstance(shape, tuple) or not all(isinstance(side, int) for side in shape):
        raise ValueError
    values.append((*shape, str(getattr(value, "dtype", getattr(value, "mode", "")))))
    return type(value).__module__, type(value).__qualname__
