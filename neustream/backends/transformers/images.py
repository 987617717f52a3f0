"""Prompts with images, as callers give them: text, messages, or what a processor made of both."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from neustream.backends.transformers.eyes import Eyes
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.request import is_chat, tokens_of
from neustream.backends.transformers.sight import Sight
from neustream.errors import BackendError, RequestError, shown, told

OTHERS = ("video", "audio")
"""Parts of messages that are neither text nor images."""
WAYS = ("url", "path", "base64")
"""Where else a part of a message may have its image: nothing is fetched or opened here."""


class Reader:
    """Makes token ids of prompts, and of their images what the vision tower is to be given.

    Args:
        eyes: None: the model has none.
        processor: the model's processor, or a tokenizer: then there are no images. None: token ids only.
    """

    def __init__(self, model: LanguageModel, eyes: Eyes | None, processor: Any) -> None:
        self._model, self._eyes, self._processor = model, eyes, processor
        self._lock = threading.Lock()  # processors keep settings of a call in their tokenizer
        self.sees = eyes is not None and is_processor(processor)
        self.marker = str(_marker(processor)) if self.sees else ""

    def read(
        self,
        prompt: Any,
        images: Any = None,
        tools: Any = None,
        template: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], Sight | None]:
        """Token ids and images of a prompt; RequestError if it is none, or for what is no image."""
        given = checked(images)
        if isinstance(prompt, Mapping) and prompt.get("pixel_values") is not None:
            self._check_sees()
            if given:
                raise RequestError("give images, or what the processor made of them, not both")
            return self.made(prompt)
        if is_chat(prompt):
            prompt, own = _parts(prompt, given)
            if own:
                self._check_sees()
            if self.sees:
                return self._read(self._rendered(prompt, tools, template or {}), own)
        elif given:
            self._check_sees()
            if not isinstance(prompt, str):
                raise RequestError(f"images go with a prompt of text or messages, got {type(prompt).__name__}")
            return self._read(prompt, given)
        if isinstance(prompt, str) and self.sees:
            self._check_count(prompt, 0)
        return tokens_of(self._model, tokenizer_of(self._processor), prompt, tools, template), None

    def chat(self, messages: Sequence[Any], template: Mapping[str, Any] | None = None) -> Any:
        """Messages as a prompt that `read` takes: token ids, or what the processor makes of text and images.

        RequestError as of `read`.
        """
        self._check_sees()
        plain, images = _parts(messages, [])
        text = self._rendered(plain, None, template or {})
        self._check_count(text, len(images))
        return self.process(text, images) if images else tokens_of(self._model, tokenizer_of(self._processor), text)

    # -- inside -----------------------------------------------------------------------------------

    def _check_sees(self) -> None:
        if self._eyes is None:
            raise RequestError(f"{self._model.name} has no eyes: it takes no images")
        if not self.sees:
            raise RequestError(f"images for {self._model.name} need its processor: serve(model, processor)")

    def _check_count(self, text: str, images: int) -> None:
        there = text.count(self.marker)
        if there != images:
            raise RequestError(
                f"the prompt has {there} place(s) for images ({self.marker!r}), and there are {images} image(s)"
            )

    def _rendered(self, messages: Sequence[Any], tools: Any, template: Mapping[str, Any]) -> str:
        """What the chat template makes of messages."""
        if not getattr(self._processor, "chat_template", None):
            raise RequestError("a prompt of messages needs a processor with a chat template")
        options = {"add_generation_prompt": True, **template, "tokenize": False}
        if tools is not None:
            options["tools"] = tools
        try:
            text: str = self._processor.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is a program of the model's makers
            raise RequestError(f"the chat template cannot take these messages: {told(error)}") from error
        return text

    def _read(self, text: str, images: Sequence[Any]) -> tuple[list[int], Sight | None]:
        """A text with its images; without any it is a text like others."""
        self._check_count(text, len(images))
        if not images:
            return tokens_of(self._model, tokenizer_of(self._processor), text), None
        return self.made(self.process(text, images))

    def process(self, text: str, images: Sequence[Any]) -> Mapping[str, Any]:
        """What the processor makes of a text with images; RequestError if it cannot take them."""
        tokenizer = tokenizer_of(self._processor)
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        options = {"add_special_tokens": False} if begun else {}
        try:
            with self._lock:
                made: Mapping[str, Any] = self._processor(
                    text=text, images=list(images), return_tensors="pt", **options
                )
        except Exception as error:  # files that end too soon, sizes that a processor does not take
            raise RequestError(f"the processor cannot take this prompt with its images: {told(error)}") from error
        return made

    def made(self, made: Mapping[str, Any]) -> tuple[list[int], Sight]:
        """Token ids and images that a processor made."""
        assert self._eyes is not None
        ids = _flat(made.get("input_ids"))
        mask = made.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise RequestError("attention_mask: a prompt has no padding")
        token = self._eyes.token
        tokens_of(
            self._model, None, [one for one in ids if one != token] or [0]
        )  # an image token may have no embedding
        return ids, self._eyes.sight(ids, made)


def is_processor(processor: Any) -> bool:
    """Whether it makes tensors of images, and has a tokenizer for the rest."""
    return hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer in a processor; itself, where it is one."""
    return processor.tokenizer if is_processor(processor) else processor


