"""What a stock model says of itself: its arguments, positions, embeddings, and where its texts end."""

from __future__ import annotations

import inspect
from collections.abc import Sequence, Set
from typing import Any

from transformers import PreTrainedModel

from neustream.backends.transformers.masks import NotShared
from neustream.backends.values import whole
from neustream.errors import BackendError, shown

CACHE_NAMES = ("cache", "past_key_values")
"""What models call the cache that they are given, newest name first."""


def arguments_of(model: PreTrainedModel) -> tuple[str, bool]:
    """What the model's forward calls its cache, and whether it can leave out logits.

    NotShared: it takes too little for requests of different lengths to share a call.
    """
    accepted = inspect.signature(model.forward).parameters
    missing = [key for key in ("position_ids", "attention_mask") if key not in accepted]
    cache = next((key for key in CACHE_NAMES if key in accepted), None)
    if cache is not None and not missing:
        return cache, "logits_to_keep" in accepted
    if cache is None:
        missing.append(" or ".join(CACHE_NAMES))
    raise NotShared(f"it takes no {', '.join(missing)}")


def positions_of(config: Any) -> int | None:
    """How many positions a config says that there are; None: it does not, or as many as one likes."""
    return _count(config, "max_position_embeddings", "max_decoder_position_embeddings")


def read_of(config: Any, positions: int | None) -> int | None:
    """How many positions an encoder has for the prompt; None: there is no encoder, or it has as many as one likes.

    `positions`: of its decoder; most encoders have as many.
    """
    if not config.is_encoder_decoder:
        return None
    return _count(config, "max_encoder_position_embeddings") or positions


def _count(config: Any, *names: str) -> int | None:
    """The first of these that a config says, as a count."""
    said = (getattr(config, name, None) for name in names)
    return next((one for one in said if isinstance(one, int) and one > 0), None)


def length_of(name: str, positions: int | None, read: int | None, max_len: int | None) -> int:
    """Tokens of one request, at most; BackendError for what is none, or more than there are positions.

    `read`: an encoder has so many positions for the prompt; `positions` are for outputs then.
    """
    there = positions + (read or 0) if positions is not None else None
    if max_len is None:
        if there is None:
            raise BackendError(f"{name} does not say how many positions it has: give max_len")
        return there
    max_len = whole("max_len", max_len, 2, allowed="a whole number of 2 or more", error=BackendError)
    if there is not None and max_len > there:
        raise BackendError(f"max_len={shown(max_len)}, but {name} has {told_positions(positions, read)}")
    return max_len


def told_positions(positions: int | None, read: int | None) -> str:
    """How many positions there are, in words."""
    return f"{positions} positions" if read is None else f"{read} positions for the prompt and {positions} for outputs"


def lengths_of(name: str, config: Any, max_len: int | None) -> tuple[int | None, int | None, int, int]:
    """Positions of a model and of its encoder, tokens of one request at most, and of one in one half of the model."""
    positions = positions_of(config.get_text_config(decoder=True))
    read = read_of(config, positions)
    length = length_of(name, positions, read, max_len)
    return positions, read, length, min(some for some in (length, positions, read) if some is not None)


def logits_bytes(model: PreTrainedModel, slots: int) -> int:
    """What a step of so many texts takes at least: its logits, as the model gives them and in float32."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    own: int = model.dtype.itemsize
    return slots * vocabulary * (own + 4)


def known_of(model: PreTrainedModel, vocabulary: int) -> int:
    """How many tokens the model has embeddings of: the first ones of its vocabulary."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return vocabulary if weight is None else min(vocabulary, len(weight))


def eos_of(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which the model's own `generate` ends; BackendError for what are no token ids."""
    found: Any = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if found is None:
        return frozenset()
    ids = found.tolist() if hasattr(found, "tolist") else found  # numpy, torch
    some = list(ids) if isinstance(ids, Sequence | Set) and not isinstance(ids, str) else [ids]
    wrong = f"eos_token_id of {type(model).__name__}: a token id"
    return frozenset([whole(wrong, one, 0, error=BackendError) for one in some])
