"""A request for texts on its way: its choices, and what answers and chunks say of them."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from neustream.engine.clock import date
from neustream.server.bodies import StreamOptions
from neustream.server.likelihoods import Names, Place, of_chat, of_completion
from neustream.server.promises import Promised, longest_ms
from neustream.server.stops import Stops
from neustream.server.streams import Outlet
from neustream.service.answer import Answer

_as_json = json.JSONEncoder(ensure_ascii=False).encode
"""Made once: `json.dumps` with options makes an encoder for each call."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a token adds to a choice: its text, and of which tokens likelihoods are told."""

    text: str
    places: list[Place]


@dataclass
class Choice:
    """One of the texts of a request.

    Args:
        whole: told before the engine is that it need not go on, since all is there.
        echo: text that is put before it; echoed: the tokens of that, where their likelihoods are told.
        silent: whether the echo is all that was asked for.
        logs: whether likelihoods are told.
        least: tokens before which no stop string ends it.

    Attributes:
        text, count, places: what came of it so far; finish_reason: why it ended, None before.
        began_s: seconds that it waited before it ran, as seen at its first token; None: not seen.
    """

    index: int
    answer: Answer[Any]
    stops: Stops
    whole: Callable[[], None]
    echo: str = ""
    echoed: list[int] = field(default_factory=list)
    silent: bool = False
    logs: bool = False
    names: Names = field(default_factory=lambda: Names(None))
    least: int = 0
    text: str = ""
    count: int = 0
    places: list[Place] = field(default_factory=list)
    finish_reason: str | None = None
    began_s: float | None = None
    _offset: int = 0

    def take(self, token: Any) -> Part:
        """What a token adds to what is told."""
        places: list[Place] = []
        piece = ""
        if not self._offset and not self.count:
            piece, places = self.echo, self._prompt(token)
            self._offset = len(self.echo)
        if self.silent:
            self.finish_reason = "length"
            self._end()
        else:
            piece += self._add(token, places)
        self.text += piece
        self.places += places
        return Part(piece, places)

    def _add(self, token: Any, places: list[Place]) -> str:
        self.count += 1
        if self.logs:
            places.append(Place(token.id, self._offset, token.likelihood))
        self._offset += len(token.text)
        piece = token.text if self.count <= self.least else self.stops.add(token.text)
        if self.stops.met:
            self.finish_reason = "stop"
            self._end()
        elif token.finish_reason is not None:
            self.finish_reason = token.finish_reason
            piece += self.stops.rest()
        return piece

    def kept(self, total_s: float) -> tuple[bool, float]:
        """Whether it was on time, and its seconds; one that we ended is over with its last token."""
        ended = self.answer.ended
        if ended is not None and not self.answer.cancelled():
            return ended.on_time, ended.latency_s
        outputs = self.answer.outputs[: max(self.count, 1)]
        if self.finish_reason is None or not outputs:
            return False, 0.0
        age = outputs[-1].age
        return age <= total_s and not any(output.late for output in outputs), age

    @property
    def waited_s(self) -> float | None:
        """Seconds that it waited before it ran: its end tells, or, where it was cut, its first token did."""
        ended = self.answer.ended
        return self.began_s if ended is None or ended.waited_s is None else ended.waited_s

    def _end(self) -> None:
        self.whole()
        self.answer.cancel()

    def _prompt(self, token: Any) -> list[Place]:
        """The places of the prompt's tokens, whose likelihoods the first output brings."""
        found, offset = [], 0
        likely = dict(enumerate(token.scores, 1))
        for at, id in enumerate(self.echoed):
            found.append(Place(id, offset, likely.get(at)))
            offset += len(self.names.text(id))
        return found


Tokens: TypeAlias = list[tuple[Choice, Any]]
"""Tokens of a request's choices that came together, those of a choice in order."""
Events: TypeAlias = AsyncIterator[Tokens]
"""All tokens of a request, as they come."""


