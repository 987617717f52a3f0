"""How far back each kind of a model's layers looks: windows, chunks or everything, as masks of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from neustream.errors import BackendError

if TYPE_CHECKING:
    from neustream.backends.transformers.slots import Call
    from neustream.backends.transformers.still import Decodes

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""What configs call layers that look at everything, at so many tokens, and at a chunk of so many."""
DUMMY = getattr(cache_utils, "DummyLayer", None)
"""A layer that reads what another one keeps; transformers before 5.20 leaves it out of the cache."""


class NotShared(BackendError):
    """Why requests of a model cannot have their keys and values in common slots."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer looks: `window` keys, the own one among them; or the own chunk of so many."""

    window: int
    chunked: bool = False

    def within(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Which `keys` [keys] are near enough to queries at `positions` [lanes, queries]: [lanes, 1, queries, keys]."""
        at = positions[:, :, None]
        near = keys // self.window == at // self.window if self.chunked else keys > at - self.window
        return near[:, None]


class Masks:
    """The masks of one model's calls, as its forward takes them.

    Args:
        reaches: by the config's names of layer types; None: it looks at everything. Where all are the
            same, forwards get that one mask; else a dict of one for each type.
        dtype: of masks that are added to scores; None: they are booleans.
    """

    def __init__(self, reaches: Mapping[str, Reach | None], dtype: torch.dtype | None) -> None:
        self.reaches = reaches
        self._dtype = dtype

    @property
    def plain(self) -> bool:
        """Whether all layers look at everything."""
        return all(reach is None for reach in self.reaches.values())

    def of(self, call: Call | Decodes) -> torch.Tensor | dict[str, torch.Tensor]:
        """Which keys each query of a call sees, [lanes, 1, queries, keys], of each type of layers."""
        seen = call.mask()
        keys = torch.arange(seen.shape[-1], device=seen.device)
        kinds = dict.fromkeys(self.reaches.values())
        masks = {
            reach: self._as_taken(seen if reach is None else seen & reach.within(keys, call.positions))
            for reach in kinds
        }
        if len(kinds) == 1:
            return masks[next(iter(kinds))]
        return {name: masks[reach] for name, reach in self.reaches.items()}

    def _as_taken(self, mask: torch.Tensor) -> torch.Tensor:
        if self._dtype is None:
            return mask
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill(~mask, torch.finfo(self._dtype).min)


def layers_of(model: Any) -> Sequence[Any]:
    """The layers of the cache that the stock library makes for a model; NotShared if it makes none."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise NotShared("it has an encoder or cross-attention")
    try:
        layers: Sequence[Any] = DynamicCache(config=config).layers
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotShared(f"transformers has no cache for it: {type(error).__name__}: {error}") from error
    if not layers:
        raise NotShared("its cache has no layers that keep keys and values")
    return layers


def masks_of(model: Any, length: int, dtype: torch.dtype | None) -> Masks:
    """The masks of a model whose texts have up to `length` tokens.

    NotShared: a layer keeps anything but keys and values of tokens.
    """
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    reaches: dict[str, Reach | None] = {}
    for at, layer in enumerate(layers_of(model)):
        if DUMMY is not None and type(layer) is DUMMY:
            continue
        window = _window(at, layer)
        kind = types[at] if at < len(types) else SLIDING if window else FULL
        reach = Reach(window, kind == CHUNKED) if 0 < window < length else None
        if reaches.setdefault(kind, reach) != reach:
            raise NotShared(f"its layers of type {kind!r} look back in several ways")
    return Masks(reaches, dtype)


def _window(at: int, layer: Any) -> int:
    """Tokens of which a stock layer keeps keys and values; 0: all."""
    if type(layer) is DynamicLayer:
        return 0
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise NotShared(f"layer {at} of its cache is a {type(layer).__name__}, and slots hold keys and values only")
