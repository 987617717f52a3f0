"""What the call of a pipeline takes: its arguments by name, their defaults and the kinds of their values."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from diffusers import DiffusionPipeline

Kind = Literal["none", "number", "numbers", "text", "texts", "mapping", "other"]
"""Of values, as far as it is checked: one number or several, one text or several."""
COMPARED = re.compile(r"\b(\w+) is (?:not )?None\b")
SIGNATURES = 64
"""Of as many calls they are kept."""


@dataclass(frozen=True)
class CallSignature:
    """The signature of a pipeline's call, without `self`.

    Args:
        defaults: by name, of those that have one.
        kinds: which kinds of values an argument is annotated with, by name.
        optional: arguments that the pipeline's source compares with None, whatever their annotations.
    """

    signature: inspect.Signature
    defaults: Mapping[str, Any]
    kinds: Mapping[str, frozenset[Kind]]
    optional: frozenset[str]

    @property
    def names(self) -> set[str]:
        """Of all arguments."""
        return set(self.signature.parameters)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name; TypeError, as of a call, if they do not fit."""
        named = dict(self.signature.bind(*args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
        return named


def signature_of(pipe: DiffusionPipeline) -> CallSignature:
    """The signature of a pipeline's call."""
    return _signature(type(pipe).__call__)


@lru_cache(SIGNATURES)
def _signature(call: Callable[..., Any]) -> CallSignature:
    try:
        signature = inspect.signature(call, eval_str=True)
    except Exception:  # noqa: BLE001  hints that are there for type checkers only
        signature = inspect.signature(call)
    parameters = list(signature.parameters.values())[1:]
    compared = set(COMPARED.findall(_source(call)))
    return CallSignature(
        signature.replace(parameters=parameters),
        {one.name: one.default for one in parameters if one.default is not one.empty},
        {one.name: kinds_of(one.annotation) for one in parameters},
        frozenset(one.name for one in parameters if one.name in compared),
    )


def _source(call: Callable[..., Any]) -> str:
    """The source of the file that a pipeline's call is written in."""
    module = inspect.getmodule(call)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):  # made at run time
        return ""


def kinds_of(annotation: Any) -> frozenset[Kind]:
    """The kinds of values that an annotation names."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return frozenset().union(*map(kinds_of, typing.get_args(annotation)))
    return frozenset((_kind(annotation),))


def _kind(annotation: Any) -> Kind:
    """The kind of values that an annotation without alternatives names."""
    if annotation is None or annotation is types.NoneType:
        return "none"
    if annotation in (int, float):
        return "number"
    if annotation is str:
        return "text"
    origin = typing.get_origin(annotation)
    inner = [one for one in typing.get_args(annotation) if one is not ...]
    if annotation is dict or origin is dict:
        return "mapping"
    if origin in (list, tuple) and inner and all(one in (int, float) for one in inner):
        return "numbers"
    return "texts" if origin is list and inner == [str] else "other"
