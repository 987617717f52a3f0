"""What the stock call has against its arguments, before it uses a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from neustream.backends.diffusers.arguments import LABELS, check_arguments, check_labels
from neustream.backends.diffusers.extent import MOST_PIXELS, check_extent
from neustream.backends.diffusers.lengths import check_lengths
from neustream.backends.diffusers.request import without_side_effects
from neustream.backends.diffusers.signatures import signature_of
from neustream.backends.diffusers.standins import dry
from neustream.backends.diffusers.stepping import is_stepped


class _Reached(BaseException):
    """The stock call accepted its arguments and went on to a model."""


QUIET = frozenset(("parameters", "named_parameters", "buffers", "state_dict"))
"""Methods of models that change nothing and compute nothing."""


class _Wall:
    """A component that ends a dry run when it is used: when it, or a method of its, is called."""

    def __init__(self, component: Any) -> None:
        self.__dict__["_component"] = component

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._component)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached

    def __bool__(self) -> bool:
        return bool(self._component)

    def __len__(self) -> int:
        return len(self._component)

    def __iter__(self) -> Iterator[Any]:
        return map(_walled, self._component)

    def __getitem__(self, at: Any) -> Any:
        return _walled(self._component[at])

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._component, name)
        if isinstance(value, torch.nn.Module):
            return _Wall(value)
        if callable(value) and name not in QUIET and not isinstance(value, type):
            return _reached
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Reached


def _walled(value: Any) -> Any:
    return _Wall(value) if isinstance(value, torch.nn.Module) else value


def _reached(*args: Any, **kwargs: Any) -> Any:
    raise _Reached


def _last_label(pipe: DiffusionPipeline) -> int | None:
    """The last class that a pipeline's denoiser knows (the one of no class); None: it cannot be told."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    last = getattr(config, "num_embeds_ada_norm", None)
    return last if isinstance(last, int) else None


def check(
    pipe: DiffusionPipeline, named: Mapping[str, Any], device: torch.device, max_pixels: int = MOST_PIXELS
) -> dict[str, Any]:
    """Let the stock call look at its arguments, up to where it would use a tokenizer or a model on `device`.

    Returns them with the pipeline's defaults for the others. Raises what the call raises; RequestError for
    what no pipeline takes (`check_arguments`), and for more than `max_pixels` (`check_extent`).
    """
    signature = signature_of(pipe)
    whole = {**signature.defaults, **named}
    check_arguments(named, signature, device)
    check_labels(named.get(LABELS), _last_label(pipe))
    check_lengths(type(pipe), whole)
    check_extent(pipe, whole, max_pixels)
    view = copy.copy(pipe)
    view.__class__ = dry(pipe.__class__)
    own = view.__dict__
    own["_neustream_device"] = device
    own["_neustream_stepped"] = {name: value for name, value in own.items() if is_stepped(value)}
    for name, value in list(own.items()):
        if isinstance(value, torch.nn.Module | PreTrainedTokenizerBase | DiffusionPipeline):
            own[name] = _Wall(value)
        elif name in own["_neustream_stepped"]:
            del own[name]  # it is copied if the call looks at it
    with contextlib.suppress(_Reached):
        view(**without_side_effects(named, whole))
    return whole
