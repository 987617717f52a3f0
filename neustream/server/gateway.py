"""The models behind the routes, and the state that the server is in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from neustream.core.types import SLO
from neustream.errors import nearest, told
from neustream.server.bodies import ImageBody
from neustream.server.errors import HTTPError
from neustream.server.observe.gauges import Gauges
from neustream.server.observe.notes import Asked, Note, Unasked
from neustream.service.answer import Answer
from neustream.service.service import Service

log = logging.getLogger(__name__)

NOTHING = SLO()
"""Promises nothing."""
State = Literal["loading", "ready", "draining", "stopped", "failed"]
INLINE = 2000
"""Characters of a prompt that are tokenised on the event loop; longer ones on a thread."""
CHARACTERS = 32
"""Characters that a token has at most, for the check before a prompt is tokenised."""


@dataclass(frozen=True)
class TextModel:
    """A language model: its name, its tokenizer (None: token ids only), tokens of a request."""

    name: str
    tokenizer: Any
    max_len: int
    vocabulary: int
    slo: SLO = NOTHING
    kind: Literal["text"] = "text"

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text; HTTPError without a tokenizer, or for a text that cannot fit."""
        if self.tokenizer is None:
            raise HTTPError(400, f"model {self.name!r} has no tokenizer: give token ids", "invalid")
        if len(text) > CHARACTERS * self.max_len:
            raise HTTPError(
                400,
                f"the prompt has {len(text)} characters; {self.max_len} tokens have room for fewer",
                "invalid",
                "prompt",
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

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
        return self.encode(text, special=False)


@dataclass(frozen=True)
class ImageModel:
    """A pipeline: its sizes, and the arguments of its call for an image of a request."""

    name: str
    sizes: Sequence[str]
    arguments: Callable[[ImageBody, int], dict[str, Any]]
    slo: SLO = NOTHING
    kind: Literal["image"] = "image"


Model = TextModel | ImageModel


@dataclass(frozen=True)
class Loaded:
    """What loading gives: the running service, and its models.

    `warmup_s`: seconds of it that went into measuring them and starting the engine.
    """

    service: Service
    models: Sequence[Model]
    warmup_s: float = 0.0


class Gateway:
    """The service and its models, once they are loaded.

    Args:
        tell: told of requests before the engine is.

    Attributes:
        state: of the server; reason: why it failed.
        connections: how many are open.
    """

    def __init__(self, tell: Callable[[Note], None] = lambda note: None) -> None:
        self.connections: Callable[[], int] = lambda: 0
        self._tell = tell
        self.state: State = "loading"
        self.reason = ""
        self._loaded: Loaded | None = None
        self._models: dict[str, Model] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="neustream-http")

    # -- life -------------------------------------------------------------------------------------

    async def load(self, load: Callable[[], Loaded]) -> None:
        """Load on a thread, so that /health answers meanwhile."""
        try:
            self.open(await asyncio.get_running_loop().run_in_executor(self._threads, load))
        except Exception as error:
            self.state, self.reason = "failed", told(error)
            raise

    def open(self, loaded: Loaded) -> None:
        """Serve from now on."""
        self._loaded = loaded
        self._models = {model.name: model for model in loaded.models}
        self.state = "ready"

    def drain(self) -> None:
        """Take nothing more."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    async def close(self, *, cancel: bool) -> None:
        """Serve what is open, or end it; then stop."""
        if self._loaded is not None:
            service = self._loaded.service
            await asyncio.get_running_loop().run_in_executor(self._threads, lambda: service.close(cancel=cancel))
        self.state = "stopped" if self.state != "failed" else "failed"
        self._threads.shutdown(wait=False)

    @property
    def alive(self) -> bool:
        """Whether the engine's loop runs, if there is one by now."""
        if self._loaded is None:
            return self.state != "failed"
        return self._loaded.service.snapshot().state in ("serving", "closing", "closed")

    def gauges(self) -> Gauges:
        """How the server is at this moment."""
        connections = self.connections()
        if self._loaded is None:
            return Gauges(self.state, self.reason, connections=connections)
        service = self._loaded.service
        engine, shot = service.engine, service.snapshot()
        return Gauges(
            self.state if self.alive else "failed",
            self.reason or shot.reason,
            engine.clock.now(),
            shot.open,
            shot.policy_faults,
            engine.wait_s(shot.open + 1),
            connections,
            shot.kv,
        )

    # -- models -----------------------------------------------------------------------------------

    @property
    def service(self) -> Service:
        """What serves; HTTPError while there is none, or it is to end."""
        if self.state != "ready" or self._loaded is None:
            raise HTTPError(503, f"this server is {self.state}", self.state, retry_after_s=5.0)
        if not self.alive:
            raise HTTPError(503, "the engine has failed", "failed", retry_after_s=60.0)
        return self._loaded.service

    @property
    def models(self) -> list[Model]:
        """Those that are served; HTTPError as of `service`."""
        _ = self.service
        return list(self._models.values())

    def text(self, name: str | None) -> TextModel:
        """A language model by its name, or the only one."""
        model = self._model(name, "text")
        assert isinstance(model, TextModel)
        return model

    def image(self, name: str | None) -> ImageModel:
        """A pipeline by its name, or the only one."""
        model = self._model(name, "image")
        assert isinstance(model, ImageModel)
        return model

    def _model(self, name: str | None, kind: str) -> Model:
        _ = self.service
        fitting = {each.name: each for each in self._models.values() if each.kind == kind}
        if name is None and len(fitting) == 1:
            return next(iter(fitting.values()))
        if name is None or name not in fitting:
            what = "text" if kind == "text" else "images"
            text = f"no model {name!r} for {what}; {nearest(name or '', fitting)}"
            raise HTTPError(404, text, "model_not_found", "model")
        return fitting[name]

    async def think(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Call a function: here if it is quick (a `size` of few characters), else on a thread."""
        if size <= INLINE:
            return function(*args)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)

    def submit(self, model: Model, *args: Any, **options: Any) -> Answer[Any]:
        """Ask a model; errors as of `Service.submit`. `options` have the request's id."""
        service, id = self.service, options["id"]
        prompt = args[0] if isinstance(model, TextModel) else None
        tokens = None if prompt is None else len(prompt)
        self._tell(Asked(id, model.name, model.kind, tokens, options.get("max_tokens")))
        try:
            return service.submit(*args, model=self._name(model), **options)
        except BaseException:
            self._tell(Unasked(id))
            raise

    def _name(self, model: Model) -> str | None:
        return None if len(self._models) == 1 else model.name
