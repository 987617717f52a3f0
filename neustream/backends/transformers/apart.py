"""Processors of callers, which may keep something from token to token: each request has its own.

What a request gets is a copy, as the caller's object was when it was asked, so that nothing of one
text is in another. Models, tokenizers, modules and classes are not copied; of functions, what they
enclose is. An object that cannot be copied is used as it is, by one open request at a time.
"""

from __future__ import annotations

import io
import pickle
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neustream.backends.transformers.sampling import Processor
from neustream.errors import RequestError

SHARED = (
    type,
    types.ModuleType,
    types.CodeType,
    types.BuiltinFunctionType,
    torch.nn.Module,
    torch.dtype,
    torch.device,
    PreTrainedTokenizerBase,
)
"""What copies refer to as the originals do."""


OF_EACH = "give each request its own"
OF_ONE = (
    "sequences of one prompt need copies: let copy it (`__reduce__`), or ask for each by itself, with a seed and "
    "a processor of its own"
)
"""What callers can do about a processor that cannot be copied."""


class _AsItIs:
    """Something that is not copied."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Writer(pickle.Pickler):
    """Writes an object down, but for what is shared: that is kept beside, in order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.beside: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, _AsItIs):
            value = value.value
        elif not isinstance(value, SHARED) and not _keeps_nothing(value):
            return None
        self.beside.append(value)
        return len(self.beside) - 1

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            about = (value.__code__, value.__globals__, value.__name__)
            own = (value.__defaults__, value.__kwdefaults__, value.__dict__)
            return _function, (_AsItIs(about), value.__closure__), own, None, None, _fill
        if isinstance(value, types.CellType):
            return types.CellType, (), _content(value), None, None, _put
        if isinstance(value, torch.Generator):
            return torch.Generator, (value.device,), value.get_state(), None, None, torch.Generator.set_state
        return NotImplemented


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, beside: Sequence[Any]) -> None:
        super().__init__(file)
        self._beside = beside

    def persistent_load(self, place: int) -> Any:
        return self._beside[place]


class Owners:
    """Which objects open requests have to themselves; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Any] = {}

    def take(
        self, processors: Sequence[Processor], *, several: bool = False
    ) -> tuple[tuple[Processor, ...], Callable[[], None]]:
        """A request's own of some processors, and what is called once it is over.

        RequestError if one cannot be copied, and another open request has it. `several`: that is
        asked for together with this one, so that its caller cannot give each its own.
        """
        if not processors:
            return (), _nothing
        try:
            return copied(tuple(processors)), _nothing
        except Exception:  # noqa: BLE001  whatever keeps an object of the caller's from being copied
            return tuple(processors), self._hold(processors, OF_ONE if several else OF_EACH)

    def _hold(self, processors: Sequence[Processor], advice: str) -> Callable[[], None]:
        mine = {id(one): one for one in processors}
        with self._lock:
            for key, one in mine.items():
                if key in self._held:
                    raise RequestError(
                        f"processors: a {type(one).__name__} cannot be copied, and another open request has it: what "
                        f"it keeps of one text would be in the other; {advice}"
                    )
            self._held |= mine
        return lambda: self._leave(mine)

    def _leave(self, mine: dict[int, Any]) -> None:
        with self._lock:
            for key in mine:
                self._held.pop(key, None)


owners = Owners()
"""Of all models that are served in this process: a request may move from one to another."""


def copied(value: tuple[Processor, ...]) -> tuple[Processor, ...]:
    """A copy, with nothing in common but what is shared; raises what keeps it from being copied."""
    file = io.BytesIO()
    writer = _Writer(file)
    writer.dump(value)
    file.seek(0)
    found: tuple[Processor, ...] = _Reader(file, writer.beside).load()
    return found


def _nothing() -> None:
    """What there is to do for copies."""


def _keeps_nothing(value: Any) -> bool:
    """Whether it is a function with nowhere to keep anything."""
    if not isinstance(value, types.FunctionType):
        return False
    return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__ or value.__dict__)


def _function(about: tuple[Any, ...], enclosed: tuple[types.CellType, ...] | None) -> types.FunctionType:
    """A function like another, that encloses these."""
    code, world, name = about
    return types.FunctionType(code, world, name, None, enclosed)


def _fill(function: types.FunctionType, own: tuple[Any, ...]) -> None:
    """Give a function its defaults and attributes."""
    function.__defaults__, function.__kwdefaults__, attributes = own
    function.__dict__.update(attributes)


def _content(cell: types.CellType) -> tuple[Any, ...]:
    """What a cell holds; empty: nothing as yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _put(cell: types.CellType, content: tuple[Any, ...]) -> None:
    for value in content:
        cell.cell_contents = value
