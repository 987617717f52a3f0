"""Shows that requests with caches of their own get what `generate` gives them, and what they can share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from neustream.backends.transformers.joined import Company, NotAlike, kept_of_tokens
from neustream.backends.transformers.own import PLAIN, Own, State
from neustream.backends.transformers.proof import (
    CLOSE,
    CLOSE_HALF,
    ROWS,
    affordable,
    apart,
    as_it_was,
    companies,
    lengths_of,
    texts_of,
)
from neustream.errors import BackendError, told

NEW = 3
"""Tokens that `generate` is asked for in a trial."""
SHORT = 8
"""Tokens of the text before noise."""
NOISE_BYTES = 1 << 29
"""What the keys and values of a trial's longest company may take, at most: longer contexts are not tried."""
HEADS = 16
"""Of an index that picks tokens: a score is a sum over heads of what is above 0, so with fewer heads many are 0."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model's requests are computed.

    Attributes:
        batched: decodes of several requests share a call. Else each has calls of its own: exact, and
            a step of many takes as long as theirs one after the other.
        parts: a prompt may be computed in parts. Else it is whole, and after a preemption so are the
            prompt and then each output by itself.
        why: why it is not batched, or not in slots; "" in slots.
        packed: in slots, all tokens of a step lie one behind the other, without padding.
    """

    batched: bool = True
    parts: bool = True
    why: str = ""
    packed: bool = False

    def __str__(self) -> str:
        return "batched" if self.batched else "one by one"


@torch.inference_mode()
def prove_own(own: Own, known: int, why: str) -> Way:
    """Try requests alone, in parts and in company.

    What is compared is each time what the stock calls give one request alone. Contexts that are too
    long to be computed here are noise behind a short text.

    Args:
        known: tokens that there are.
        why: why they cannot be in slots.

    Raises:
        BackendError: not even one by one do they get what `generate` gives them.
    """
    with as_it_was(own.model):
        trial = _Trial(own, known)
        trial.stock()
        trial.random()
        trial.interleaved()
        trial.fill()
        parts = trial.can(trial.parts)
        joins = trial.can(trial.company)
    for slot in range(min(ROWS, own.slots)):
        own.free(slot)
    own.joins = not joins
    return Way(not joins, not parts, f"{why}; {joins}" if joins else why)


def ties_of(text: Any, length: int) -> str:
    """Why the tokens that attention picks depend on what else is in a call; "" if they do not.

    Args:
        text: the config of a language model; its attention may pick `index_topk` tokens by a score (DeepSeek V3.2).
        length: the longest context.
    """
    heads, picked = getattr(text, "index_n_heads", None), getattr(text, "index_topk", None)
    if heads is None or picked is None or heads >= HEADS or picked >= length:
        return ""
    return (
        f"its attention picks {picked} tokens by an index of {heads} heads, under {HEADS}: many scores are 0, and "
        "which of these are picked depends on what else is in a call"
    )


