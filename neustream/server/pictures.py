"""Pictures that clients send and get: decoded within limits, encoded in base64."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

from neustream.errors import told
from neustream.server.errors import HTTPError

FORMATS = ("PNG", "JPEG", "WEBP")
DATA = re.compile(r"data:image/[a-z]{3,8};base64,", re.IGNORECASE)
LONGEST_HEAD = 40


def of_data_url(text: str, param: str) -> bytes:
    """The bytes of a picture in a `data:` URL; HTTPError for anything else, which is never fetched."""
    head = DATA.match(text[:LONGEST_HEAD])
    if head is None:
        wrong = "a picture is a data: URL, data:image/png;base64,...; nothing is fetched"
        raise HTTPError(400, f"{param}: {wrong}", "invalid", param)
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPError(400, f"{param}: no base64: {error}", "invalid", param) from None


def picture_of(raw: bytes, param: str, most: int) -> Any:
    """A picture of at most `most` pixels, by its header before it is decoded; HTTPError for what is none."""
    from PIL import Image, ImageOps

    try:
        found = Image.open(io.BytesIO(raw), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(param, "hundreds of millions of", most) from None
    except Exception as error:  # noqa: BLE001  whatever a decoder makes of bytes
        kinds = ", ".join(kind.lower() for kind in FORMATS)
        text = f"{param}: no picture ({kinds}): {type(error).__name__}"
        raise HTTPError(400, text, "invalid", param) from None
    width, height = found.size
    if width * height > most:
        raise _too_large(param, f"{width} x {height}", most)
    try:
        found.load()
        return ImageOps.exif_transpose(found)
    except Exception as error:  # noqa: BLE001  whatever a decoder makes of bytes
        raise HTTPError(400, f"{param}: it cannot be decoded: {told(error)}", "invalid", param) from None


def _too_large(param: str, shown: str, most: int) -> HTTPError:
    return HTTPError(413, f"{param}: {shown} pixels; at most {most}", "too_large", param)


def mask_of(picture: Any, mask: Any | None) -> Any | None:
    """What is to be edited, in white; None if neither the mask nor the picture says it.

    It is where the mask (the picture, without one) is transparent; of a mask without transparency,
    where it is white.
    """
    from PIL import ImageOps

    said = picture if mask is None else mask
    if "A" in said.getbands():
        return ImageOps.invert(said.getchannel("A"))
    if said.mode == "P" and "transparency" in said.info:
        return ImageOps.invert(said.convert("RGBA").getchannel("A"))
    return None if mask is None else said.convert("L")


def fitted(picture: Any, size: tuple[int, int], mode: str) -> Any:
    """The picture in that size and mode."""
    from PIL import Image

    return picture.convert(mode).resize(size, Image.Resampling.LANCZOS)


def is_picture(value: Any) -> bool:
    """Whether a value is a picture, as PIL has them."""
    from PIL import Image

    return isinstance(value, Image.Image)


def encoded(picture: Any, kind: str) -> str:
    """A picture in base64, as png, jpeg or webp."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind.upper())
    return base64.b64encode(buffer.getvalue()).decode()
