"""POST /v1/images/edits in its two forms, multipart and JSON, as one body with its pictures' bytes."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from neustream.server.bodies import EditBody
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_validation
from neustream.server.pictures import of_data_url
from neustream.server.wire import raw_body

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong with a form is told to who sent it
TEXTS = frozenset(("model", "prompt", "user", "size", "response_format", "output_format", "negative_prompt"))
"""Fields of a form that are text; all others are JSON."""
ANY: TypeAdapter[Any] = TypeAdapter(Any)
MOST_PARTS = 64
PICTURES = {"image": "image", "image[]": "image", "mask": "mask"}


@dataclass(frozen=True)
class Edit:
    """What is asked: the fields, the bytes of the pictures, and those of the mask, if there is one."""

    body: EditBody
    images: list[bytes]
    mask: bytes | None


async def edit_of(context: Context) -> Edit:
    """The request's body, in whichever form; HTTPError for what is none."""
    media = context.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        return await _of_form(context)
    body = await context.body(EditBody)
    mask = None if body.mask is None else of_data_url(_url(body.mask), "mask")
    return Edit(body, [of_data_url(each, "image") for each in body.pictures], mask)


def _url(value: Any) -> str:
    return value if isinstance(value, str) else str(value.image_url)


async def _of_form(context: Context) -> Edit:
    context.gateway.check()
    limits = context.config.limits
    most = limits.image_body_kb * 1024
    raw = await raw_body(context.request, most, context.config.http.body_timeout_s)
    form = await _parsed(context.request.headers, raw, most)
    try:
        fields, pictures = await _parts(form)
    finally:
        await form.close()
    if len(pictures["mask"]) > 1:
        raise HTTPError(400, "mask: there is one at most", "invalid", "mask")
    try:
        body = EditBody.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error) from None
    context.noted(body)
    return Edit(body, pictures["image"], next(iter(pictures["mask"]), None))


async def _parts(form: FormData) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The fields of a form, and its pictures' bytes."""
    fields: dict[str, Any] = {}
    pictures: dict[str, list[bytes]] = {"image": [], "mask": []}
    for name, value in form.multi_items():
        if name in PICTURES:
            pictures[PICTURES[name]].append(await _bytes(name, value))
        elif isinstance(value, UploadFile):
            raise HTTPError(400, f"{name[:100]!r}: only image and mask are files", "invalid", name[:100])
        else:
            fields[name] = value if name in TEXTS else _json(value)
    return fields, pictures


async def _parsed(headers: Headers, raw: bytes, most: int) -> FormData:
    boundary = parse_options_header(headers["content-type"])[1].get(b"boundary")
    if boundary and b"\r\n--%b--" % boundary not in b"\r\n" + raw:  # a file that does not end is none for the parser
        raise HTTPError(400, f"the form has no end: no --{boundary.decode('latin-1')[:70]}--", "invalid")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield raw

    parser = MultiPartParser(headers, stream(), max_files=MOST_PARTS, max_fields=MOST_PARTS, max_part_size=most)
    parser.spool_max_size = most + 1  # nothing of it gets to a disk
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        raise HTTPError(400, f"the form cannot be read: {str(error)[:200]}", "invalid") from None


async def _bytes(name: str, value: UploadFile | str) -> bytes:
    """A picture of a form: a file, or a `data:` URL."""
    if isinstance(value, UploadFile):
        return await value.read()
    return of_data_url(value, PICTURES[name])


def _json(value: str) -> Any:
    try:
        return ANY.validate_json(value)
    except ValidationError:
        return value  # the field says what it should be
