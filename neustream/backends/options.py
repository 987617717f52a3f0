"""What configs say to backends of all kinds, checked in one way; and how waiting is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from rich.console import Console

from neustream.errors import BackendError, nearest, shown

Options = TypeVar("Options", bound=BaseModel)


def options_of(model: type[Options], raw: Mapping[str, Any]) -> Options:
    """A config's `backend` section as `model`; BackendError names the key, its value and what is allowed."""
    for key, value in raw.items():
        if isinstance(value, bool) and key in model.model_fields and _is_a_number(model.model_fields[key].annotation):
            raise BackendError(f"backend.{key} must be a number, got {value}")
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            why = f"unknown key 'backend.{key}'; {nearest(key, model.model_fields)}"
        elif problem["type"] == "missing":
            why = f"key 'backend.{key}' is needed"
        else:
            why = f"backend{'.' * bool(key)}{key}: {problem['msg']}, got {shown(problem['input'])}"
        raise BackendError(why) from None


def _is_a_number(kind: Any) -> bool:
    """Whether an option of this kind is a number; pydantic takes a truth value for one."""
    kinds = {kind, *get_args(kind)}
    return bool(kinds & {int, float}) and bool not in kinds


@contextlib.contextmanager
def measuring(what: str, show: bool) -> Iterator[Callable[[str, int, float], None]]:
    """A line on stderr that tells which step is being measured: stage, batch and seconds."""
    if not show:
        yield lambda stage, batch, seconds: None
        return
    console = Console(stderr=True)
    with console.status(what) as status:
        yield lambda stage, batch, seconds: status.update(f"{what}: {stage}, batch {batch}, {seconds * 1e3:.1f} ms")
    console.print(f"{what}: done")
