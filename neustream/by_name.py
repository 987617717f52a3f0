"""Objects by the names that configs and callers give them: policies, and `module:name` of any kind.

The one place where a policy is made of a name: for configs, for services, for vLLM's settings.
Whatever is wrong is a ConfigError that names the thing, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from neustream.core.policies import DEFAULT, POLICIES
from neustream.core.policy import Policy
from neustream.errors import ConfigError, cut, nearest, one_line, shown, told

ALIAS = "default"
"""The name of the policy that is meant where none is named."""


def make_policy(
    policy: Policy | str | None = None,
    parameters: Mapping[str, Any] = {},
    *,
    where: str = "policy",
    ready: Mapping[str, Any] = {},
) -> Policy:
    """A policy, by name with parameters, or as it is.

    Args:
        policy: one of `POLICIES` by name, "default" or None, `module:Class`, or an object with
            `decide(view)`.
        parameters: of one by name; those of a dataclass are checked against its fields.
        where: what errors say of the place where the parameters stand.
        ready: parameters that are objects already; the policy gets those that it has.

    Raises:
        ConfigError: there is no such policy or parameter, a value is of the wrong type, or making
            it raised.
    """
    if policy is not None and not isinstance(policy, str):
        return _checked_object(policy, parameters)
    name = ALIAS if policy is None else policy
    make = policy_class(name)
    names = parameters_of(make)
    given = dict(parameters)
    if names is not None:
        given = _checked(where, make, names, parameters)
        given |= {key: value for key, value in ready.items() if key in names}
    made: Policy = _made(where, make, given)
    if not callable(getattr(made, "decide", None)):
        raise ConfigError(f"policy {name!r} makes a {_kind(made)}, which has no decide(view)")
    return made


def make_rule(
    what: str,
    known: Mapping[str, Callable[..., Any]],
    name: str,
    parameters: Mapping[str, Any],
    method: str,
) -> Any:
    """A rule of a cluster, by name with parameters: one of `known`, or `module:Class`.

    Raises:
        ConfigError: as of `make_policy`.
    """
    where = f"cluster.{what}.{name}"
    if name in known:
        make = known[name]
    elif ":" in name:
        make = load_object(name, what)
    else:
        hint = f"{nearest(name, known)}; or module:Class for one of your own"
        raise ConfigError(f"unknown {what} {shown(name)}; {hint}")
    names = parameters_of(make)
    given = dict(parameters) if names is None else _checked(where, make, names, parameters)
    made = _made(where, make, given)
    if not callable(getattr(made, method, None)):
        raise ConfigError(f"{what} {name!r} makes a {_kind(made)}, which has no {method}(fleet)")
    return made


def only_rule(
    what: str, known: Mapping[str, Callable[..., Any]], given: Mapping[str, Mapping[str, Any]], method: str
) -> Any:
    """The rule of a section that names at most one, with its parameters; None if it names none."""
    for name, parameters in given.items():
        return make_rule(what, known, name, parameters, method)
    return None


def _made(where: str, make: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What `make` makes; ConfigError for whatever it raises."""
    try:
        return make(**given)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: making it raised {told(error)}") from error


def policy_class(name: str) -> Callable[..., Policy]:
    """What makes the policy of a name; ConfigError if there is none."""
    kind = DEFAULT if name == ALIAS else name
    if kind in POLICIES:
        return POLICIES[kind]
    if ":" in name:
        make: Callable[..., Policy] = load_object(name, "policy")
        return make
    hint = f"{nearest(name, [*POLICIES, ALIAS])}; or module:Class for one of your own"
    raise ConfigError(f"unknown policy {shown(name)}; {hint}")


def parameters_of(make: Callable[..., Policy]) -> list[str] | None:
    """The parameters of a policy, if it is a dataclass; None if it does not tell them."""
    if not dataclasses.is_dataclass(make):
        return None
    return [field.name for field in dataclasses.fields(make) if field.init]


def load_object(path: str, what: str) -> Any:
    """The object at `package.module:name`.

    Raises:
        ConfigError: it cannot be imported, whatever its module raises.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {shown(path)}: {cut(one_line(error), 200)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {path!r}: its module raised {told(error)}") from error


def _checked_object(policy: Any, parameters: Mapping[str, Any]) -> Policy:
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        got = f"the class {policy.__name__}" if isinstance(policy, type) else shown(policy)
        names = ", ".join(sorted([*POLICIES, ALIAS]))
        raise ConfigError(
            f"policy must be an object with decide(view), a name or module:Class, got {got}; names: {names}"
        )
    if parameters:
        raise ConfigError(f"policy {_kind(policy)} is made already and takes no parameters")
    made: Policy = policy
    return made


def _checked(
    where: str, make: Callable[..., Policy], names: list[str], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters as the types of a policy's fields."""
    if unknown := [key for key in parameters if key not in names]:
        hint = nearest(unknown[0], names)
        raise ConfigError(f"{where}: unknown parameter {shown(unknown[0])}; {hint}")
    if not parameters:
        return {}
    try:
        hints = typing.get_type_hints(make)
    except NameError as error:
        raise ConfigError(f"{where}: the types of its parameters: {error}") from None
    checked = {}
    for key, value in parameters.items():
        checked[key] = _of_type(f"{where}.{key}", hints[key], value)
    return checked


def _of_type(where: str, hint: Any, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg']}, got {shown(value)}") from None
    except PydanticUserError:  # of a type that no text can be read as
        raise ConfigError(f"{where}: cannot be given by name; it is a {shown(hint)}") from None


def _kind(policy: object) -> str:
    return type(policy).__name__
