"""The images of one request, and where they are in its prompt. Plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a vision-language model is to see beside the tokens of one prompt; tensors on the CPU.

    Args:
        inputs: of the vision tower, by name, as the model's processor made them; none once it looked.
        digest: a number for these images: others have another one.
        places: [image tokens], where they are in the prompt, ascending.
        seen: [image tokens, width] what the tower made of the images; None: nothing so far.
        positions: [3, tokens] of the prompt, where it has rows and columns of images; None: the
            places of tokens are their positions.
        behind: what is added to the places of the tokens behind the prompt.
        sees: [tokens], the last place of the prompt that each of its tokens sees, where image tokens
            see others behind them; None: none does.
    """

    inputs: Mapping[str, torch.Tensor]
    digest: int
    places: torch.Tensor
    seen: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    behind: int = 0
    sees: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Image tokens of the prompt."""
        return len(self.places)

    def with_(self, seen: torch.Tensor) -> Sight:
        """The same with what was made of its images."""
        return replace(self, seen=seen, inputs={})

    def matters(self, start: int) -> bool:
        """Whether tokens from `start` on are computed otherwise than those of a text."""
        return self.positions is not None or (len(self.places) > 0 and start <= int(self.places[-1]))

    def floor(self, end: int) -> int:
        """The last place up to `end` where a part of the prompt may end: within no tokens that see each other."""
        if self.sees is None or not 0 < end <= len(self.sees) or int(self.sees[end - 1]) < end:
            return end
        return int(torch.searchsorted(self.sees, self.sees[end - 1]))

    def limits(self, start: int, end: int) -> torch.Tensor:
        """The last place that each token from `start` to `end` sees, [end - start]."""
        own = torch.arange(start, end)
        if self.sees is None or start >= len(self.sees):
            return own
        inside = self.sees[start:end]
        own[: len(inside)] = inside
        return own

    def columns(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens from `start` to `end`: their places less `start`, and what was seen there."""
        assert self.seen is not None, "its images were not looked at"
        low, high = torch.searchsorted(self.places, torch.tensor([start, end])).tolist()
        return self.places[low:high] - start, self.seen[low:high]

    def angles(self, start: int, end: int) -> torch.Tensor:
        """Positions of the tokens from `start` to `end`, [3, end - start]."""
        own = torch.arange(start, end).expand(3, -1) + self.behind
        if self.positions is None or start >= self.positions.shape[1]:
            return own
        inside = self.positions[:, start:end]
        return torch.cat((inside, own[:, inside.shape[1] :]), 1)


def digest_of(inputs: Mapping[str, torch.Tensor]) -> int:
    """A number for images: 96 bits of a hash of all that a tower is given of them."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest()[:12])
