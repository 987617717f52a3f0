"""Options that several commands take, as dataclasses; and flags spelt as other tools have them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from typer.core import TyperCommand


def taking(*kinds: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets an instance of each dataclass, whose fields are options beside its own ones."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[len(kinds) :]
        shared = [_parameter(field, kind) for kind in kinds for field in dataclasses.fields(kind)]

        @functools.wraps(function)
        def command(**given: Any) -> None:
            chosen = [
                kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)}) for kind in kinds
            ]
            function(*chosen, **given)

        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in [*own, *shared]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        del command.__wrapped__
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], kind: type[Any]) -> inspect.Parameter:
    hint = get_type_hints(kind, include_extras=True)[field.name]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)


class Flags(TyperCommand):
    """Flags may have underscores for dashes, and those that may be given several times several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        return super().parse_args(ctx, _spelt(args, several))


def _spelt(args: list[str], several: set[str]) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(args):
        name, equals, value = args[at].partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        found.append(f"{name}{equals}{value}")
        at += 1
        if name in several and not equals:
            values = 0
            while at < len(args) and not args[at].startswith("-"):
                found += [name] * (values > 0) + [args[at]]
                values, at = values + 1, at + 1
    return found
