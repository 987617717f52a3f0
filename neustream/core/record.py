"""Frozen values that are made by the million: `record` makes a class of them.

A frozen dataclass sets each field through `object.__setattr__`, which looks it up by name. Here one
is filled in as an object of a class with the same slots that is not frozen, and then becomes one of
its own: a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, dataclass_transform

Made = TypeVar("Made")


@dataclass_transform(frozen_default=True)
def record(*, eq: bool = True) -> Callable[[type[Made]], type[Made]]:
    """Like `dataclass(frozen=True, slots=True, eq=eq)`.

    Raises:
        TypeError: the class has a `__post_init__`, or a base that has slots.
    """

    def make(plain: type[Made]) -> type[Made]:
        made: Any = dataclass(frozen=True, slots=True, eq=eq, init=False)(plain)
        if hasattr(made, "__post_init__"):
            raise TypeError(f"record {made.__name__!r}: `__post_init__` would not be called")
        slots = tuple([field.name for field in fields(made)])
        if made.__slots__ != slots:
            raise TypeError(f"record {made.__name__!r}: a base has slots of its own")
        made.__new__ = _constructor(made, type(f"Open{made.__name__}", (), {"__slots__": slots}))
        made.__reduce__ = lambda self: (made, tuple([getattr(self, name) for name in slots]))
        finished: type[Made] = made
        return finished

    return make


def _constructor(made: Any, filled: type) -> Callable[..., Any]:
    """`made.__new__`, which fills in an object of the other class, with the same slots.

    Its own names begin with `__`, so that fields may have any other.
    """
    names: dict[str, Any] = {"__new": object.__new__, "__filled": filled}
    asked, sets = [], []
    for field in fields(made):
        name, value = field.name, field.name
        known = field.default is not MISSING
        names[f"__of_{name}"] = field.default
        if field.default_factory is not MISSING:
            names[f"__make_{name}"] = field.default_factory
            value = f"__make_{name}() if {name} is __of_{name} else {name}"
            known = True
        asked.append(f"{name}=__of_{name}" if known else name)
        sets.append(f"    __one.{name} = {value}")
    begin = ["    __one = __new(__filled)"]
    end = ["    __one.__class__ = __cls", "    return __one"]
    exec("\n".join([f"def __new__(__cls, {', '.join(asked)}):", *begin, *sets, *end]), names)
    new: Callable[..., Any] = names["__new__"]
    new.__annotations__ = {field.name: field.type for field in fields(made)}
    new.__qualname__ = f"{made.__qualname__}.__new__"
    return new
