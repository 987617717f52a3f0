"""Values of agents' states as JSON has them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from neustream.errors import told as told_of
from neustream.server.pictures import encoded, is_picture

log = logging.getLogger("neustream.server")

DEEPEST = 32
"""Values in values that are told."""
MOST_NUMBERS = 4096
"""Numbers of an array that are told."""
LONGEST_INT = 4096
"""Bits of a whole number that is told."""


class NoForm(Exception):
    """A value that JSON cannot tell."""


def plain_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What JSON can tell of a state, and the names of what it cannot."""
    told: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in state.items():
        try:
            told[str(name)] = plain(value)
        except NoForm:
            left_out.append(str(name))
        except Exception as error:  # noqa: BLE001  anybody's objects
            log.warning("%r of an agent's state is left out: %s", name, told_of(error))
            left_out.append(str(name))
    return told, left_out


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it; NoForm for what has no form there.

    Pictures are png in base64. Of objects of dataclasses all fields that they show are told, and
    their `text` where they have one; of arrays all numbers, up to `MOST_NUMBERS`.
    """
    if value is None or isinstance(value, bool | int | str):
        return _plainest(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth >= DEEPEST:
        raise NoForm
    if isinstance(value, Mapping):
        return {_plainest(str(name)): plain(each, depth + 1) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _of_fields(value, depth)
    if isinstance(value, list | tuple):
        return [plain(each, depth + 1) for each in value]
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return _of_array(value, depth)
    return _of_picture(value)


def _plainest(value: Any) -> Any:
    """A text or a whole number as it is; NoForm for half a surrogate pair, and for very long numbers."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise NoForm from None
    if isinstance(value, int) and value.bit_length() > LONGEST_INT:
        raise NoForm
    return value


def _of_fields(value: Any, depth: int) -> dict[str, Any]:
    text = getattr(value, "text", None)
    own = {"text": text} if isinstance(text, str) else {}
    shown = {each.name: getattr(value, each.name) for each in fields(value) if each.repr}
    return {name: plain(each, depth + 1) for name, each in {**own, **shown}.items()}


def _of_array(value: Any, depth: int) -> Any:
    """The numbers of an array or a tensor."""
    if math.prod(value.shape) > MOST_NUMBERS:
        raise NoForm
    return plain(value.tolist(), depth + 1)


def _of_picture(value: Any) -> dict[str, str]:
    if not is_picture(value):
        raise NoForm
    return {"b64_json": encoded(value, "png"), "output_format": "png"}
