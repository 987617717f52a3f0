"""Completions and chats."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.engine.clock import date
from neustream.errors import NeustreamError
from neustream.server.bodies import (
    MOST_CHOICES,
    ChatBody,
    CompletionBody,
    StreamOptions,
    TextBody,
    unsupported,
)
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request
from neustream.server.gateway import TextModel
from neustream.server.promises import Promised
from neustream.server.stops import Stops
from neustream.server.wire import EventStream, while_there
from neustream.service.answer import Answer

DEFAULT_TOKENS = 16
"""Of completions that do not say how many; chats go on to the end of the context."""
COLDEST = 1e-5
"""A lower temperature means the likeliest token, as in vLLM."""


@dataclass
class Choice:
    """One of the texts of a request.

    Attributes:
        text, count: what came of it so far; finish_reason: why it ended, None before.
    """

    index: int
    answer: Answer[Any]
    stops: Stops
    text: str = ""
    count: int = 0
    finish_reason: str | None = None

    def take(self, token: Any) -> str:
        """What a token adds to the text that is told."""
        self.count += 1
        piece = self.stops.add(token.text)
        if self.stops.met:
            self.finish_reason = "stop"
            self.answer.cancel()
        elif token.finish_reason is not None:
            self.finish_reason = token.finish_reason
            piece += self.stops.rest()
        self.text += piece
        return piece


Events: TypeAlias = AsyncIterator[tuple[Choice, Any]]
"""Tokens of a request's choices, as they come."""


@dataclass
class Reply:
    """A request on its way: its choices, and what all answers to it say."""

    id: str
    model: str
    chat: bool
    prompt_tokens: int
    promise: Promised
    created: int = field(default_factory=lambda: int(date()))
    choices: list[Choice] = field(default_factory=list)

    @property
    def usage(self) -> dict[str, Any]:
        completion = sum([choice.count for choice in self.choices])
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """The fields of all answers and chunks."""
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def kept(self) -> dict[str, Any]:
        """How the promise was kept, for those who asked."""
        ended = [choice.answer.ended for choice in self.choices]
        known = [each for each in ended if each is not None]
        on_time = bool(known) and len(known) == len(ended) and all(each.on_time for each in known)
        firsts = [choice.answer.outputs[0].age for choice in self.choices if choice.answer.outputs]
        slack = self.promise.slo.total - max([each.latency_s for each in known], default=0.0)
        return {
            "on_time": on_time,
            "ttft_ms": round(max(firsts) * 1e3, 3) if firsts else None,
            "e2e_ms": round(max([each.latency_s for each in known], default=0.0) * 1e3, 3),
            "slack_ms": None if math.isinf(slack) else round(slack * 1e3, 3),
        }


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    context = Context.of(request)
    body = await context.body(CompletionBody)
    model = context.gateway.text(body.model)
    _check(body)
    prompts: list[list[int]] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompt = await context.gateway.think(model.encode, prompt, size=len(prompt))
        prompts.append(prompt)
    if len(prompts) * body.choices > MOST_CHOICES:
        text = f"at most {MOST_CHOICES} choices in all, got {len(prompts) * body.choices}"
        raise HTTPError(400, text, "invalid", "n")
    most = body.max_tokens or DEFAULT_TOKENS
    return await _serve(context, body, model, prompts, most, chat=False)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    context = Context.of(request)
    body = await context.body(ChatBody)
    model = context.gateway.text(body.model)
    _check(body)
    messages = [{"role": each.role, "content": each.text} for each in body.messages]
    size = sum([len(each["content"]) for each in messages])
    ids = await context.gateway.think(model.chat, messages, body.chat_template_kwargs or {}, size=size)
    most = body.max_completion_tokens or body.max_tokens or max(model.max_len - len(ids), 1)
    return await _serve(context, body, model, [ids], most, chat=True)


def _check(body: TextBody) -> None:
    """HTTPError for what is asked and cannot be done."""
    name = unsupported(body)
    if name is not None:
        raise HTTPError(400, f"{name} is not supported by this server", "unsupported", name)


async def _serve(
    context: Context,
    body: TextBody,
    model: TextModel,
    prompts: Sequence[list[int]],
    most: int,
    *,
    chat: bool,
) -> Response:
    promise = context.promise(body, model.slo)
    count = sum([len(prompt) for prompt in prompts])
    prefix = "chatcmpl" if chat else "cmpl"
    reply = Reply(f"{prefix}-{context.id}", model.name, chat, count, promise)
    try:
        await _submit(context, body, model, prompts, most, reply)
        events = _tokens(reply, promise)
        if body.stream:
            return await _stream(context, body, reply, events)
        return await _whole(context, reply, events)
    except BaseException:
        for choice in reply.choices:
            choice.answer.cancel()
        raise


