"""What a vision-language model does with images: its tower, its image tokens, their positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from neustream.backends.torch import OUT_OF_MEMORY, free_cached
from neustream.backends.transformers.sight import Sight, digest_of
from neustream.errors import BackendError, RequestError, StageFailed, told

BATCHED = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
"""What towers take of images; of several requests, one behind the other."""
BLOCKS = "token_type_ids"
"""Models that take these let the tokens of an image see each other."""
FLAT = ("idefics2", "idefics3", "smolvlm")
"""Model types whose images of one prompt are in the second dimension."""


class Eyes:
    """The vision tower of a stock model.

    Args:
        model: it has `get_image_features`, as vision-language models of transformers do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.name = model, type(model).__name__
        self.token: int = image_token(model)
        towers = inspect.signature(model.get_image_features).parameters
        inner = inspect.signature(getattr(model, "model", model).get_image_features).parameters
        self.takes = [name for name in BATCHED if name in towers or name in inner]
        self._kind = model.config.model_type
        self._blocks = BLOCKS in inspect.signature(model.forward).parameters
        self._turns = hasattr(getattr(model, "model", None), "get_rope_index")

    @property
    def blocks(self) -> bool:
        """Whether the tokens of an image see each other."""
        return self._blocks

    def sight(self, ids: Sequence[int], inputs: Mapping[str, Any]) -> Sight:
        """The images of a prompt, from what the processor made of them; RequestError for what is no image."""
        given = {name: _tensor(name, inputs[name]) for name in self.takes if inputs.get(name) is not None}
        if "pixel_values" not in given:
            raise RequestError(f"images for {self.name} need pixel_values, got {sorted(inputs)}")
        there = torch.tensor(list(ids)) == self.token
        places = there.nonzero()[:, 0]
        if not len(places):
            raise RequestError(f"there are images, but no image token ({self.token}) of {self.name} is in the prompt")
        positions, behind = self._positions(ids, there, given)
        return Sight(given, digest_of(given), places, None, positions, behind, _blocks(there) if self._blocks else None)

    def _positions(
        self, ids: Sequence[int], there: torch.Tensor, given: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, int]:
        """Positions [3, tokens] of a prompt, and what is added behind it; where tokens have only places: None, 0."""
        if not self._turns:
            return None, 0
        inner: Any = self.model.model
        try:
            found, behind = inner.get_rope_index(
                torch.tensor([list(ids)]), there.long()[None], image_grid_thw=given.get("image_grid_thw")
            )
        except Exception as error:  # image tokens that are not those of the images
            raise RequestError(f"the image tokens do not fit the images: {told(error)}") from error
        return found[:, 0], int(behind[0, 0])

    @torch.inference_mode()
    def look(self, sights: Sequence[Sight]) -> list[torch.Tensor | StageFailed]:
        """What the tower makes of each one's images, [image tokens, width] on the CPU; those alike in one call."""
        found: list[torch.Tensor | StageFailed | None] = [None] * len(sights)
        groups: dict[object, list[int]] = {}
        for at, sight in enumerate(sights):
            groups.setdefault(self._alike(sight), []).append(at)
        for group in groups.values():
            for at, one in zip(group, self._together([sights[at] for at in group]), strict=True):
                found[at] = one
        return [one for one in found if one is not None]

    # -- inside -----------------------------------------------------------------------------------

    def _alike(self, sight: Sight) -> object:
        """Sights of which this is the same can share a call."""
        joined = 1 if self._kind in FLAT else 0
        shapes = [(name, *x.shape[:joined], *x.shape[joined + 1 :]) for name, x in sorted(sight.inputs.items())]
        return tuple(shapes)

    def _together(self, sights: Sequence[Sight]) -> list[torch.Tensor | StageFailed]:
        """One call of the tower; smaller ones where memory lacks. If it raises or does not fit, each has its own."""
        counts = [sight.count for sight in sights]
        try:
            seen = self._call(sights)
            if len(seen) != sum(counts):
                raise StageFailed(f"its images make {len(seen)} tokens, and {sum(counts)} places are in the prompt")
            return list(seen.split(counts))
        except OUT_OF_MEMORY as error:
            why = f"out of memory: {told(error)}"
        except Exception as error:  # noqa: BLE001  of one of these images
            if len(sights) > 1:
                return [one for sight in sights for one in self._together([sight])]
            return [error if isinstance(error, StageFailed) else StageFailed(f"the tower raised {told(error)}")]
        if len(sights) == 1:
            return [StageFailed(f"the tower has images of {counts[0]} tokens, {why}")]
        free_cached(self.model.device)
        middle = len(sights) // 2
        return self._together(sights[:middle]) + self._together(sights[middle:])

    def _call(self, sights: Sequence[Sight]) -> torch.Tensor:
        joined = 1 if self._kind in FLAT else 0
        device = self.model.device
        inputs = {name: torch.cat([sight.inputs[name] for sight in sights], joined) for name in sights[0].inputs}
        out = self.model.get_image_features(**{name: value.to(device) for name, value in inputs.items()})
        if getattr(out, "deepstack_features", None) is not None:
            raise StageFailed("what it sees goes into inner layers too, and not into its embeddings alone")
        seen: Any = getattr(out, "pooler_output", out)
        if isinstance(seen, list | tuple):
            seen = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen])
        features: torch.Tensor = seen.reshape(-1, seen.shape[-1]).cpu()
        return features


def eyes_of(model: PreTrainedModel) -> Eyes | None:
    """The model's eyes, if it has any."""
    return Eyes(model) if hasattr(model, "get_image_features") else None


def image_token(model: PreTrainedModel) -> int:
    """The token at whose places the images are; BackendError for a model that has none."""
    for name in ("image_token_id", "image_token_index"):
        found = getattr(model.config, name, None)
        if isinstance(found, int):
            return found
    raise BackendError(f"{type(model).__name__} looks at images, but its config names no image token")


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"{name} is no tensor of images: {told(error)}") from error


def _blocks(there: torch.Tensor) -> torch.Tensor:
    """The last place that each token sees, where neighbours in `there` [tokens] see each other."""
    sees = torch.arange(len(there))
    for at in range(len(there) - 2, -1, -1):
        if there[at] and there[at + 1]:
            sees[at] = sees[at + 1]
    return sees
