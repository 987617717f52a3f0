"""What a device keeps of the requests that it chooses tokens for; all of it can be made anew from their texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from neustream.backends.transformers.choosing import Chooser
from neustream.backends.transformers.said import Place
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.stops import Watch, lead_of
from neustream.backends.transformers.text import Ask, Text


class Streams:
    """Choosers and watches of requests, by id: those that are still there go on.

    Args:
        tokenizer: for stop strings.
        begins: what outputs begin with in place of the prompt, where an encoder reads that.
    """

    def __init__(
        self,
        eos: Collection[int],
        device: torch.device,
        tokenizer: Any = None,
        begins: Sequence[int] | None = None,
    ) -> None:
        self._eos, self._device, self._tokenizer, self._begins = eos, device, tokenizer, begins
        self._plain: dict[str, Sampling] = {}
        self._choosers: dict[str, tuple[Ask, bytes, Chooser]] = {}
        self._watches: dict[str, tuple[Ask, Watch]] = {}

    def __len__(self) -> int:
        return len({*self._plain, *self._choosers, *self._watches})

    def asked(self, id: str, text: Text) -> tuple[Chooser, Text] | None:
        """How the text's next token is chosen, its random stream where it left off; None: it is the likeliest."""
        sampling = text.ask.sampling
        if self._plain.get(id) is sampling:
            return None
        if plain(sampling):
            self._plain[id] = sampling
            return None
        prompt = text.ask.prompt if self._begins is None else self._begins
        ask, stream, chooser = self._choosers.get(id, (None, None, None))
        if chooser is None or ask is not text.ask or stream is not text.stream:
            chooser = Chooser(sampling, text.stream, self._place(text.ask, len(prompt)))
            self._choosers[id] = text.ask, text.stream, chooser
        seen = text if self._begins is None else replace(text, ask=replace(text.ask, prompt=prompt))
        return chooser, seen

    def _place(self, ask: Ask, begin: int) -> Place:
        """Where a request's outputs are, behind `begin` tokens."""
        last = None if ask.most is None else begin + ask.most
        eos = () if ask.sampling.ignore_eos else tuple(sorted(self._eos))
        return Place(ask.prompt, begin, last, eos, str(self._device))

    def stream(self, id: str, text: Text) -> bytes:
        """Where the text's random stream is by now."""
        if id not in self._choosers:
            return text.stream
        ask, _, chooser = self._choosers[id]
        stream = chooser.stream
        self._choosers[id] = ask, stream, chooser
        return stream

    def stopped(self, id: str, text: Text) -> bool:
        """Whether the text's latest output ends one of its stop strings."""
        sampling = text.ask.sampling
        if not sampling.stop:
            return False
        ask, watch = self._watches.get(id, (None, None))
        if watch is None or ask is not text.ask or watch.seen != len(text.outputs) - 1:
            prompt = text.ask.prompt if self._begins is None else self._begins
            watch = Watch(self._tokenizer, sampling.stop, lead_of(prompt, sampling.stop))
            for token in text.outputs[:-1]:
                watch.add(token)
            self._watches[id] = text.ask, watch
        return watch.add(text.outputs[-1]) and len(text.outputs) >= sampling.min_tokens

    def forget(self, id: str) -> None:
        self._plain.pop(id, None)
        self._choosers.pop(id, None)
        self._watches.pop(id, None)


def plain(sampling: Sampling) -> bool:
    """Whether its tokens are the likeliest of the model's own logits."""
    edits = (
        sampling.biases,
        sampling.suppress_tokens,
        sampling.begin_suppress_tokens,
        sampling.bad_words_ids,
        sampling.processors,
        sampling.no_repeat_ngram_size,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty != 1,
        sampling.said.edits,
    )
    return sampling.temperature == 0 and not any(edits)
