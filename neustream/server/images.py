"""Images: made of a prompt, or of a picture."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.engine.clock import date
from neustream.errors import NeustreamError, nearest
from neustream.server.bodies import ImageBody, unsupported
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request
from neustream.server.forms import Edit, edit_of
from neustream.server.models import ImageModel
from neustream.server.pictures import encoded, mask_of, picture_of
from neustream.server.promises import Promised
from neustream.server.shown import Shown, events
from neustream.server.wire import EventStream, Outlet, while_there
from neustream.service.answer import Answer

LONG = 10**6
"""The size of work that is never done on the event loop."""


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    context = Context.of(request)
    body = await context.body(ImageBody)
    model = context.gateway.image(body.model)
    _check(body, model)
    context.gateway.admit(model)
    return await _serve(Job(context, body, model, {}, "image_generation"))


async def edits(request: Request) -> Response:
    """POST /v1/images/edits."""
    context = Context.of(request)
    edit = await edit_of(context)
    model = context.gateway.editor(edit.body.model)
    _check(edit.body, model)
    _check_pictures(edit, model)
    context.gateway.admit(model)
    most = context.config.limits.pixels * 10**6
    pictures = await context.gateway.think(_pictures, edit, model, most, size=LONG)
    return await _serve(Job(context, edit.body, model, pictures, "image_edit"))


class Job:
    """A request for images on its way.

    Args:
        pictures: `image` and `mask` of an edit.
        event: what its events are called, as OpenAI does.

    Attributes:
        until: when its time is over, on the event loop's clock.
    """

    def __init__(
        self,
        context: Context,
        body: ImageBody,
        model: ImageModel,
        pictures: Mapping[str, Any],
        event: str,
    ) -> None:
        self.context = context
        self.body = body
        self.model = model
        self.pictures = pictures
        self.event = event
        self.promise: Promised = context.promise(body, model.slo)
        self.until = asyncio.get_running_loop().time() + self.promise.timeout_s
        self.answers: list[Answer[Any]] = []
        self.shown = Shown(context.gateway, model, context.id, body.partial_images or 0)

    async def submit(self, number: int) -> None:
        """Ask for one of its images; HTTPError for what cannot be served."""
        id = f"{self.context.id}-{number}" if self.body.count > 1 else self.context.id

        def ask() -> Answer[Any]:
            arguments = self.model.arguments(self.body, number, self.pictures)
            if self.shown.count:
                arguments["on_step"] = self.shown.watcher(number)
            slo = self.promise.slo
            return self.context.gateway.submit(self.model, slo=slo, id=id, **arguments)

        try:
            # the stock call looks at its arguments first: a thread's work
            self.answers.append(await self.context.gateway.think(ask, size=LONG))
        except (NeustreamError, TypeError, ValueError) as error:
            raise of_request(error) from error

    async def image(self, number: int) -> str:
        """An image in base64; HTTPError if it came to nothing."""
        answer = self.answers[number]
        until = None if math.isinf(self.until) else self.until
        try:
            async with asyncio.timeout_at(until):
                output = await answer
        except TimeoutError:
            raise HTTPError(504, "its time ran out", "expired") from None
        except asyncio.CancelledError:
            if answer.cancelled():
                raise HTTPError(503, "cancelled", "cancelled") from None
            raise
        except Exception as error:
            raise of_request(error) from error
        return await self.encoded(output.images[0])

    async def images(self) -> list[str]:
        """All of them."""
        return [await self.image(number) for number in range(len(self.answers))]

    async def encoded(self, picture: Any) -> str:
        """A picture in the format that is asked for."""
        kind = self.body.output_format or "png"
        text: str = await self.context.gateway.think(encoded, picture, kind, size=LONG)
        return text

    @property
    def outcome(self) -> str:
        """Whether the promise was kept."""
        kept = all(answer.ended is not None and answer.ended.on_time for answer in self.answers)
        return "on_time" if kept else "late"

    def cancel(self) -> None:
        """Give up what is not done."""
        for answer in self.answers:
            answer.cancel()
        self.shown.cancel()


async def _serve(job: Job) -> Response:
    body, context = job.body, job.context
    try:
        for number in range(body.count):
            await job.submit(number)
        if body.stream:
            return await _stream(job)
        made = await while_there(context.request.receive, job.images())
    except BaseException:
        job.cancel()
        raise
    content = {
        "created": int(date()),
        "data": [{"b64_json": image} for image in made],
        "output_format": body.output_format or "png",
    }
    if body.pixels is not None:
        content["size"] = body.size
    headers = context.headers(job.promise)
    if job.promise.slo.promises:
        headers["x-neustream-outcome"] = job.outcome
    return JSONResponse(content, headers=headers)


async def _stream(job: Job) -> Response:
    parts = events(job)
    first = await while_there(job.context.request.receive, anext(parts))
    stream: Any = EventStream(
        first,
        parts,
        job.context.headers(job.promise),
        outlet=Outlet(),
        failed=job.context.cut,
    )
    response: Response = stream
    return response


# -- what is asked ------------------------------------------------------------------------------------


def _check(body: ImageBody, model: ImageModel) -> None:
    """HTTPError for what cannot be done."""
    name, hint = unsupported(body), ""
    if body.response_format == "url":
        name, hint = "response_format", "; answers carry the image: use b64_json"
    if body.partial_images and not model.previews:
        name, hint = "partial_images", f" for model {model.name!r}"
    if name is not None:
        text = f"{name} is not supported by this server{hint}"
        raise HTTPError(400, text, "unsupported", name)
    if body.partial_images and not body.stream:
        raise HTTPError(400, "partial_images: needs stream: true", "invalid", "partial_images")
    if body.pixels is not None and body.size not in model.sizes:
        text = f"size {body.size!r}: {nearest(body.size or '', model.sizes)}"
        raise HTTPError(400, text, "invalid", "size")


def _check_pictures(edit: Edit, model: ImageModel) -> None:
    if not edit.images:
        raise HTTPError(400, "image: it is needed", "invalid", "image")
    if len(edit.images) > 1:
        raise HTTPError(400, f"image: one is taken, got {len(edit.images)}", "unsupported", "image")
    if edit.mask is not None and not model.masks:
        raise HTTPError(400, f"mask is not supported by model {model.name!r}", "unsupported", "mask")


def _pictures(edit: Edit, model: ImageModel, most: int) -> dict[str, Any]:
    """The pictures of an edit, decoded; HTTPError for what are none, or do not fit together."""
    image = picture_of(edit.images[0], "image", most)
    if not model.masks:
        return {"image": image}
    mask = None if edit.mask is None else picture_of(edit.mask, "mask", most)
    if mask is not None and mask.size != image.size:
        sizes = " x ".join(map(str, mask.size)), " x ".join(map(str, image.size))
        raise HTTPError(400, f"mask: {sizes[0]} pixels, but image has {sizes[1]}", "invalid", "mask")
    where = mask_of(image, mask)
    if where is None:
        text = "mask: it is needed, or an image that is transparent where it is to be edited"
        raise HTTPError(400, text, "invalid", "mask")
    return {"image": image, "mask": where}