def checked(images: Any) -> list[Any]:
    """A caller's images; RequestError for what is none."""
    if images is None:
        return []
    if isinstance(images, str | bytes | Mapping | np.ndarray) or not isinstance(images, Sequence):
        raise RequestError(f"images must be a list of PIL images or arrays, got {type(images).__name__}")
    return [_image(f"image {at}", one) for at, one in enumerate(images)]


def _image(name: str, value: Any) -> Any:
    """An image as processors take it."""
    if isinstance(value, np.ndarray):
        return _array(name, value)
    if not isinstance(value, Image.Image):
        raise RequestError(f"{name} must be a PIL image or an array [height, width, 3], got {type(value).__name__}")
    if not all(value.size):
        raise RequestError(f"{name} is empty: {value.width} x {value.height} pixels")
    return value


def _array(name: str, value: np.ndarray) -> Any:
    shape = value.shape
    if value.dtype != np.uint8:
        raise RequestError(f"{name} must have values from 0 to 255 as uint8, got {value.dtype}")
    if len(shape) != 3 or shape[2] != 3 or not value.size:
        raise RequestError(f"{name} must be an array [height, width, 3], got {list(shape)}")
    return value


def _parts(messages: Sequence[Any], images: list[Any]) -> tuple[list[Any], list[Any]]:
    """Messages without the images in their parts, and these in order; `images` are of parts that have none."""
    found: list[Any] = []
    bare = 0
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            plain.append(message)
            continue
        parts = []
        for part in content:
            if not _for_image(part):
                parts.append(part)
                continue
            parts.append({"type": "image"})
            if part.get("image") is None:
                bare += 1
            else:
                found.append(_image(f"the image of a message ({len(found)})", part["image"]))
        plain.append({**message, "content": parts})
    if found and images:
        raise RequestError("give images in the messages or as images=, not both")
    if bare != len(images):
        raise RequestError(f"the messages have {bare} part(s) for images without one, and images= has {len(images)}")
    return plain, found or images


def _for_image(part: Any) -> bool:
    """Whether a part of a message is for an image; RequestError for what is not served."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in OTHERS:
        raise RequestError(f"a message has a part of type {kind!r}: only text and images are served")
    if kind != "image":
        return False
    for way in WAYS:
        if way in part:
            raise RequestError(f"a message has an image by {way}: give the PIL image as 'image'")
    return True


def _marker(processor: Any) -> Any:
    """The text at whose places a processor puts images."""
    found = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
    if found is None:
        raise BackendError(f"{type(processor).__name__} names no image token")
    return found


def _flat(ids: Any) -> list[int]:
    """Token ids of one prompt, of which a processor makes a batch of one."""
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
        raise RequestError(f"input_ids must be those of one prompt, got {shown(found)}")
    return found
