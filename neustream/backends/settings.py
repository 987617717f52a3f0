"""Numbers and switches that calls of a model of transformers read as they run: of its modules and its configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from transformers import PreTrainedModel

from neustream.errors import shown

SIMPLE = (bool, int, float)
NO_RESULT = frozenset(("training", "gradient_checkpointing", "use_cache", "return_dict"))
"""What is compared elsewhere, or changes no token."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""What a config says to `generate` alone."""


class Settings:
    """Settings of a model, to be compared with what they were; strings and containers are none.

    Modules that compute tables anew as they run, and set numbers by that, have none either.

    Args:
        whose: what messages call the model.
    """

    def __init__(self, model: PreTrainedModel, whose: str = "") -> None:
        modules = [(name, own, _names(own, SIMPLE)) for name, own in _owners(model, whose)]
        configs = {id(own): (name, own, _names(own, (*SIMPLE, type(None)))) for name, own in _configs(model, whose)}
        self._owners = [one for one in (*modules, *configs.values()) if one[2]]
        self._look_at()

    def _look_at(self) -> None:
        self._reads = [(itemgetter(*names), own) for _, own, names in self._owners]

    def now(self) -> list[Any]:
        """Their values: of each module and config, in the order of their names."""
        try:
            return [read(own) for read, own in self._reads]
        except KeyError:  # one of them is gone
            return [[own.get(key) for key in names] for _, own, names in self._owners]  # lists: no values of before

    def settle(self, before: list[Any]) -> None:
        """Leave out what a call of the model has changed since `before`."""
        moved = {(name, key) for name, key, _, _ in self._others(before)}
        kept = [(name, own, [key for key in names if (name, key) not in moved]) for name, own, names in self._owners]
        self._owners = [one for one in kept if one[2]]
        self._look_at()

    def told(self, before: list[Any]) -> str:
        """The first that is another now than `before`."""
        for name, key, old, new in self._others(before):
            return f"{name}.{key} was {shown(old)} and is {shown(new)}"
        return "a setting was another one for a moment"

    def _others(self, before: list[Any]) -> Iterator[tuple[str, str, Any, Any]]:
        for (name, own, names), values in zip(self._owners, before, strict=True):
            olds = values if len(names) > 1 else [values]
            for key, old in zip(names, olds, strict=True):
                if own.get(key) != old:
                    yield name, key, old, own.get(key)


def _names(own: Mapping[str, Any], kinds: tuple[type, ...]) -> list[str]:
    """The names of an object's settings."""
    public = [key for key in own if not key.startswith(("_", "output_")) and key not in NO_RESULT]
    return [key for key in public if isinstance(own[key], kinds) and "cached" not in key and key not in TOKENS]


def computes_anew(module: torch.nn.Module) -> bool:
    """Whether its tables are its own business: angles that a forward computes anew for longer texts."""
    kinds = getattr(module, "rope_type", "")
    some = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in some)


def _owners(model: PreTrainedModel, whose: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules(prefix=whose):
        if not computes_anew(module):
            yield name or "the model", vars(module)


def _configs(model: PreTrainedModel, whose: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each config as often as it is found, the best name last."""
    for name, module in reversed(list(model.named_modules(prefix=whose))):
        config = vars(module).get("config")
        if hasattr(config, "get_text_config"):
            yield f"{name}.config" if name else "config", vars(config)