async def _submit(
    context: Context,
    body: TextBody,
    model: TextModel,
    prompts: Sequence[list[int]],
    most: int,
    reply: Reply,
) -> None:
    """Hand the choices to the engine."""
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = {"temperature": temperature if temperature >= COLDEST else 0.0}
    if body.top_p is not None:
        sampling["top_p"] = body.top_p
    if body.top_k is not None:
        sampling["top_k"] = max(body.top_k, 0)
    several = len(prompts) * body.choices > 1
    for prompt in prompts:
        for turn in range(body.choices):
            number = len(reply.choices)
            seed = None if body.seed is None else (body.seed + turn) % 2**63
            try:
                answer = context.gateway.submit(
                    model,
                    prompt,
                    max_tokens=most,
                    seed=seed,
                    stop_token_ids=body.stop_token_ids or (),
                    ignore_eos=body.ignore_eos,
                    slo=reply.promise.slo,
                    id=f"{context.id}-{number}" if several else context.id,
                    **sampling,
                )
            except (NeustreamError, TypeError, ValueError) as error:
                raise of_request(error) from error
            reply.choices.append(Choice(number, answer, Stops(body.stops)))


async def _tokens(reply: Reply, promise: Promised) -> Events:
    """The tokens of all choices as they come; HTTPError as soon as one comes to nothing."""
    queue: asyncio.Queue[tuple[Choice, Any]] = asyncio.Queue()
    readers = [asyncio.ensure_future(_read(choice, queue)) for choice in reply.choices]
    until = asyncio.get_running_loop().time() + promise.timeout_s
    left = len(readers)
    try:
        while left:
            choice, token = await _next(queue, until)
            if isinstance(token, BaseException):
                raise of_request(token)
            if token is None:
                left -= 1
            else:
                yield choice, token
    finally:
        for reader in readers:
            reader.cancel()
        for choice in reply.choices:
            choice.answer.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _next(queue: asyncio.Queue[tuple[Choice, Any]], until: float) -> tuple[Choice, Any]:
    if math.isinf(until):
        return await queue.get()
    try:
        async with asyncio.timeout_at(until):
            return await queue.get()
    except TimeoutError:
        raise HTTPError(504, "its time ran out", "expired") from None


async def _read(choice: Choice, queue: asyncio.Queue[tuple[Choice, Any]]) -> None:
    """Put a choice's tokens into the queue, then None; an error in place of that."""
    try:
        async for token in choice.answer:
            queue.put_nowait((choice, token))
            if choice.finish_reason is not None:  # a stop string was met
                break
        queue.put_nowait((choice, None))
    except CancelledError:  # by us: a stop string was met, or nobody listens
        queue.put_nowait((choice, None))
    except Exception as error:
        queue.put_nowait((choice, error))


# -- answers ------------------------------------------------------------------------------------------


async def _whole(context: Context, reply: Reply, events: Events) -> Response:
    async def all_of_it() -> None:
        async for choice, token in events:
            if choice.finish_reason is None:
                choice.take(token)

    await while_there(context.request.receive, all_of_it())
    choices = [_choice(reply, choice) for choice in reply.choices]
    usage: dict[str, Any] = dict(reply.usage)
    if reply.promise.report:
        usage["neustream"] = reply.kept()
    content = {**reply.head(chunk=False), "choices": choices, "usage": usage}
    headers = context.headers(reply.promise)
    if reply.promise.slo.promises:
        headers["x-neustream-outcome"] = "on_time" if reply.kept()["on_time"] else "late"
    return JSONResponse(content, headers=headers)


def _choice(reply: Reply, choice: Choice) -> dict[str, Any]:
    common = {"index": choice.index, "logprobs": None, "finish_reason": choice.finish_reason}
    if reply.chat:
        return {**common, "message": {"role": "assistant", "content": choice.text}}
    return {**common, "text": choice.text}


async def _stream(context: Context, body: TextBody, reply: Reply, events: Events) -> Response:
    options = body.stream_options or StreamOptions()
    chunks = _chunks(reply, options, events)
    try:
        first = await while_there(context.request.receive, anext(chunks))
    except StopAsyncIteration:  # nothing was asked for
        first = b""
    stream: Any = EventStream(
        first,
        chunks,
        context.headers(reply.promise),
        write_timeout_s=context.config.http.write_timeout_s,
        failed=context.cut,
    )
    response: Response = stream
    return response


async def _chunks(reply: Reply, options: StreamOptions, events: Events) -> AsyncIterator[bytes]:
    """The events of a stream: one a token; then the usage, if it is wanted; then the end."""
    head = json.dumps(reply.head(chunk=True), ensure_ascii=False)[:-1]
    told: set[int] = set()
    try:
        async for choice, token in events:
            if choice.finish_reason is not None:
                continue
            piece = choice.take(token)
            usage = ""
            if options.continuous_usage_stats:
                usage = f', "usage": {json.dumps(reply.usage)}'
            elif options.include_usage:
                usage = ', "usage": null'
            part = _delta(reply, choice, piece, first=choice.index not in told)
            told.add(choice.index)
            yield f'data: {head}, "choices": [{part}]{usage}}}\n\n'.encode()
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


def _delta(reply: Reply, choice: Choice, piece: str, *, first: bool) -> str:
    """A choice in a chunk. The role rides on the first token, the reason on the last."""
    text = json.dumps(piece, ensure_ascii=False)
    reason = json.dumps(choice.finish_reason)
    if reply.chat:
        role = '"role": "assistant", ' if first else ""
        inner = f'"delta": {{{role}"content": {text}}}'
    else:
        inner = f'"text": {text}'
    tail = f'"logprobs": null, "finish_reason": {reason}'
    return f'{{"index": {choice.index}, {inner}, {tail}}}'
