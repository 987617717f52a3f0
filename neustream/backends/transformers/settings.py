"""Numbers and switches that a model's calls read as they run: of its modules, its configs, and for texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from transformers import PreTrainedModel

from neustream.errors import RequestError, shown

SIMPLE = (bool, int, float)
NO_RESULT = frozenset(("training", "gradient_checkpointing", "use_cache", "return_dict"))
"""What is compared elsewhere, or changes no token."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""What a config says to `generate` alone."""


class Settings:
    """Settings of a model, to be compared with what they were; strings and containers are none.

    Args:
        anew: modules that set some of theirs as they run.
    """

    def __init__(self, model: PreTrainedModel, anew: frozenset[int]) -> None:
        modules = [(name, own, _names(own, SIMPLE)) for name, own in _owners(model) if id(own) not in anew]
        configs = {id(own): (name, own, _names(own, (*SIMPLE, type(None)))) for name, own in _configs(model)}
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


class OfTexts:
    """What `generation_config` says, which is read once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._before = copy.deepcopy(self._now())  # lists may be written to

    def check(self) -> None:
        """RequestError if it says something else now."""
        now = self._now()
        if now == self._before:
            return
        name = type(self._model).__name__
        for key in now.keys() | self._before.keys():
            old, new = self._before.get(key), now.get(key)
            if old != new:
                raise RequestError(
                    f"{name} was changed while it is served: generation_config.{key} was {shown(old)} and is "
                    f"{shown(new)}; give it as an argument, or close the service first, then serve it again"
                )

    def _now(self) -> Mapping[str, Any]:
        said: Any = getattr(self._model, "generation_config", None)
        own = {} if said is None else vars(said)
        return {key: _plain(value) for key, value in own.items() if not key.startswith("_")}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # numpy, torch


def _names(own: Mapping[str, Any], kinds: tuple[type, ...]) -> list[str]:
    """The names of an object's settings."""
    public = [key for key in own if not key.startswith(("_", "output_")) and key not in NO_RESULT]
    return [key for key in public if isinstance(own[key], kinds) and "cached" not in key and key not in TOKENS]


def _owners(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules():
        yield name or "the model", vars(module)


def _configs(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each config as often as it is found, the best name last."""
    for name, module in reversed(list(model.named_modules())):
        config = vars(module).get("config")
        if hasattr(config, "get_text_config"):
            yield f"{name}.config" if name else "config", vars(config)
