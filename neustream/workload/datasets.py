"""Images that are asked for, and lengths by numpy's own normal law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream.workload.asks import CAPTION, Ask, ImageAsk
from neustream.workload.sources import TURN, Asked


def normal(mean: float, std: float, least: int, most: int, number: int, seed: int) -> NDArray[np.int64]:
    """Normally drawn lengths; those outside of `least` and `most` are drawn again."""
    rng = np.random.default_rng(seed)
    found = np.empty(0, np.int64)
    while len(found) < number:
        drawn = np.rint(rng.normal(mean, std, 2 * number)).astype(np.int64)
        found = np.concatenate([found, drawn[(drawn >= least) & (drawn <= most)]])
    return found[:number]


@dataclass(frozen=True)
class Images:
    """Images of drawn sizes and steps; each size and number of steps has a weight.

    A size of None is whatever the server makes by itself.
    """

    sizes: tuple[tuple[int | None, int | None, float], ...] = ((None, None, 1.0),)
    steps: tuple[tuple[int, float], ...] = ((20, 1.0),)
    number: int = 1

    def asks(self, asked: Asked) -> list[Ask]:
        number, rng = asked.requests, np.random.default_rng(asked.seed)
        sizes = rng.choice(len(self.sizes), number, p=_shares([each[2] for each in self.sizes]))
        steps = rng.choice(len(self.steps), number, p=_shares([each[1] for each in self.steps]))
        found = []
        for at, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            width, height, _ = self.sizes[size]
            image = ImageAsk(width, height, self.steps[step][0], number=self.number)
            prompt = asked.texts.text(CAPTION, asked.seed, TURN, asked.stage, at).strip()
            found.append(asked.ask(at, prompt, None, None, image=image))
        return found


def _shares(weights: Sequence[float]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.array(weights, np.float64) / sum(weights)
    return found
