"""Texts of options of `neustream bench`, read; what is wrong is a ConfigError that names the option."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

from neustream.errors import ConfigError, shown
from neustream.workload.numbers import positive


def option(help: str, names: Sequence[str] = (), **more: Any) -> Any:
    """An option with its help, and its names where the field's is not enough."""
    return typer.Option(*names, help=help, **more)


def pair(name: str, text: str, between: str) -> tuple[str, str]:
    """A key and its value, as `ttft:200`."""
    key, found, value = text.partition(between)
    if not found or not key.strip():
        raise ConfigError(f"{name} {shown(text)}: expected NAME{between}VALUE")
    return key.strip(), value.strip()


def whole(name: str, text: str, least: int = 1) -> int:
    """A whole number."""
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if found < least:
        raise ConfigError(f"{name} {shown(text)}: expected a whole number, at least {least}")
    return found


def share(name: str, given: Any) -> float:
    """A number from 0 to 1."""
    try:
        found = -1.0 if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        found = -1.0
    if not 0 <= found <= 1:
        raise ConfigError(f"{name} {shown(str(given))}: expected a number from 0 to 1")
    return found


def object_of(name: str, text: str) -> dict[str, Any]:
    """An object of JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} {shown(text)}: expected an object of JSON")
    return found


def weighted(name: str, text: str) -> Sequence[tuple[str, float]]:
    """Values with commas between them, each with a weight behind a colon, or of weight 1."""
    found = []
    for each in text.split(","):
        value, colon, weight = each.partition(":")
        found.append((value.strip(), positive(name, weight) if colon else 1.0))
    return found


def size(text: str) -> tuple[int, int]:
    """Width and height of an image, as `512x256`."""
    width, _, height = text.lower().partition("x")
    return whole("--image-sizes", width), whole("--image-sizes", height)
