"""A vLLM engine as the stream module of a language model: a step is a token of each request in it.

The engine batches by itself. A request stays in it from its first step here to its last one. One
that went on elsewhere, or lost its place, begins anew there, behind the tokens that it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.events import Update
from neustream.errors import StageFailed, told

NOTHING = {
    "temperature": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
}
"""Of sampling: with these, a text that goes on behind its own tokens is the one that stayed."""
EXACT = frozenset({*NOTHING, "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids"})
"""What may be asked of such a text, as far as `NOTHING` says how."""


@dataclass(eq=False)
class Running:
    """A request in the engine. `tokens`: that no step has told of yet, with what each adds to the
    text; `over`: why it ended."""

    own: str
    tokens: deque[tuple[int, str]] = field(default_factory=deque)
    over: str | None = None


class Generations:
    """Generations of one engine.

    Args:
        engine: a synchronous engine of vLLM's; nobody else steps it.
        params: makes SamplingParams, which tell each new token once, of their arguments.
        name: of the model's stages: the tokens so far are under it in a request's state.

    A request's `params` have `prompt` (token ids), `max_tokens` and `sampling`, a mapping.
    """

    def __init__(self, engine: Any, params: Callable[..., Any], name: str) -> None:
        self._engine = engine
        self._params = params
        self._name = name
        self._running: dict[str, Running] = {}
        self._by_own: dict[str, Running] = {}
        self._count = 0

    def __len__(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    def load(self, device: str) -> None:
        """The engine is where it was made."""

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        results: list[Update | StageFailed | None] = [None] * len(inputs)
        for at, given in enumerate(inputs):
            if given.id not in self._running:
                results[at] = self._begin(given)
        asked = [(at, given) for at, given in enumerate(inputs) if results[at] is None]
        while any(self._waits(given) for _, given in asked):
            self._turn()
        for at, given in asked:
            results[at] = self._told(given)
        return [result for result in results if result is not None]

    def release(self, id: str) -> None:
        running = self._running.pop(id, None)
        if running is None:
            return
        del self._by_own[running.own]
        if running.over is None:
            self._engine.abort_request([running.own])

    def export(self, given: StepInput) -> None:
        """Nothing but its tokens, which are in its state.

        StageFailed if it has begun and what comes behind them would be another text.
        """
        asked = given.params["sampling"]
        if self._made(given) and (why := inexact(asked)):
            raise StageFailed(
                f"a text with {why} does not come out the same where it goes on elsewhere"
            )

    def adopt(self, given: StepInput, piece: Any) -> None:
        raise StageFailed(f"model {self._name!r}: vLLM takes no keys and values of others")

    # -- inside -----------------------------------------------------------------------------------

    def _made(self, given: StepInput) -> tuple[int, ...]:
        made: tuple[int, ...] = given.state.get(self._name, ())
        return made

    def _begin(self, given: StepInput) -> StageFailed | None:
        """Have the engine go on behind the tokens that there are."""
        self._count += 1
        own, made = f"{given.id}-{self._count}", self._made(given)
        try:
            params = self._params(
                max_tokens=given.params["max_tokens"] - len(made), **given.params["sampling"]
            )
            self._engine.add_request(
                own, {"prompt_token_ids": [*given.params["prompt"], *made]}, params
            )
        except Exception as error:  # noqa: BLE001  vLLM refuses in many ways
            return StageFailed(f"vLLM does not take it: {told(error)}")
        self._running[given.id] = self._by_own[own] = Running(own)
        return None

    def _waits(self, given: StepInput) -> bool:
        """Whether a token of a request is still to come in this step."""
        running = self._running.get(given.id)
        return running is not None and not running.tokens and running.over is None

    def _turn(self) -> None:
        """One step of vLLM's; if it fails, all that are in the engine fail."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            left = [running.own for running in self._running.values() if running.over is None]
            self._running.clear()
            self._by_own.clear()
            try:
                self._engine.abort_request(left)
            except Exception as dead:  # noqa: BLE001  its process may be gone
                error.add_note(f"and its requests could not be aborted: {dead}")
            raise StageFailed(f"vLLM: {told(error)}") from error
        for output in outputs:
            running = self._by_own.get(output.request_id)
            if running is None:
                continue
            best = output.outputs[0]
            last = len(best.token_ids) - 1  # the text of all that came at once
            texts = [best.text if at == last else "" for at in range(last + 1)]
            running.tokens.extend(zip(best.token_ids, texts, strict=True))
            if output.finished:
                running.over = best.finish_reason or "nothing"
                if running.over not in ("stop", "length"):
                    running.over += f": {best.stop_reason or 'no reason given'}"

    def _told(self, given: StepInput) -> Update | StageFailed:
        """What a request got."""
        if given.computed + given.size < given.whole:  # its prompt is not all that the step was for
            return {}
        running = self._running.get(given.id)
        if running is None:
            return StageFailed("vLLM lost it in a step that failed")
        if not running.tokens:
            return StageFailed(f"vLLM ended it with {running.over}")
        token, text = running.tokens.popleft()
        over = None if running.tokens else running.over
        told = {"token": token, "text": text, "finish_reason": over, "ended": over == "stop"}
        return {**told, self._name: (*self._made(given), token)}


def inexact(sampling: Mapping[str, Any]) -> str:
    """What of it may make a text differ that goes on behind its own tokens; empty: nothing."""
    for name, value in sampling.items():
        if name not in EXACT or NOTHING.get(name, value) != value:
            return f"{name}={value!r}"
    return ""
