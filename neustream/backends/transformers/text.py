"""What is known of one request's text: what was asked, and what came of it so far. Plain data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from neustream.backends.transformers.likelihoods import Likelihood
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.sight import Sight


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call of the model is asked: token ids of the prompt, and how to choose the next ones.

    `end`: outputs after which it ends as if the model had said so (a workload's own lengths).
    `sight`: images of the prompt. `most`: outputs that it may have; None: not known.
    `adapter`: that it chooses; None: what is active.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    end: int | None = None
    sight: Sight | None = None
    most: int | None = None
    adapter: str | None = None

    @property
    def names(self) -> list[int]:
        """The prompt's tokens, told apart: those of an image have a number of their own in place of its token's id."""
        ids = list(self.prompt)
        if self.sight is not None:  # equal ids of different images are different keys and values
            own = -1 - self.sight.digest
            for place in self.sight.places.tolist():
                ids[place] = own
        return ids

    @property
    def begins(self) -> tuple[str | None, list[int]]:
        """What keys and values of the prompt depend on: equal ones have the same."""
        return self.adapter, self.names


SEEN = "seen"
"""In the state of a request, behind its model's name: what the vision tower made of its images."""


def seen(ask: Ask, found: torch.Tensor | None) -> Ask:
    """What is asked, with what was made of its images."""
    return ask if ask.sight is None or found is None else replace(ask, sight=ask.sight.with_(found))


@dataclass(frozen=True, slots=True)
class Text:
    """One call of the model for one request: what was asked, its outputs so far, its random stream.

    It is in the request's state: plain data, a new value after each step. Keys and values in a slot
    can be computed anew from it, by which they and all later tokens come out the same.

    Args:
        stream: where the random stream is (see `Draw`); empty: at its start.
        scores: how likely the tokens of the prompt were behind its first one, as far as they are
            computed, where that was asked.
    """

    ask: Ask
    outputs: tuple[int, ...] = ()
    stream: bytes = b""
    scores: tuple[Likelihood, ...] = ()

    def __len__(self) -> int:
        """Tokens of prompt and outputs."""
        return len(self.ask.prompt) + len(self.outputs)

    def tokens(self, first: int, last: int) -> list[int]:
        """Its tokens number `first` to `last` (from 0, without the last)."""
        prompt = len(self.ask.prompt)
        own = self.outputs[max(first - prompt, 0) : max(last - prompt, 0)]
        return [*self.ask.prompt[first:last], *own]

    @property
    def unscored(self) -> bool:
        """Whether the prompt's own tokens are still to be told of."""
        asked = self.ask.sampling.prompt_logprobs is not None and not self.outputs
        return asked and len(self.scores) + 1 < len(self.ask.prompt)

    def add(self, token: int, stream: bytes) -> Text:
        """The text with one more output."""
        return Text(self.ask, (*self.outputs, token), stream)

    def barred(self, eos: Collection[int]) -> Collection[int]:
        """The tokens that its next one must not be: they would end it too soon."""
        sampling = self.ask.sampling
        if len(self.outputs) >= sampling.min_tokens:
            return ()
        return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}

    def over(self, eos: Collection[int]) -> bool:
        """Whether it ends with its latest output."""
        sampling, token = self.ask.sampling, self.outputs[-1]
        if len(self.outputs) == self.ask.end:
            return True
        return token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)
