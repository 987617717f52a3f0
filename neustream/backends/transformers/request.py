"""What a caller asks for, checked before it is queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from neustream.backends.transformers.defaults import Defaults
from neustream.backends.transformers.facts import told_positions
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.sight import Sight
from neustream.backends.transformers.text import Ask
from neustream.backends.values import whole
from neustream.errors import RequestError, shown, told

BESIDE = ("inputs_embeds", "position_ids", "decoder_input_ids", "past_key_values")
"""What `generate` takes beside token ids, and a prompt does not."""


@dataclass(frozen=True, slots=True)
class Room:
    """How long texts may be; plain data, so it can leave the process.

    Args:
        name: of the model.
        limit: tokens of prompt and outputs, at most: what the model and the pool's memory hold.
        length: what the model holds.
        positions: that the model has; where an encoder reads the prompt, for outputs.
        read: that an encoder has for the prompt; None: there is none, or it has as many as one likes.
        begins: tokens that outputs begin with where an encoder reads the prompt; None: they go on from the prompt.
        defaults: what requests get that do not say how long they may be.
    """

    name: str
    limit: int
    length: int
    positions: int | None
    read: int | None
    begins: int | None
    defaults: Defaults

    @property
    def reads(self) -> int:
        """Tokens of a prompt, at most: an output has room behind it."""
        return self.limit - 1 if self.read is None else min(self.limit - 1, self.read)

    def writes(self, prompt: int) -> int:
        """Outputs behind a prompt of so many tokens, at most; 0 or fewer: there is no room."""
        left = self.limit - prompt
        return left if self.begins is None or self.positions is None else min(left, self.positions - self.begins)

    def outputs(self, prompt: int) -> int:
        """Outputs behind a prompt of so many tokens where it is not said how many; RequestError: there are none."""
        begins = prompt if self.begins is None else self.begins
        return self.defaults.tokens(begins, max(self.writes(prompt), 1))

    @property
    def why(self) -> str:
        if self.limit < self.length:
            return f"the memory has room for {self.limit}"
        if self.positions == self.limit:
            return f"{self.name} has {self.limit} positions"
        if self.begins is not None and self.positions is not None:
            return f"{self.name} has {told_positions(self.positions, self.read)}, and max_len is {self.limit}"
        return f"max_len is {self.limit}"


def ask_of(
    model: LanguageModel,
    tokenizer: Any,
    ids: list[int],
    max_tokens: Any,
    sampling: Sampling,
    room: Room,
    sight: Sight | None = None,
    adapter: str | None = None,
) -> Ask:
    """What the model is asked: RequestError if prompt and outputs do not fit, or for tokens that are none."""
    check_length(len(ids), max_tokens, room)
    vocabulary = model.vocabulary
    for name, tokens in sampling.named.items():
        if beyond := [token for token in tokens if token >= vocabulary]:
            raise RequestError(
                f"{name}: {shown(beyond[0])} is no token: the vocabulary has {vocabulary}", argument=name
            )
    if sampling.min_tokens > int(max_tokens):
        text = f"min_tokens={sampling.min_tokens} is more than max_tokens={int(max_tokens)}"
        raise RequestError(text, argument="min_tokens")
    if model.begins is not None and sampling.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is for models without an encoder: its tokens have no likelihood")
    if sampling.stop and tokenizer is None:
        raise RequestError("stop needs a tokenizer: serve(model, tokenizer), or give stop_token_ids")
    if sight is not None and sampling.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is for prompts without images: an image's tokens have no likelihood")
    return Ask(ids, sampling, sight=sight, most=int(max_tokens), adapter=_adapter(model, adapter))


def _adapter(model: LanguageModel, name: Any) -> str | None:
    """The adapter that is asked for; None: what the model has active. RequestError for one that is not there."""
    if name is None or model.adapters is not None:
        return None if model.adapters is None else model.adapters.chosen(name)
    raise RequestError(f"adapter={shown(name)}: {model.name} has no adapters")


def check_length(prompt: int, max_tokens: Any, room: Room) -> None:
    """RequestError if so many tokens of prompt and outputs do not fit the model or the memory, or are too few."""
    max_tokens = whole("max_tokens", max_tokens, 1, allowed="a whole number of 1 or more")
    if prompt < 1:
        raise RequestError("the prompt is empty: there is nothing to go on from", argument="prompt")
    if prompt > room.reads:
        text = f"the prompt has {prompt} tokens, but {room.why}: at most {room.reads}, and an output"
        raise RequestError(text, argument="prompt")
    if max_tokens > room.writes(prompt):
        raise RequestError(
            f"{prompt} tokens of prompt and max_tokens={shown(max_tokens)} make {shown(prompt + max_tokens)}, "
            f"but {room.why}: at most max_tokens={room.writes(prompt)}",
            argument="max_tokens",
        )


def tokens_of(
    model: LanguageModel, tokenizer: Any, prompt: Any, tools: Any = None, template: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a prompt; RequestError if it is none.

    `tools`, `template`: for messages of a chat, beside them, to the tokenizer's chat template.
    """
    if is_chat(prompt):
        return _checked(model, _of_chat(tokenizer, prompt, tools, template or {}))
    if tools is not None or template:
        name = "chat_template_kwargs" if tools is None else "tools"
        raise RequestError(f"{name} is for a prompt of messages, got {type(prompt).__name__}")
    if isinstance(prompt, str):
        return _checked(model, _of_text(tokenizer, prompt))
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what tokenizers return
        _check_alone(prompt)
        prompt = _only(prompt["input_ids"])
    if hasattr(prompt, "tolist"):  # numpy, torch
        ids = _only(prompt.tolist())
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        ids = list(prompt)
    else:
        raise RequestError(f"a prompt must be text, messages or a list of token ids, got {type(prompt).__name__}")
    return _checked(model, ids)


def _only(ids: Any) -> Any:
    """The prompt of a batch of one, as tokenizers return it for tensors; what is no batch as it is."""
    if not isinstance(ids, list) or not ids or not isinstance(ids[0], list):
        return ids
    if len(ids) > 1:
        raise RequestError(f"a request has one prompt, got a batch of {len(ids)}")
    return ids[0]


def _check_alone(made: Mapping[str, Any]) -> None:
    """RequestError for what `input_ids` come with that would change what they mean."""
    mask = made.get("attention_mask")
    if mask is not None and not np.asarray(mask).all():
        raise RequestError("attention_mask: a prompt has no padding")
    for name in BESIDE:
        if made.get(name) is not None:
            raise RequestError(f"{name} beside input_ids is not taken: a prompt is its token ids")


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


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is messages, each a mapping."""
    if isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _of_chat(tokenizer: Any, messages: Sequence[Any], tools: Any, template: Mapping[str, Any]) -> Any:
    """What the tokenizer's chat template makes of messages, with the beginning of an answer behind them."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("a prompt of messages needs a tokenizer with a chat template")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"each message is a dict with a role and a content, got {shown(message)}")
    options = {"add_generation_prompt": True, **template, "tokenize": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, **options)
    except Exception as error:  # a template is a program of the model's makers
        raise RequestError(f"the chat template cannot take these messages: {told(error)}") from error


def _checked(model: LanguageModel, ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise RequestError(f"a prompt must be a list of token ids, got {shown(ids)}")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"a prompt must be a flat list of token ids, got {type(token).__name__} in it")
        if not 0 <= int(token) < model.known:
            raise RequestError(f"{shown(token)} is no token: the vocabulary of {model.name} has {model.known}")
    return [int(token) for token in ids]
