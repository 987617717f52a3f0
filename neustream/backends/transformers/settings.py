"""What a model's `generation_config` says, and whether it still does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from neustream.errors import RequestError, shown


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
