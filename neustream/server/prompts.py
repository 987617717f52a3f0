"""Prompts of clients: texts, token ids, and chats, with images where the model has eyes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neustream.errors import NeustreamError
from neustream.server.bodies import ChatBody, Message, TextPart
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request
from neustream.server.models import TextModel, ids_of
from neustream.server.pictures import of_data_url, picture_of

LONG = 10**6
"""The size of work that is never done on the event loop."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and its text where an answer is to begin with it.

    `made`: what the service is asked, of a prompt with images.
    """

    ids: list[int]
    text: str = ""
    made: Any = None


async def prompt_of(context: Context, model: TextModel, prompt: str | list[int], *, echo: bool) -> Prompt:
    """The prompt of a completion; `echo`: with its text."""
    think = context.gateway.think
    if isinstance(prompt, str):
        ids = await think(model.encode, prompt, size=len(prompt))
        return Prompt(ids, prompt if echo else "")
    text = await think(model.decode, prompt, size=len(prompt)) if echo else ""
    return Prompt(prompt, text)


async def prompt_of_chat(context: Context, model: TextModel, body: ChatBody) -> Prompt:
    """The prompt of a chat; HTTPError for images that the model does not look at, or that are none."""
    urls, arguments = body.images, body.chat_template_kwargs or {}
    think = context.gateway.think
    if urls and model.see is None:
        raise HTTPError(400, f"model {model.name!r} takes no images", "unsupported", "messages")
    if model.see is None:
        messages = [{"role": each.role, "content": each.text} for each in body.messages]
        size = sum([len(each["content"]) for each in messages])
        return Prompt(await think(model.chat, messages, arguments, size=size))
    limits = context.config.limits
    if len(urls) > limits.images:
        raise HTTPError(413, f"messages: {len(urls)} images; at most {limits.images}", "too_large", "messages")
    size = LONG if urls else sum([len(each.text) for each in body.messages])
    made = await think(_seen, model, body.messages, urls, limits.pixels * 10**6, arguments, size=size)
    return Prompt(ids_of(made), made=made)


def _seen(
    model: TextModel, messages: Sequence[Message], urls: Sequence[str], pixels: int, arguments: dict[str, Any]
) -> Any:
    """What the model's processor makes of messages, with their images in RGB."""
    assert model.see is not None
    model.check_length(sum([len(message.text) for message in messages]), "messages")
    images = []
    for url in urls:
        picture = picture_of(of_data_url(url, "messages"), "messages", pixels)
        pixels -= picture.width * picture.height
        images.append(picture.convert("RGB"))
    found = iter(images)
    asked = []
    for message in messages:
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image", "image": next(found)}
            for part in message.parts
        ]
        asked.append({"role": message.role, "content": parts})
    try:
        return model.see(asked, arguments)
    except NeustreamError as error:
        raise of_request(error) from error
