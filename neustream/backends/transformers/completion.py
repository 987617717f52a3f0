"""What a caller gets of a request: its tokens as they come, and the completion at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from neustream.backends.transformers.likelihoods import Likelihood
from neustream.backends.transformers.stops import Told
from neustream.core.events import Emitted, Update
from neustream.engine.answers import Result

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Token:
    """One output: its place (from 0), its id, what it adds to the text, and seconds since the request came.

    `text` is empty without a tokenizer, and while a character is not complete. `finish_reason` is that of
    the last one; None before. `likelihood`: where `logprobs` were asked. `scores`, of the first one: of the
    prompt's tokens behind its first, where `prompt_logprobs` were asked.
    """

    index: int
    id: int
    text: str
    at_s: float
    finish_reason: Reason | None = None
    likelihood: Likelihood | None = None
    scores: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """In place of a tokenizer, where the text is known."""

    text: str

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Completion:
    """All that came of a request.

    Args:
        token_ids: the new tokens, with the one that ended it.
        finish_reason: "stop" at EOS, a stop token or a stop string, "length" at `max_tokens`.
        at_s: seconds from the request to each token; `latency_s`: to its end; `waited_s`: until it first ran,
            None where nobody can tell. Of a call of an agent from the call's start.
        on_time: whether every promise was kept; of a call, of what it was promised.
        likelihoods: of the new tokens; scores: of the prompt's behind its first. None where that was not asked.
        stops: the stop strings, if one of them ended it; `text` ends before that, and is empty where it
            begins in the prompt.
        cached_tokens: of the prompt, those that were computed for an earlier request.
        lead: with stop strings, the last tokens of the prompt, where one may begin.
    """

    id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: Reason
    at_s: tuple[float, ...]
    latency_s: float
    on_time: bool
    tokenizer: Any = field(default=None, repr=False, compare=False)
    likelihoods: tuple[Likelihood, ...] | None = None
    scores: tuple[Likelihood, ...] | None = None
    stops: tuple[str, ...] = ()
    cached_tokens: int = 0
    lead: tuple[int, ...] = field(default=(), repr=False)
    waited_s: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it has its text, and no tokenizer."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.tokenizer is not None:
            values["tokenizer"] = Known(self.text or "")
        return Completion, tuple(values.values())

    @property
    def text(self) -> str | None:
        """The new text without special tokens, decoded when it is asked for; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if self.stops and not isinstance(self.tokenizer, Known):
            return self._until_stopped()
        text: str = self.tokenizer.decode(list(self.token_ids), skip_special_tokens=True)
        return text

    def _until_stopped(self) -> str:
        """The text before the stop string that the last token completes."""
        told, last = Told(self.tokenizer, self.stops, self.lead), len(self.token_ids) - 1
        return "".join([told.add(id, last=at == last, stopped=at == last) for at, id in enumerate(self.token_ids)])

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.at_s[0]

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Seconds between each token and the one before."""
        return tuple(after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False))

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first (0 if there is none)."""
        return (self.at_s[-1] - self.at_s[0]) / (len(self.at_s) - 1) if len(self.at_s) > 1 else 0.0


READ = ("token", "ended", "likelihood", "scores", "stopped", "cached")
"""What of an output is told of; the text so far, which is in it too, is not."""


def read(update: Update) -> Update:
    """That part of an output."""
    return {key: update[key] for key in READ if key in update}


class Tokens:
    """A reader of one request's outputs: a `Token` of each, with what it adds to the text."""

    def __init__(self, tokenizer: Any, max_tokens: int, stops: Sequence[str] = (), lead: Sequence[int] = ()) -> None:
        self._told = Told(tokenizer, stops, lead)
        self._max_tokens = max_tokens

    def __call__(self, output: Emitted) -> Token:
        token = output.update["token"]
        reason: Reason | None = "length" if output.index + 1 == self._max_tokens else None
        if output.update["ended"]:
            reason = "stop"
        last, stopped = reason is not None, output.update.get("stopped", False)
        text = self._told.add(token, last=last, stopped=stopped)
        likelihood, scores = output.update.get("likelihood"), output.update.get("scores", ())
        return Token(output.index, token, text, output.age, reason, likelihood, scores)


def completion(
    tokenizer: Any,
    prompt_tokens: int,
    stops: tuple[str, ...],
    lead: tuple[int, ...],
    result: Result,
    outputs: Sequence[Emitted],
) -> Completion:
    """All that came of a request; RequestError if nothing did."""
    ended = result.unwrap()["ended"]
    told = [output.update["likelihood"] for output in outputs if "likelihood" in output.update]
    return Completion(
        result.id,
        prompt_tokens,
        tuple([output.update["token"] for output in outputs]),
        "stop" if ended else "length",
        tuple([output.age for output in outputs]),
        result.latency_s,
        result.on_time,
        tokenizer,
        tuple(told) if told else None,
        next((output.update["scores"] for output in outputs if "scores" in output.update), None),
        stops if outputs and outputs[-1].update.get("stopped") else (),
        outputs[0].update.get("cached", 0) if outputs else 0,
        lead,
        result.waited_s,
    )
