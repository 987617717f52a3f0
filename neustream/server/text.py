"""Completions and chats."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.errors import NeustreamError
from neustream.server import agent_chats
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
from neustream.server.likelihoods import Names
from neustream.server.models import AgentModel, TextModel
from neustream.server.observe.notes import Stopped
from neustream.server.promises import Promised
from neustream.server.prompts import Prompt, prompt_of, prompt_of_chat
from neustream.server.replies import Choice, Events, Reply, Tokens, chunks
from neustream.server.stops import Stops
from neustream.server.streams import stream_of
from neustream.server.wire import while_there
from neustream.service.feed import Feed
from neustream.service.several import SEEDS, sequences

DEFAULT_TOKENS = 16
"""Of completions that do not say how many; chats go on to the end of the context."""
COLDEST = 1e-5
"""A lower temperature means the likeliest token, as in vLLM."""
COOL = 0.01
"""Others are raised to it, as in vLLM too: logits of half precision would overflow."""
AS_THEY_ARE = ("min_tokens", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    context = Context.of(request)
    body = await context.body(CompletionBody)
    model = context.gateway.text(body.model)
    _check(body)
    if body.max_tokens == 0 and not body.echo:
        raise HTTPError(400, "max_tokens: 0 is for echo alone; else 1 or more", "invalid", "max_tokens")
    if len(body.prompts) * body.choices > MOST_CHOICES:
        text = f"at most {MOST_CHOICES} choices in all, got {len(body.prompts) * body.choices}"
        raise HTTPError(400, text, "invalid", "n")
    promise = context.promise(body, model.slo)
    context.gateway.admit(model, promise.slo)
    prompts = [await prompt_of(context, model, prompt, echo=body.echo) for prompt in body.prompts]
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    return await _serve(context, body, model, promise, prompts, most)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    context = Context.of(request)
    body = await context.body(ChatBody)
    model = context.gateway.chat(body.model)
    _check(body)
    if isinstance(model, AgentModel):
        return await _serve_agent(context, body, model)
    if body.top_logprobs and not body.logprobs:
        raise HTTPError(400, "top_logprobs: needs logprobs: true", "invalid", "top_logprobs")
    promise = context.promise(body, model.slo)
    context.gateway.admit(model, promise.slo)
    prompt = await prompt_of_chat(context, model, body)
    try:
        most = body.max_completion_tokens or body.max_tokens or model.outputs(len(prompt.ids))
    except NeustreamError as error:
        raise _named(of_request(error), body) from error
    return await _serve(context, body, model, promise, [prompt], most)


def _check(body: TextBody) -> None:
    """HTTPError for what is asked and cannot be done."""
    name = unsupported(body)
    if name is not None:
        raise HTTPError(400, f"{name} is not supported by this server", "unsupported", name)


async def _serve(
    context: Context,
    body: TextBody,
    model: TextModel,
    promise: Promised,
    prompts: Sequence[Prompt],
    most: int,
) -> Response:
    count = sum([len(prompt.ids) for prompt in prompts])
    chat = isinstance(body, ChatBody)
    prefix = "chatcmpl" if chat else "cmpl"
    names = Names(model.tokenizer, as_ids=body.return_tokens_as_token_ids)
    reply = Reply(f"{prefix}-{context.id}", model.name, chat, count, promise, names)
    context.metrics.params(model.name, body.choices, most)
    submit = partial(_submit, context, body, model, prompts, most, reply)
    return await _answer(context, body, model, reply, submit)


async def _serve_agent(context: Context, body: ChatBody, model: AgentModel) -> Response:
    """A run of an agent whose last call is the answer."""
    promise = context.promise(body, model.slo)
    context.gateway.admit(model, promise.slo)
    params = agent_chats.params_of(body, model)
    reply = agent_chats.reply_of(context, model, promise)

    def submit() -> None:
        try:
            agent_chats.begin(context, model, params, reply)
        except (NeustreamError, TypeError, ValueError) as error:
            raise _named(of_request(error), body) from error

    return await _answer(context, body, model, reply, submit)


async def _answer(
    context: Context, body: TextBody, model: TextModel | AgentModel, reply: Reply, submit: Callable[[], None]
) -> Response:
    """Have a request served, and tell what comes of it as the client wants."""
    context.about(reply.about)
    try:
        submit()
        events = _tokens(context, model, reply)
        if body.stream:
            return await _stream(context, body, reply, events)
        return await _whole(context, reply, events)
    except BaseException:
        for choice in reply.choices:
            choice.answer.cancel()
        raise


def _submit(
    context: Context,
    body: TextBody,
    model: TextModel,
    prompts: Sequence[Prompt],
    most: int,
    reply: Reply,
) -> None:
    """Hand the choices to the engine."""
    echo = isinstance(body, CompletionBody) and body.echo
    options: dict[str, Any] = {
        **_sampling(body, model),
        "max_tokens": max(most, 1),
        "logprobs": body.told,
        "prompt_logprobs": body.told if echo else None,
        "slo": reply.promise.slo,
    }
    if model.adapter:
        options["adapter"] = model.adapter
    several = len(prompts) * body.choices > 1
    seed = None if body.seed is None else body.seed % SEEDS
    for prompt in prompts:
        first = len(reply.choices)
        numbers = range(first, first + body.choices)
        ids = [f"{context.id}-{number}" if several else context.id for number in numbers]
        for number, own in zip(numbers, sequences(ids, seed), strict=True):
            try:
                asked = prompt.ids if prompt.made is None else prompt.made
                answer = context.gateway.submit(model, asked, **own, **options)
            except (NeustreamError, TypeError, ValueError) as error:
                raise _named(of_request(error), body) from error
            logs = body.told is not None
            echoed = prompt.ids if echo and logs else []
            whole = partial(context.metrics.tell, Stopped(answer.id))
            stops = Stops(body.stops)
            choice = Choice(number, answer, stops, whole, prompt.text, echoed, most == 0, logs, reply.names)
            choice.least = body.min_tokens or 0
            reply.choices.append(choice)


def _named(wrong: HTTPError, body: TextBody) -> HTTPError:
    """What is wrong by the name of the field that the client gave."""
    given = {}
    if isinstance(body, ChatBody):
        longer = body.max_completion_tokens is not None
        given = {"prompt": "messages", "max_tokens": "max_completion_tokens" if longer else "max_tokens"}
    return replace(wrong, param=given.get(wrong.param or "", wrong.param))


def _sampling(body: TextBody, model: TextModel) -> dict[str, Any]:
    """How tokens are chosen, as backends are told it; what the client leaves open is not among it."""
    temperature = model.temperature if body.temperature is None else body.temperature
    found: dict[str, Any] = {
        "temperature": max(temperature, COOL) if temperature >= COLDEST else 0.0,
        "stop_token_ids": body.stop_token_ids or (),
        "ignore_eos": body.ignore_eos,
    }
    found |= {name: value for name in AS_THEY_ARE if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        found["top_k"] = max(body.top_k, 0)
    if body.logit_bias:
        found["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return found


async def _tokens(context: Context, model: TextModel | AgentModel, reply: Reply) -> Events:
    """The tokens of all choices as they come; HTTPError as soon as one comes to nothing.

    Where more than `undelivered` of them wait for a client that does not read, its request ends.
    """
    news = asyncio.Event()
    ends: list[HTTPError] = []

    def hear() -> None:
        news.set()
        if reply.outlet.blocked and sum([feed.waiting for _, feed in feeds]) >= context.config.limits.undelivered:
            reply.outlet.full.set()

    def end(why: HTTPError) -> None:
        ends.append(why)
        news.set()

    feeds = [(choice, Feed(choice.answer, hear)) for choice in reply.choices]
    until = asyncio.get_running_loop().time() + reply.promise.timeout_s
    ids = [choice.answer.id for choice in reply.choices]
    patience = context.gateway.patience(model, reply.promise.slo, ids, end)
    reading = feeds
    try:
        while reading:
            news.clear()
            came, failed = _taken(reading)
            if came:
                for choice, _ in came:
                    if not choice.count:
                        choice.began_s = context.gateway.waited_s(choice.answer.id)
                patience.outputs += len(came)
                yield came
            if failed is not None or ends:
                raise of_request(failed or ends[0]) from failed
            reading = [(choice, feed) for choice, feed in reading if not feed.over]
            # what comes from now on rings; what came with an end does not
            if reading and not (news.is_set() or any(feed.done for _, feed in reading)):
                await _within(news.wait(), until)
    finally:
        patience.end()
        for choice, feed in feeds:
            feed.close()
            choice.answer.cancel()


def _taken(feeds: Sequence[tuple[Choice, Feed]]) -> tuple[Tokens, BaseException | None]:
    """What came for some choices, and what one of them came to if it has failed."""
    came: Tokens = []
    for choice, feed in feeds:
        try:
            came += [(choice, token) for token in feed.take() if token is not None]
        except CancelledError:
            continue  # by us: a stop string was met, or nobody listens
        except Exception as error:  # noqa: BLE001  it is raised behind the tokens that came
            return came, error
    return came, None


async def _within(coming: Awaitable[Any], until: float) -> None:
    """Wait; HTTPError if that takes until then."""
    if math.isinf(until):
        await coming
        return
    try:
        async with asyncio.timeout_at(until):
            await coming
    except TimeoutError:
        raise HTTPError(504, "its time ran out", "expired") from None


# -- answers ------------------------------------------------------------------------------------------


async def _whole(context: Context, reply: Reply, events: Events) -> Response:
    async def all_of_it() -> None:
        async for came in events:
            for choice, token in came:
                if choice.finish_reason is None:
                    choice.take(token)

    await while_there(context.request.receive, all_of_it())
    headers = context.headers(reply.promise)
    if reply.promise.slo.promises:
        headers["x-neustream-outcome"] = "on_time" if reply.kept()["on_time"] else "late"
    return JSONResponse(reply.whole(), headers=headers)


async def _stream(context: Context, body: TextBody, reply: Reply, events: Events) -> Response:
    options = body.stream_options or StreamOptions()
    return await stream_of(context, chunks(reply, options, events), context.headers(reply.promise), reply.outlet)
