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
from neustream.server.config import LimitConfig
from neustream.server.context import Context
from neustream.server.errors import HTTPError, forget_frames, of_request
from neustream.server.forms import Edit, edit_of
from neustream.server.models import ImageModel
from neustream.server.patience import Patience
from neustream.server.pictures import encoded, mask_of, picture_of
from neustream.server.promises import Promised, longest_ms
from neustream.server.shown import Shown, events
from neustream.server.streams import Outlet, stream_of
from neustream.server.wire import unless, while_there
from neustream.service.answer import Answer

LONG = 10**6
"""The size of work that is never done on the event loop."""


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    context = Context.of(request)
    body = await context.body(ImageBody)
    model = context.gateway.image(body.model)
    _check(body, model, context.config.limits)
    promise = context.promise(body, model.slo)
    context.gateway.admit(model, promise.slo)
    return await _serve(Job(context, body, model, promise, {}, "image_generation"))


async def edits(request: Request) -> Response:
    """POST /v1/images/edits."""
    context = Context.of(request)
    edit = await edit_of(context)
    model = context.gateway.editor(edit.body.model)
    _check(edit.body, model, context.config.limits)
    _check_pictures(edit, model)
    promise = context.promise(edit.body, model.slo)
    context.gateway.admit(model, promise.slo)
    most = context.config.limits.pixels * 10**6
    pictures = await context.gateway.think(_pictures, edit, model, most, size=LONG)
    return await _serve(Job(context, edit.body, model, promise, pictures, "image_edit"))


class Job:
    """A request for images on its way.

    Args:
        pictures: `image` and `mask` of an edit.
        event: what its events are called, as OpenAI does.

    Attributes:
        until: when its time is over, on the event loop's clock.
        tired: fails once it has waited for too long.
    """

    def __init__(
        self,
        context: Context,
        body: ImageBody,
        model: ImageModel,
        promise: Promised,
        pictures: Mapping[str, Any],
        event: str,
    ) -> None:
        self.context = context
        self.body = body
        self.model = model
        self.pictures = pictures
        self.event = event
        self.promise = promise
        loop = asyncio.get_running_loop()
        self.until = loop.time() + self.promise.timeout_s
        self.tired: asyncio.Future[Any] = loop.create_future()
        self._patience: Patience | None = None
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

        # the stock call looks at its arguments first: a thread's work, which nobody can end
        asked = asyncio.ensure_future(self.context.gateway.think(ask, size=LONG))
        try:
            self.answers.append(await asyncio.shield(asked))
        except asyncio.CancelledError:
            asked.add_done_callback(_give_up)
            raise
        except (NeustreamError, TypeError, ValueError) as error:
            raise of_request(error) from error

    async def submit_all(self) -> None:
        """Ask for all of its images."""
        for number in range(self.body.count):
            await self.submit(number)

    def watch(self) -> None:
        """See to it that they do not wait for ever."""
        ids = [answer.id for answer in self.answers]
        self._patience = self.context.gateway.patience(self.model, self.promise.slo, ids, self._tire)

    def _tire(self, why: HTTPError) -> None:
        if not self.tired.done():
            self.tired.set_exception(why)
            self.tired.exception()  # it is no fault if nobody waits any more

    async def image(self, number: int) -> str:
        """An image in base64; HTTPError if it came to nothing."""
        answer = self.answers[number]
        until = None if math.isinf(self.until) else self.until
        try:
            async with asyncio.timeout_at(until):
                output = await unless(answer, self.tired)
        except TimeoutError:
            raise HTTPError(504, "its time ran out", "expired") from None
        except asyncio.CancelledError:
            if answer.cancelled():
                raise HTTPError(503, "cancelled", "cancelled") from None
            raise
        except Exception as error:
            if isinstance(error, NeustreamError):  # others are logged with their frames
                forget_frames(error)
            raise of_request(error) from error
        return await self.encoded(output.images[0])

    async def images(self) -> list[str]:
        """All of them."""
        return await asyncio.gather(*[self.image(number) for number in range(len(self.answers))])

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

    @property
    def kept(self) -> dict[str, Any]:
        """How the promise was kept."""
        ends = [answer.ended for answer in self.answers]
        seconds = max([ended.latency_s for ended in ends if ended is not None], default=0.0)
        slack = self.promise.slo.total - seconds
        return {
            "on_time": self.outcome == "on_time",
            "queue_ms": longest_ms([None if ended is None else ended.waited_s for ended in ends]),
            "e2e_ms": round(seconds * 1e3, 3),
            "slack_ms": None if math.isinf(slack) else round(slack * 1e3, 3),
        }

    def about(self) -> dict[str, Any]:
        """What the access log says of it."""
        found = {"model": self.model.name, "images": len(self.answers)}
        return {**found, "class": self.promise.slo.name, **self.kept} if self.promise.slo.promises else found

    def end(self) -> None:
        """Nobody waits any more; what is not done is given up."""
        if self._patience is not None:
            self._patience.end()
        for answer in self.answers:
            answer.cancel()
        self.shown.cancel()


def _give_up(asked: asyncio.Future[Answer[Any]]) -> None:
    """Nobody waits any more for an image that was asked for meanwhile."""
    if not asked.cancelled() and asked.exception() is None:
        asked.result().cancel()


async def _serve(job: Job) -> Response:
    body, context = job.body, job.context
    context.about(job.about)
    try:
        await while_there(context.request.receive, job.submit_all())
        job.watch()
        if body.stream:
            return await stream_of(context, events(job), context.headers(job.promise), Outlet())
        made = await while_there(context.request.receive, job.images())
    except BaseException:
        job.end()
        raise
    job.end()
    content: dict[str, Any] = {
        "created": int(date()),
        "data": [{"b64_json": image} for image in made],
        "output_format": body.output_format or "png",
    }
    if body.pixels is not None:
        content["size"] = body.size
    if job.promise.report:
        content["neustream"] = job.kept
    headers = context.headers(job.promise)
    if job.promise.slo.promises:
        headers["x-neustream-outcome"] = job.outcome
    return JSONResponse(content, headers=headers)


# -- what is asked ------------------------------------------------------------------------------------


def _check(body: ImageBody, model: ImageModel, limits: LimitConfig) -> None:
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
        width, height = body.pixels
        if limits.allow_new_sizes and width * height <= limits.pixels * 10**6:
            return
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
