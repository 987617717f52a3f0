"""`record` makes frozen values as `dataclass` does, only faster."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import ClassVar

import pytest

from neustream.core.record import record


@dataclass(frozen=True, slots=True)
class Plain:
    a: int
    b: str = "x"
    c: float = 0.5


@record()
class Made:
    rank: ClassVar[int] = 3
    a: int
    b: str = "x"
    c: float = 0.5


@record()
class Many:
    many: list[int] = field(default_factory=list)


@record(eq=False)
class Apart:
    a: int = 1


def test_a_record_is_made_as_a_dataclass_is() -> None:
    assert repr(Made(1, c=2.0)) == repr(Plain(1, c=2.0)).replace("Plain", "Made")
    assert Made(1) == Made(1, "x", 0.5) != Made(1, "y")
    assert hash(Made(1)) == hash(Made(1, "x"))
    assert replace(Made(1), b="y") == Made(1, "y")
    assert [each.name for each in fields(Made)] == ["a", "b", "c"]
    assert Made.rank == 3
    assert Made.__match_args__ == ("a", "b", "c")


@record()
class Named:
    new: int
    one: int = 1
    cls: int = 2
    filled: list[int] = field(default_factory=list)


def test_fields_may_have_any_name() -> None:
    made = Named(5, cls=3)
    assert (made.new, made.one, made.cls, made.filled) == (5, 1, 3, [])


def test_a_record_is_frozen_and_has_slots() -> None:
    made = Made(1)
    with pytest.raises(FrozenInstanceError):
        made.a = 2  # type: ignore[misc]
    assert not hasattr(made, "__dict__")


def test_a_record_is_copied_and_pickled() -> None:
    assert pickle.loads(pickle.dumps(Made(1, "y"))) == Made(1, "y")
    assert copy.copy(Made(2)) == Made(2)


def test_without_eq_each_is_its_own() -> None:
    assert Apart() != Apart()


def test_what_is_missing_or_too_much_is_told() -> None:
    with pytest.raises(TypeError, match="a"):
        Made()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected"):
        Made(1, d=2)  # type: ignore[call-arg]


def test_a_record_has_defaults_of_its_own() -> None:
    assert Many() == Many([])
    assert Many().many is not Many().many
    assert Many([1]).many == [1]


def test_what_a_record_cannot_have_is_refused() -> None:
    with pytest.raises(TypeError, match="__post_init__"):

        @record()
        class After:
            a: int

            def __post_init__(self) -> None: ...

    with pytest.raises(TypeError, match="slots of its own"):

        @record()
        class More(Made):
            d: int = 4
