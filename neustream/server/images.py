"""Images."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.engine.clock import date
from neustream.errors import NeustreamError, nearest
from neustream.server.bodies import ImageBody, unsupported
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request
from neustream.server.models import ImageModel
from neustream.server.promises import Promised
from neustream.server.wire import EventStream, Outlet, while_there
from neustream.service.answer import Answer


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    context = Context.of(request)
    body = await context.body(ImageBody)
    model = context.gateway.image(body.model)
    _check(body, model)
    context.gateway.admit(model)
    promise = context.promise(body, model.slo)
    answers: list[Answer[Any]] = []
    try:
        for number in range(body.count):
            answers.append(await _submit(context, body, model, promise, number))
        if body.stream:
            return await _stream(context, body, answers, promise)
        made = await while_there(request.receive, _all(answers, body, promise, context))
        content = {
            "created": int(date()),
            "data": [{"b64_json": image} for image in made],
            "output_format": body.output_format or "png",
        }
        if body.pixels is not None:
            content["size"] = body.size
        headers = context.headers(promise)
        if promise.slo.promises:
            headers["x-neustream-outcome"] = _outcome(answers)
        return JSONResponse(content, headers=headers)
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise


def _check(body: ImageBody, model: ImageModel) -> None:
    """HTTPError for what cannot be done."""
    name = unsupported(body)
    if body.response_format == "url":
        name = "response_format"
    if body.partial_images:
        name = "partial_images"
    if name is not None:
        hint = "; answers carry the image: use b64_json" if name == "response_format" else ""
        text = f"{name} is not supported by this server{hint}"
        raise HTTPError(400, text, "unsupported", name)
    if body.pixels is not None and body.size not in model.sizes:
        text = f"size {body.size!r}: {nearest(body.size or '', model.sizes)}"
        raise HTTPError(400, text, "invalid", "size")


async def _submit(context: Context, body: ImageBody, model: ImageModel, promise: Promised, number: int) -> Answer[Any]:
    several = body.count > 1

    def submit() -> Answer[Any]:
        arguments = model.arguments(body, number)
        return context.gateway.submit(
            model,
            slo=promise.slo,
            id=f"{context.id}-{number}" if several else context.id,
            **arguments,
        )

    try:
        # the stock call looks at its arguments first: a thread's work
        answer: Answer[Any] = await context.gateway.think(submit, size=10**6)
    except (NeustreamError, TypeError, ValueError) as error:
        raise of_request(error) from error
    return answer


async def _all(answers: list[Answer[Any]], body: ImageBody, promise: Promised, context: Context) -> list[str]:
    return [await _image(answer, body, promise, context) for answer in answers]


async def _image(answer: Answer[Any], body: ImageBody, promise: Promised, context: Context) -> str:
    """An image in base64; HTTPError if it came to nothing."""
    timeout = None if promise.timeout_s == float("inf") else promise.timeout_s
    try:
        async with asyncio.timeout(timeout):
            output = await answer
    except TimeoutError:
        raise HTTPError(504, "its time ran out", "expired") from None
    except asyncio.CancelledError:
        if answer.cancelled():
            raise HTTPError(503, "cancelled", "cancelled") from None
        raise
    except Exception as error:
        raise of_request(error) from error
    kind = body.output_format or "png"
    text: str = await context.gateway.think(_encoded, output.images[0], kind, size=10**6)
    return text


def _encoded(image: Any, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper())
    return base64.b64encode(buffer.getvalue()).decode()


def _outcome(answers: list[Answer[Any]]) -> str:
    kept = all(answer.ended is not None and answer.ended.on_time for answer in answers)
    return "on_time" if kept else "late"


async def _stream(context: Context, body: ImageBody, answers: list[Answer[Any]], promise: Promised) -> Response:
    events = _events(context, body, answers, promise)
    first = await while_there(context.request.receive, anext(events))
    stream: Any = EventStream(
        first,
        events,
        context.headers(promise),
        outlet=Outlet(),
        failed=context.cut,
    )
    response: Response = stream
    return response


async def _events(
    context: Context, body: ImageBody, answers: list[Answer[Any]], promise: Promised
) -> AsyncIterator[bytes]:
    """An event for each image."""
    try:
        for answer in answers:
            image = await _image(answer, body, promise, context)
            event = {
                "type": "image_generation.completed",
                "b64_json": image,
                "created_at": int(date()),
                "output_format": body.output_format or "png",
            }
            name = "event: image_generation.completed\n"
            yield f"{name}data: {json.dumps(event)}\n\n".encode()
    finally:
        for answer in answers:
            answer.cancel()