@dataclass
class Reply:
    """A request on its way: its choices, and what all answers to it say."""

    id: str
    model: str
    chat: bool
    prompt_tokens: int
    promise: Promised
    names: Names
    created: int = field(default_factory=lambda: int(date()))
    choices: list[Choice] = field(default_factory=list)
    outlet: Outlet = field(default_factory=Outlet)

    @property
    def usage(self) -> dict[str, Any]:
        completion = sum([choice.count for choice in self.choices])
        firsts = [choice.answer.outputs[0].update for choice in self.choices if choice.answer.outputs]
        cached = max([first.get("cached", 0) for first in firsts], default=0)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            **({"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}),
        }

    def prompt_of(self, tokens: int) -> None:
        """Its prompt has so many tokens, as is seen later."""
        self.prompt_tokens = tokens

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """The fields of all answers and chunks."""
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def kept(self) -> dict[str, Any]:
        """How the promise was kept, for those who asked."""
        kept = [choice.kept(self.promise.slo.total) for choice in self.choices]
        latency_s = max([seconds for _, seconds in kept], default=0.0)
        firsts = [choice.answer.outputs[0].age for choice in self.choices if choice.answer.outputs]
        slack = self.promise.slo.total - latency_s
        return {
            "on_time": bool(kept) and all(on_time for on_time, _ in kept),
            "queue_ms": longest_ms([choice.waited_s for choice in self.choices]),
            "ttft_ms": round(max(firsts) * 1e3, 3) if firsts else None,
            "e2e_ms": round(latency_s * 1e3, 3),
            "slack_ms": None if math.isinf(slack) else round(slack * 1e3, 3),
        }

    def about(self) -> dict[str, Any]:
        """What the access log says of it."""
        found = {"model": self.model, "choices": len(self.choices), **self.usage}
        found |= {"finish": [choice.finish_reason for choice in self.choices]}
        return {**found, "class": self.promise.slo.name, **self.kept()} if self.promise.slo.promises else found

    def whole(self) -> dict[str, Any]:
        """The answer, once all choices have ended."""
        usage: dict[str, Any] = dict(self.usage)
        if self.promise.report:
            usage["neustream"] = self.kept()
        choices = [self._choice(choice) for choice in self.choices]
        return {**self.head(chunk=False), "choices": choices, "usage": usage}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logs = self.logprobs(choice.places) if choice.logs else None
        common = {"index": choice.index, "logprobs": logs, "finish_reason": choice.finish_reason}
        if self.chat:
            return {**common, "message": {"role": "assistant", "content": choice.text}}
        return {**common, "text": choice.text}

    def logprobs(self, places: list[Place]) -> dict[str, Any]:
        """Likelihoods of some tokens of a choice, in the form of the route."""
        return of_chat(self.names, places) if self.chat else of_completion(self.names, places)

    def delta(self, choice: Choice, part: Part, *, first: bool) -> str:
        """A choice in a chunk. The role rides on the first token, the reason on the last."""
        text = _as_json(part.text)
        if self.chat:
            role = '"role": "assistant", ' if first else ""
            inner = f'"delta": {{{role}"content": {text}}}'
        else:
            inner = f'"text": {text}'
        logs = "null"
        if choice.logs:
            logs = json.dumps(self.logprobs(part.places), ensure_ascii=False, allow_nan=False)
        reason = "null" if choice.finish_reason is None else f'"{choice.finish_reason}"'
        return f'{{"index": {choice.index}, {inner}, "logprobs": {logs}, "finish_reason": {reason}}}'


async def chunks(reply: Reply, options: StreamOptions, events: Events) -> AsyncIterator[bytes]:
    """The events of a stream: one a token; then the usage, if it is wanted; then the end.

    Those of tokens that came together leave together.
    """
    head = json.dumps(reply.head(chunk=True), ensure_ascii=False)[:-1]
    told: set[int] = set()
    try:
        async for came in events:
            lines = [_chunk(reply, options, head, told, choice, token) for choice, token in came]
            if any(lines):
                yield "".join(lines).encode()
        if options.include_usage or options.include_slo or reply.promise.report:
            full: dict[str, Any] = dict(reply.usage)
            if options.include_slo or reply.promise.report:
                full["neustream"] = reply.kept()
            yield f'data: {head}, "choices": [], "usage": {json.dumps(full)}}}\n\n'.encode()
        yield b"data: [DONE]\n\n"
    finally:
        close: Any = getattr(events, "aclose", None)
        if close is not None:
            await close()


def _chunk(reply: Reply, options: StreamOptions, head: str, told: set[int], choice: Choice, token: Any) -> str:
    """The event of a token; none if its choice has ended. `told`: the choices that have had one."""
    if choice.finish_reason is not None:
        return ""
    part = choice.take(token)
    usage = ""
    if options.continuous_usage_stats:
        usage = f', "usage": {json.dumps(reply.usage)}'
    elif options.include_usage:
        usage = ', "usage": null'
    delta = reply.delta(choice, part, first=choice.index not in told)
    told.add(choice.index)
    return f'data: {head}, "choices": [{delta}]{usage}}}\n\n'
