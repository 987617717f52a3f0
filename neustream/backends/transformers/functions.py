"""Functions that a model's code calls by name: whoever puts others there changes what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch.nn.functional as layers
from transformers import AttentionInterface

from neustream.backends.transformers.packed import STOCK

CODE = (FunctionType, BuiltinFunctionType, type)
KINDS = ("transformers.models.", "transformers.activations")
"""Modules of the library whose classes are looked at."""
READ = (*KINDS, "transformers.integrations.", "transformers.masking_utils")
"""Those whose functions compute, and are followed to what they call."""
LEFT_OUT = ("__init__", "extra_repr", "_init_weights")
"""Methods that compute nothing of a call."""

Space = Mapping[str, Any]


class Functions:
    """What names in the code of some classes stand for: functions of their modules, and those that these call.

    Methods of the classes count too, and torch's functions of layers. What was no function or class
    when it was looked up does not count: the library loads some of its own only when they are needed.

    Attributes:
        names: how each is told, in the order of `now`.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        found: dict[int, tuple[str, Space, list[str]]] = {}
        kinds = [kind for kind in kinds if _package(kind.__module__) != "torch"]
        self._own = {_package(kind.__module__) for kind in kinds} - {"transformers"}
        self._seen: set[FunctionType] = set()
        for where, space, name in self._followed(kinds):
            found.setdefault(id(space), (where, space, []))[2].append(name)
        self._looks: list[tuple[itemgetter[Any], list[str], Space]] = []
        self.names: list[str] = []
        for where, space, some in found.values():
            names = [*dict.fromkeys(some), some[0]]  # two or more: a tuple is got
            self._looks.append((itemgetter(*names), names, space))
            self.names += [f"{where}.{name}" for name in names]
        self.held = self.now()

    def now(self) -> list[Any]:
        """All of them, as they are; None: it is gone."""
        found: list[Any] = []
        for look, names, space in self._looks:
            try:
                found += look(space)
            except KeyError:
                found += [space.get(name) for name in names]
        return found

    def _followed(self, kinds: Iterable[type]) -> Iterator[tuple[str, Space, str]]:
        """Where functions are, and what they are called there."""
        for kind in dict.fromkeys(base for one in kinds for base in one.__mro__):
            if not (kind.__module__.startswith(KINDS) or _package(kind.__module__) in self._own):
                continue
            for name, code in vars(kind).items():
                if isinstance(code, FunctionType) and name not in LEFT_OUT:
                    yield kind.__name__, vars(kind), name
                    yield from self._called(code)
        chosen = AttentionInterface._global_mapping
        yield "ALL_ATTENTION_FUNCTIONS", chosen, STOCK
        yield from self._called(chosen[STOCK])

    def _called(self, function: FunctionType) -> Iterator[tuple[str, Space, str]]:
        """What a function names, and what those name in turn."""
        waiting = [function]
        while waiting:
            code = waiting.pop()
            if code in self._seen:
                continue
            self._seen.add(code)
            inner = [cell.cell_contents for cell in code.__closure__ or () if _filled(cell)]
            waiting += [one for one in inner if isinstance(one, FunctionType)]
            for name in _names(code.__code__):
                known = code.__globals__.get(name)
                if isinstance(known, CODE) and self._reads(code):
                    yield str(code.__module__), code.__globals__, name
                if isinstance(known, FunctionType) and self._reads(known):
                    waiting.append(known)
                if isinstance(vars(layers).get(name), CODE):
                    yield "torch.nn.functional", vars(layers), name

    def _reads(self, code: FunctionType) -> bool:
        """Whether what a function calls is followed."""
        module = code.__module__ or ""
        return module.startswith(READ) or _package(module) in self._own


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: CodeType) -> Iterator[str]:
    """Names in code, and in functions within it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _package(module: str) -> str:
    return module.partition(".")[0]
