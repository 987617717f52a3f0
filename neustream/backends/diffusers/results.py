"""What models return: shared out among requests, compared, and without what cannot be kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from neustream.errors import BackendError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


class Unshareable(Exception):
    """A batch's result cannot be shared out among its calls."""


def rows_of(whole: Any, start: int, stop: int, rows: int, name: str, *, copy: bool) -> Any:
    """The part of a batched result that belongs to rows `start` to `stop`."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or tensor.shape[0] != rows:
            shape = tuple(tensor.shape)
            raise Unshareable(f"it returned a tensor of shape {shape} for {rows} rows")
        return tensor[start:stop].clone() if copy else tensor[start:stop]

    return rebuilt(whole, part)


def rebuilt(whole: Any, part: Callable[[torch.Tensor], torch.Tensor], *, strict: bool = True) -> Any:
    """A model's result with `part` of each of its tensors.

    Other objects (a language model's cache) are withheld: inside of a mapping, or anywhere if not
    `strict`; else they are Unshareable.
    """

    def inner(value: Any) -> Any:
        return rebuilt(value, part, strict=strict)

    if isinstance(whole, torch.Tensor):
        return part(whole)
    if isinstance(whole, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(part(whole.parameters), deterministic=whole.deterministic)
    if isinstance(whole, Mapping):
        return type(whole)(**{key: _field(key, value, inner) for key, value in whole.items()})
    if isinstance(whole, list | tuple):
        return type(whole)(inner(value) for value in whole)
    if whole is None or isinstance(whole, bool | int | float | str | Withheld):
        return whole
    if not strict:
        return Withheld(type(whole).__name__)
    raise Unshareable(f"it returned a {type(whole).__name__}")


def _field(key: str, value: Any, part: Callable[[Any], Any]) -> Any:
    try:
        return part(value)
    except Unshareable:
        if isinstance(value, torch.Tensor):
            raise
        return Withheld(f"{key} ({type(value).__name__})")


def owned(value: Any) -> Any:
    """A result whose tensors have no memory but their own: not that of a batch, with others' rows in it."""
    if isinstance(value, torch.Tensor):
        whole = value.numel() * value.element_size() == value.untyped_storage().nbytes()
        return value if whole else value.clone()
    if isinstance(value, Mapping) and dataclasses.is_dataclass(value):  # diffusers' outputs
        fields = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: owned(getattr(value, name)) for name in fields})
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(owned(value.parameters), deterministic=value.deterministic)
    if type(value) in (list, tuple):
        return type(value)(owned(inner) for inner in value)
    return value


class Withheld:
    """In place of what cannot be shared out of a result (a language model's cache): an error, once it is used."""

    def __init__(self, what: str) -> None:
        self.__dict__["_what"] = what

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise BackendError(f"{self._what} of a result that requests shared is not there for each of them")


def close(alone: Any, together: Any) -> bool:
    if isinstance(alone, torch.Tensor):
        if alone.shape != together.shape:
            return False
        if not alone.is_floating_point():
            return bool(torch.equal(alone, together))
        scale = float(alone.abs().max()) if alone.numel() else 0.0
        return float((alone - together).abs().max()) <= TOLERANCE.get(alone.dtype, HALF_TOLERANCE) * scale
    if isinstance(together, Withheld):
        return True
    if isinstance(alone, DiagonalGaussianDistribution):
        return close(alone.parameters, together.parameters)
    if isinstance(alone, Mapping):
        return all(close(value, together[key]) for key, value in alone.items())
    if isinstance(alone, list | tuple):
        return all(close(a, b) for a, b in zip(alone, together, strict=True))
    return True
