"""Frozen values that are made by the million: `record` makes a class of them.

A frozen dataclass sets each field through `object.__setattr__`, which looks it up by name. Here the
slots' own descriptors set them, in less than half the time.
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
        TypeError: the class has a `__post_init__`.
    """

    def make(plain: type[Made]) -> type[Made]:
        made: Any = dataclass(frozen=True, slots=True, eq=eq)(plain)
        if hasattr(made, "__post_init__"):
            raise TypeError(f"record {made.__name__!r}: `__post_init__` would not be called")
        names: dict[str, Any] = {}
        asked, sets = [], []
        for field in fields(made):
            name, value = field.name, field.name
            names |= {f"set_{name}": vars(made)[name].__set__, f"of_{name}": field.default}
            known = field.default is not MISSING
            if field.default_factory is not MISSING:
                names |= {f"make_{name}": field.default_factory}
                value = f"make_{name}() if {name} is of_{name} else {name}"
                known = True
            asked.append(f"{name}=of_{name}" if known else name)
            sets.append(f"    set_{name}(self, {value})")
        lines = [f"def __init__(self, {', '.join(asked)}):", *sets]
        exec("\n".join(lines), names)
        init = names["__init__"]
        init.__annotations__ = made.__init__.__annotations__
        init.__qualname__ = f"{made.__qualname__}.__init__"
        made.__init__ = init
        finished: type[Made] = made
        return finished

    return make