class _Trial:
    """Trials of one model."""

    def __init__(self, own: Own, known: int) -> None:
        self._own, self._known = own, known
        config = own.model.config
        self._encodes = bool(config.is_encoder_decoder)
        self._name = type(own.model).__name__
        text = config.get_text_config(decoder=True)
        self._ties = ties_of(text, own.length)
        self._longest = affordable(own.model, own.length - 1, getattr(text, "num_hidden_layers", None) or 1)
        longest = min(own.length, self._roomy())
        self._lengths = [n for n in lengths_of(text.to_dict(), longest) if n <= longest - 2]
        self._whole = texts_of(text.to_dict(), self._longest)
        self._next = [token % known for token in (4, 7)]
        self._contexts: list[State] = []
        self._alone: dict[int, list[torch.Tensor]] = {}

    def can(self, trial: Any) -> str:
        """Why a trial does not hold; "" if it does."""
        try:
            found: str = trial()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a model does that was not made for this
            return f"a call failed with {told(error)}"
        return found

    def stock(self) -> None:
        """The calls made here give what `generate` gives, to a short text and to a long one."""
        for length in sorted({min(9, self._longest), self._longest - NEW}):
            if length < 1 or length + NEW > self._own.length:
                continue
            text = self._text(length, length)
            wanted, chosen = self._generated(text)
            state = self._own.prefill(text)
            for at, logits in enumerate(wanted):
                if self._off(state.behind, logits) and self._off(self._generated(text)[0][0], wanted[0]):
                    raise BackendError(f"{self._name} cannot be served: `generate` gives other logits each time")
                self._compare(state.behind, logits, f"a text of {length} tokens gets other logits")
                if at < len(wanted) - 1:
                    self._own.extend(state, [chosen[at]])

    def random(self) -> None:
        """Calls leave torch's random numbers alone: `generate` draws tokens from these."""
        with torch.random.fork_rng(devices=[]):
            torch.rand(1)  # a call that sets them has set them before
            before = torch.get_rng_state()
            self._own.prefill(self._text(0, 1))
            moved = not torch.equal(before, torch.get_rng_state())
        if moved:
            raise BackendError(f"{self._name} cannot be served: its calls move or set torch's random numbers")

    def interleaved(self) -> None:
        """Two requests in turns get what each gets alone: the model itself keeps nothing of them."""
        texts = [self._text(at, min(n, self._longest)) for at, n in enumerate((5, 9))]
        alone = [self._step(self._own.prefill(text), self._next[0]) for text in texts]
        both = [self._own.prefill(text) for text in texts]
        for state, logits in zip(both, alone, strict=True):
            self._compare(
                self._step(state, self._next[0]), logits, "two requests in turns get other logits than one alone"
            )

    def fill(self) -> None:
        """Requests of all lengths that are tried, and what each gets alone for the next tokens."""
        self._contexts = [self._own.prefill(self._text(n, n)) for n in self._whole]
        self._contexts += self._long()
        for state in self._contexts:
            twin = state.twin()
            self._alone[len(state.tokens)] = [self._step(twin, token) for token in self._next]

    def _long(self) -> list[State]:
        """Noise behind a short text, of the other lengths that are tried; none where that cannot be."""
        found: list[State] = []
        short = self._own.prefill(self._text(0, min(SHORT, self._longest)))
        for length in self._lengths:
            if length in self._whole or length <= SHORT:
                continue
            state = short.twin()
            try:
                self._own.stretch(state, length - len(state.tokens))
            except NotAlike:
                return found
            found.append(state)
        return found

    def parts(self) -> str:
        """Whether a prompt in two parts is the same as whole, and tokens at once as one by one."""
        if self._encodes:
            return "its prompt goes through an encoder"
        if self._ties:
            return self._ties
        for state in self._contexts:
            both = state.twin()
            self._own.extend(both, self._next)
            if off := self._off(both.behind, self._alone[len(state.tokens)][-1]):
                return off
        for length, state in zip(self._whole, self._contexts, strict=False):
            text = self._text(length, length)
            two = self._own.prefill(text[: length // 2])
            self._own.extend(two, text[length // 2 :])
            if off := self._off(two.behind, state.behind):
                return off
        return ""

    def company(self) -> str:
        """Whether contexts of all lengths get, in companies that change, what they get alone."""
        if self._ties:
            return self._ties
        states = {len(state.tokens): state for state in self._contexts}
        for some in companies(sorted(states), min(ROWS, self._own.slots)):
            if off := self._together([states[length] for length in some]):
                return off
        return ""

    # -- inside -----------------------------------------------------------------------------------

    def _roomy(self) -> int:
        """The longest contexts of which a company is affordable, by what a short one keeps of each token."""
        state = self._own.prefill(self._text(0, min(SHORT, self._longest)))
        each = max(1, kept_of_tokens(state) // len(state.tokens))
        return max(self._longest, NOISE_BYTES // (each * ROWS))

    def _generated(self, text: Sequence[int]) -> tuple[list[torch.Tensor], list[int]]:
        """What `generate` makes of a text: the logits behind it and behind each new token, and these tokens."""
        ids = torch.tensor([text], device=self._own.model.device)
        how = GenerationConfig(**PLAIN, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
        made = self._own.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        chosen = made.sequences[0, -len(made.logits) :].tolist()  # as its generation_config says
        return [logits[0].float() for logits in made.logits], chosen

    def _together(self, states: Sequence[State]) -> str:
        """Two tokens of each: together, then without the last that came."""
        some = [state.twin() for state in states]
        lengths = [len(state.tokens) for state in states]
        for turn, token in enumerate(self._next):
            members = some[: max(len(some) - turn, 1)]
            company = Company(self._own, members)
            company.step(members, [token] * len(members))
            company.part()
            for state, length in zip(members, lengths, strict=False):
                if off := self._off(state.behind, self._alone[length][turn]):
                    return off
        return ""

    def _step(self, state: State, token: int) -> torch.Tensor:
        behind = self._own.extend(state, [token]).behind
        assert behind is not None
        return behind

    def _text(self, at: int, count: int) -> list[int]:
        return [(7 * at + 3 * k + 1) % self._known for k in range(count)]

    def _off(self, got: torch.Tensor | None, alone: torch.Tensor | None) -> str:
        """How far logits are apart, in words; "" if they are close."""
        assert got is not None and alone is not None
        off = apart(got, alone)
        close = CLOSE.get(self._own.model.dtype, CLOSE_HALF)
        return "" if off <= close else f"logits differ from those alone by {off:.1e} of the largest"

    def _compare(self, got: torch.Tensor | None, alone: torch.Tensor, what: str) -> None:
        if self._off(got, alone):
            raise BackendError(f"{self._name} cannot be served: {what}")
