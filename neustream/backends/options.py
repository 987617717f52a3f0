"""What configs say to backends of all kinds, checked in one way; and how waiting is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from rich.console import Console

from neustream.errors import BackendError

Options = TypeVar("Options", bound=BaseModel)


def options_of(model: type[Options], raw: Mapping[str, Any]) -> Options:
    """A config's `backend` section as `model`; BackendError names the key and what is allowed."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise BackendError(f"backend.{key}: {problem['msg']}; options: {', '.join(model.model_fields)}") from None


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
