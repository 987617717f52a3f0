"""Prompts with images in forward calls: what was seen goes in at the places of image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from neustream.backends.transformers.slots import Call

if TYPE_CHECKING:
    from neustream.backends.transformers.still import Decodes


def inputs_of(model: PreTrainedModel, call: Call | Decodes) -> dict[str, Any]:
    """Tokens and positions of a call, as the model takes them; where there are images, embeddings."""
    if all(row.sight is None for row in call.rows):
        return {"input_ids": call.ids, "position_ids": call.positions}
    assert isinstance(call, Call)
    looking = [(*place, place[0].sight) for place in call.places() if place[0].sight is not None]
    return {**_embedded(model, call, looking), "position_ids": _positions(call, looking)}


def _embedded(model: PreTrainedModel, call: Call, looking: list[Any]) -> dict[str, Any]:
    """The tokens, as embeddings if there are images among them."""
    images = [(lane, first, *sight.columns(row.start, row.end)) for row, lane, first, sight in looking]
    if not any(len(columns) for _, _, columns, _ in images):
        return {"input_ids": call.ids}
    ids = call.ids
    for lane, first, columns, _ in images:  # an image token may have no embedding
        ids[lane, first + columns.to(ids.device)] = 0
    embeddings = model.get_input_embeddings()(ids)
    for lane, first, columns, seen in images:
        embeddings[lane, first + columns.to(ids.device)] = seen.to(embeddings)
    return {"inputs_embeds": embeddings}


def _positions(call: Call, looking: list[Any]) -> torch.Tensor:
    """[lanes, tokens]; with rows and columns of images: [3, lanes, tokens]."""
    if all(sight.positions is None for *_, sight in looking):
        return call.positions
    positions = call.positions.expand(3, -1, -1).clone()
    for row, lane, first, sight in looking:
        positions[:, lane, first:] = sight.angles(row.start, row.end).to(positions)
    return positions
