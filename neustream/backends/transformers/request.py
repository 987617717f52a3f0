"""What a caller asks for, checked before it is queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from neustream.backends.transformers.arguments import whole
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.text import Ask
from neustream.errors import RequestError, shown


def ask_of(
    model: LanguageModel, tokenizer: Any, prompt: Any, max_tokens: Any, sampling: Sampling, room: int | None = None
) -> Ask:
    """What the model is asked: RequestError if the prompt is none, or if it and its outputs do not fit.

    `room`: tokens that the pool's memory holds.
    """
    ids = _ids(model, tokenizer, prompt)
    check_length(model, len(ids), max_tokens, room)
    if beyond := [token for token in sampling.stop_token_ids if token >= model.vocabulary]:
        raise RequestError(f"stop_token_ids: {shown(beyond[0])} is no token: the vocabulary has {model.vocabulary}")
    if sampling.min_tokens > int(max_tokens):
        raise RequestError(f"min_tokens={sampling.min_tokens} is more than max_tokens={int(max_tokens)}")
    return Ask(ids, sampling)


def check_length(model: LanguageModel, prompt: int, max_tokens: Any, room: int | None = None) -> None:
    """RequestError if so many tokens of prompt and outputs do not fit the model or the memory, or are too few."""
    max_tokens = whole("max_tokens", max_tokens, 1, allowed="a whole number of 1 or more")
    if prompt < 1:
        raise RequestError("the prompt is empty: there is nothing to go on from")
    limit, what = model.max_len, f"max_len is {model.max_len}"
    if model.positions == limit:
        what = f"{model.name} has {limit} positions"
    if room is not None and room < limit:
        limit, what = room, f"the memory has room for {room}"
    if prompt >= limit:
        raise RequestError(f"the prompt has {prompt} tokens, but {what}: at most {limit - 1}, and an output")
    if prompt + max_tokens > limit:
        raise RequestError(
            f"{prompt} tokens of prompt and max_tokens={shown(max_tokens)} make {shown(prompt + max_tokens)}, "
            f"but {what}: at most max_tokens={limit - prompt}"
        )


def _ids(model: LanguageModel, tokenizer: Any, prompt: Any) -> list[int]:
    """The token ids of a prompt; RequestError if it is none."""
    if isinstance(prompt, str):
        return _checked(model, _of_text(tokenizer, prompt))
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what tokenizers return
        prompt = prompt["input_ids"]
    if hasattr(prompt, "tolist"):  # numpy, torch
        ids = prompt.tolist()
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        ids = list(prompt)
    else:
        raise RequestError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")
    if isinstance(ids, list) and ids and isinstance(ids[0], Mapping):
        raise RequestError(
            "a prompt must be text or a list of token ids, got messages of a chat: give "
            "tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
        )
    return _checked(model, ids)


def _of_text(tokenizer: Any, text: str) -> Any:
    """What a tokenizer makes of a text; a BOS that the text begins with is not put before it again."""
    if tokenizer is None:
        raise RequestError("a prompt of text needs a tokenizer: serve(model, tokenizer), or give token ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise RequestError(f"the prompt is no text: {lone!r} at {error.start} is half a character") from None
    ids = tokenizer(text)["input_ids"]
    first = getattr(tokenizer, "bos_token", None)
    if not first or not text.startswith(first):
        return ids
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]  # a chat template has its own BOS
    return ids[1:] if ids[1 : len(plain) + 1] == plain and ids[0] == tokenizer.bos_token_id else ids


def _checked(model: LanguageModel, ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise RequestError(f"a prompt must be a list of token ids, got {shown(ids)}")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"a prompt must be a flat list of token ids, got {type(token).__name__} in it")
        if not 0 <= int(token) < model.known:
            raise RequestError(f"{shown(token)} is no token: the vocabulary of {model.name} has {model.known}")
    return [int(token) for token in ids]
