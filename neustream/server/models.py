"""What is behind a route: a language model or a pipeline, as the front knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel

from neustream.core.types import SLO
from neustream.errors import told
from neustream.server.admission import Began
from neustream.server.bodies import ImageBody
from neustream.server.errors import HTTPError

NOTHING = SLO()
"""Promises nothing."""
BATCH = 16
"""Requests of one step, where a model does not say."""
CHARACTERS = 32
"""Characters that a token has at most, for the check before a prompt is tokenised."""


class Own(Protocol):
    """An engine that one model has to itself, beside the service."""

    @property
    def fault(self) -> str:
        """Why it serves nothing any more; empty: it does."""
        ...

    @property
    def jobs(self) -> Mapping[str, Began]:
        """What it has, by id."""
        ...

    def submit(self, *args: Any, **options: Any) -> Any:
        """As `Service.submit`; on the event loop."""
        ...

    async def close(self) -> None:
        """End what is open, and stop; on the event loop."""
        ...


@dataclass(frozen=True)
class TextModel:
    """A language model.

    Args:
        tokenizer: None: it takes token ids only.
        max_len: tokens of a request, prompt and outputs.
        slo: what requests are promised that bring no promise.
        batch: requests of one step, at most.
        device: where the service has it; own: its engine, where it is not the service's.
        temperature: of requests that say none.
        adapter: that its requests have, of model `base`; empty: it is a model itself.
        see: makes the prompt of a chat with images, of its messages and arguments for the template, as
            the service takes it; None: the model takes no images.
        longest: outputs behind a prompt of so many tokens, if nobody says how many; None: up to `max_len`.
    """

    name: str
    tokenizer: Any
    max_len: int
    vocabulary: int
    slo: SLO = NOTHING
    batch: int = BATCH
    device: str = ""
    own: Own | None = None
    temperature: float = 1.0
    see: Callable[[list[dict[str, Any]], Mapping[str, Any]], Any] | None = None
    longest: Callable[[int], int] | None = None
    adapter: str = ""
    base: str = ""
    kind: Literal["text"] = "text"
    chats: ClassVar[bool] = True

    def encode(self, text: str, special: bool = True, param: str = "prompt") -> list[int]:
        """The tokens of the text of a field; HTTPError without a tokenizer, or for one that cannot fit."""
        if self.tokenizer is None:
            raise HTTPError(400, f"model {self.name!r} has no tokenizer: give token ids", "invalid", param)
        self.check_length(len(text), param)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def outputs(self, prompt: int) -> int:
        """Outputs behind a prompt of so many tokens, if nobody says how many."""
        return max(self.max_len - prompt, 1) if self.longest is None else self.longest(prompt)

    def check_length(self, characters: int, param: str) -> None:
        """HTTPError for a text of so many characters that it cannot fit."""
        if characters > CHARACTERS * self.max_len:
            text = f"the prompt has {characters} characters; {self.max_len} tokens have room for fewer"
            raise HTTPError(400, text, "invalid", param)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        if self.tokenizer is None:
            raise HTTPError(400, f"model {self.name!r} has no tokenizer", "invalid")
        if beyond := [token for token in ids if token >= self.vocabulary]:
            wrong = f"{beyond[0]} is no token: the vocabulary has {self.vocabulary}"
            raise HTTPError(400, wrong, "invalid", "tokens")
        text: str = self.tokenizer.decode(list(ids))
        return text

    def chat(self, messages: list[dict[str, str]], arguments: Mapping[str, Any]) -> list[int]:
        """The tokens of a chat by the model's own template; HTTPError without one."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            text = f"model {self.name!r} has no chat template; use /v1/completions"
            raise HTTPError(400, text, "unsupported", "messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        except Exception as error:  # of a template: it may raise anything
            raise HTTPError(400, f"the chat template: {told(error)}", "invalid", "messages") from error
        return self.encode(text, special=False, param="messages")


def count_of(prompt: Any) -> int:
    """Tokens of a prompt as services take it: token ids, or what a processor made of them and of images."""
    return len(ids_of(prompt))


def ids_of(prompt: Any) -> list[int]:
    """Token ids of such a prompt, those of images among them."""
    if not isinstance(prompt, Mapping):
        return list(prompt)
    found: list[int] = prompt["input_ids"].reshape(-1).tolist()
    return found


@dataclass(frozen=True)
class ImageModel:
    """A pipeline.

    Args:
        sizes: that are served.
        arguments: of its call, for an image of a request by its number; of an edit with its pictures,
            `image` and `mask`.
        generates, edits, masks: whether it makes images of a prompt alone, of a picture, of a picture
            and a mask; previews: whether it shows images under way.
        slo, batch, device, own: as of a `TextModel`.
    """

    name: str
    sizes: Sequence[str]
    arguments: Callable[[ImageBody, int, Mapping[str, Any]], dict[str, Any]]
    slo: SLO = NOTHING
    batch: int = BATCH
    device: str = ""
    own: Own | None = None
    generates: bool = True
    edits: bool = False
    masks: bool = False
    previews: bool = False
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class AgentModel:
    """An agent: a graph that calls other models of the service, and tools.

    Args:
        params: checks the parameters of a run; None: its graph takes any.
        ends_in: calls of language models of which each run makes one in the end; none: it answers no chats.
        slo, batch, device, own: as of a `TextModel`.
    """

    name: str
    params: type[BaseModel] | None = None
    slo: SLO = NOTHING
    batch: int = BATCH
    device: str = ""
    own: Own | None = None
    ends_in: frozenset[str] = frozenset()
    kind: Literal["agent"] = "agent"

    @property
    def chats(self) -> bool:
        """Whether it takes messages, and ends in a text."""
        return bool(self.ends_in) and (self.params is None or "messages" in self.params.model_fields)


Model = TextModel | ImageModel | AgentModel


def served_as(model: Model) -> str:
    """The name of the model that serves requests: an adapter's are those of its base."""
    return model.base or model.name if isinstance(model, TextModel) else model.name
