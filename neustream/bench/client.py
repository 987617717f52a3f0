"""Requests of a plan over HTTP: what is sent, and who hears the answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

from neustream.bench.answers import ErrorBody, ImageStream, NoStream, TextStream, Whole
from neustream.bench.connections import Connections
from neustream.bench.hearing import Counter, Hearing, fail
from neustream.bench.plan import Target
from neustream.bench.playing import Turns, as_text
from neustream.bench.records import Record
from neustream.engine.clock import stopwatch
from neustream.errors import told
from neustream.workload.asks import Ask, ImageAsk

STREAM = "text/event-stream"
ROLES = ("user", "assistant")


class Client:
    """Sends requests to a target. An async context manager.

    Args:
        start: the instant (`stopwatch`) that instants of records count from.
        count: counts tokens where the server does not tell; None: events are counted.
        keep: whether records keep the texts.

    Raises:
        ConfigError: the target's URL is none.
    """

    def __init__(
        self, target: Target, start: float, *, count: Counter | None = None, keep: bool = False
    ) -> None:
        self._target = target
        self._start = start
        self._count = count
        self._keep = keep
        self._connections = Connections(target.url, verify_tls=target.verify_tls)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connections.close()

    def now(self) -> float:
        """Seconds since the load's start."""
        return stopwatch() - self._start

    async def send(self, ask: Ask, before: Turns, record: Record) -> str:
        """Ask, and fill the record; returns what was generated. `before`: the turns before it.

        Cancelled meanwhile, the record says that it was interrupted.
        """
        body = json.dumps(body_of(ask, self._target, before)).encode()
        headers = {"content-type": "application/json", **self._target.headers, **self._told(ask)}
        record.sent_bytes = len(body)
        record.sent_s = self.now()
        heard: list[Hearing] = []

        def hear(status: int, reason: str, headers: Mapping[str, str]) -> Hearing:
            heard.append(self._hearing(ask, record, status, reason, headers))
            return heard[0]

        path = self._target.path_of(ask)
        try:
            async with asyncio.timeout(self._target.timeout_s) as limit:
                await self._connections.ask(path, headers, body, hear, self._start)
        except OSError as error:
            if limit.expired():
                fail(record, "timeout", f"not over after {self._target.timeout_s:g} s")
            else:
                fail(record, "connect", told(error))
        except asyncio.CancelledError:
            fail(record, "interrupted", "interrupted")
            raise
        finally:
            if record.end_s is None and heard:
                heard[0].end(self.now(), whole=False)
            elif record.end_s is None:
                record.end_s = self.now()
        return heard[0].text if heard else ""

    def _hearing(
        self, ask: Ask, record: Record, status: int, reason: str, headers: Mapping[str, str]
    ) -> Hearing:
        record.status = status
        if not 200 <= status < 300:
            return ErrorBody(record, reason)
        streamed = self._streamed(ask)
        if (coded := headers.get("content-encoding", "identity").strip().lower()) != "identity":
            return NoStream(record, f"the answer is in {coded}, which was not asked for")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if streamed and kind != STREAM:
            return NoStream(record, f"the answer is of {kind or 'no type'}, not {STREAM}")
        if ask.image is not None and streamed:
            return ImageStream(record)
        exact = self._target.ignore_eos and ask.image is None
        cls = TextStream if streamed else Whole
        return cls(record, exact=exact, count=self._count, keep=self._keep)

    def _streamed(self, ask: Ask) -> bool:
        """Whether it asks for a stream; bodies and params have the last word."""
        target = self._target
        usual = target.stream and ask.image is None and target.api != "inference"
        return bool(ask.params.get("stream", target.body.get("stream", usual)))

    def _told(self, ask: Ask) -> dict[str, str]:
        """The headers that tell a request's id, its conversation, and what it is promised."""
        prefix = self._target.id_prefix
        said = {"x-request-id": f"{prefix}{ask.id}"} if prefix else {}
        for name, which in self._target.told_headers.items():
            if which in ("class", "session"):
                value = ask.slo_class if which == "class" else ask.session
                said |= {name: value} if value else {}
            elif math.isfinite(seconds := getattr(ask.limits, f"{which}_s")):
                said[name] = f"{seconds * 1e3:.12g}"
        return said


def body_of(ask: Ask, target: Target, before: Turns) -> dict[str, Any]:
    """The body of a request."""
    model = target.model_of(ask)
    body: dict[str, Any] = {"model": model} if model else {}
    if ask.image is not None:
        body |= {"prompt": ask.prompt, **_image(ask.image)}
    elif target.api == "inference":
        return {"prompt": as_text(ask.prompt), "num_tokens": ask.output_tokens, **target.body}
    elif target.api == "chat":
        said = [*(each for turn in before for each in zip(ROLES, turn, strict=True))]
        said.append(("user", as_text(ask.prompt)))
        body |= {"messages": [{"role": role, "content": text} for role, text in said]}
        body |= {"max_completion_tokens": ask.output_tokens}
    else:
        earlier = "".join(prompt + answer for prompt, answer in before)
        body |= {"prompt": earlier + as_text(ask.prompt) if earlier else ask.prompt}
        body |= {"max_tokens": ask.output_tokens}
    if ask.image is None:
        body |= _text(target)
    return {**_given(body), **target.body, **ask.params}


def _text(target: Target) -> dict[str, Any]:
    """What is asked of all texts."""
    asked: dict[str, Any] = {"stream": target.stream}
    if target.stream:
        asked["stream_options"] = {"include_usage": True}
    if target.ignore_eos:
        asked["ignore_eos"] = True
    return asked


def _image(image: ImageAsk) -> dict[str, Any]:
    size = f"{image.width}x{image.height}" if image.width and image.height else None
    asked = {"size": size, "num_inference_steps": image.steps, "num_frames": image.frames}
    return {**asked, "n": image.number, "response_format": "b64_json"}


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}
