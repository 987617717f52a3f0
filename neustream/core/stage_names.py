"""Which stages are meant by names of stages, of roles and of models."""

from __future__ import annotations

from collections.abc import Iterable

ENDS = (".", "@", "/")
"""What follows the name of a model or a role in that of a stage: chat.decode, encode@512."""


def named(stage: str, names: Iterable[str] | None) -> bool:
    """Whether a stage is one of `names`: its own, its role's or its model's. None: all are."""
    if names is None:
        return True
    for name in names:
        if stage == name or stage.startswith(tuple([name + end for end in ENDS])):
            return True
    return False
