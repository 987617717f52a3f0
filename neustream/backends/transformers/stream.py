"""What a caller gets of a request: its tokens as they come, and the completion at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.backends import answer
from neustream.engine.answers import Result

Reason = Literal["stop", "length"]
BROKEN = "\ufffd"
"""What tokenizers make of the first bytes of a character whose others are in the next token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One output: its place (from 0), its id, what it adds to the text, and seconds since the request came.

    `text` is empty without a tokenizer, and while a character is not complete.
    """

    index: int
    id: int
    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """All that came of a request.

    Args:
        token_ids: the new tokens, with the one that ended it.
        finish_reason: "stop" at EOS or a stop token, "length" at `max_tokens`.
        at_s: seconds from the request to each token; `latency_s`: to its end.
        on_time: whether every promise was kept.
    """

    id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: Reason
    at_s: tuple[float, ...]
    latency_s: float
    on_time: bool
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str | None:
        """The new text without special tokens, decoded when it is asked for; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text: str = self.tokenizer.decode(list(self.token_ids), skip_special_tokens=True)
        return text

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.at_s[0]

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Seconds between each token and the one before."""
        return tuple(after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False))

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first (0 if there is none)."""
        return (self.at_s[-1] - self.at_s[0]) / (len(self.at_s) - 1) if len(self.at_s) > 1 else 0.0


class Pieces:
    """What each token of one text adds to it, as a tokenizer writes them in company."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._told = 0, 0  # tokens before `_told` are told; those from `_from` are decoded again

    def add(self, id: int, last: bool) -> str:
        if self._tokenizer is None:
            return ""
        self._ids.append(id)
        before, now = self._decode(self._ids[self._from : self._told]), self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(BROKEN) and not last):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Answer(answer.Answer[Completion]):
    """What `submit` returns: a Completion once it is there, and its tokens before.

    A `concurrent.futures.Future` that can be awaited, and iterated (`for` and `async for`) for
    `Token`s as they come, by any number of readers, each from the first token on. `result()` and the end
    of an iteration raise RequestError if the request was dropped or failed, CancelledError if it was
    cancelled. `cancel()` gives the request up, at the latest after the step that it is in; a reader
    that stops reading does not. `ended` says how it went and how long it took.
    """

    def __init__(self, id: str, max_tokens: int, tokenizer: Any, give_up: Callable[[str], Any]) -> None:
        super().__init__(id, give_up)
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._came: list[tuple[int, float, bool]] = []  # id, seconds, whether it is the last
        self._news = threading.Condition()
        self._wakers: set[Callable[[], Any]] = set()
        self.add_done_callback(lambda _: self._tell())

    @property
    def token_ids(self) -> list[int]:
        """Those that came so far."""
        return [id for id, _, _ in self._came]

    def __iter__(self) -> Iterator[Token]:
        pieces, at = Pieces(self._tokenizer), 0
        while True:
            with self._news:
                self._news.wait_for(lambda at=at: len(self._came) > at or self.done())  # type: ignore[misc]
            if at == len(self._came):
                self.result()  # raises what went wrong
                return
            yield self._token(pieces, at)
            at += 1

    async def __aiter__(self) -> AsyncIterator[Token]:
        pieces, at = Pieces(self._tokenizer), 0
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._news:
            self._wakers.add(wake)
        try:
            while True:
                news.clear()
                if at < len(self._came):
                    yield self._token(pieces, at)
                    at += 1
                elif self.done():
                    if at == len(self._came):  # the last may have come between the two questions
                        self.result()
                        return
                else:
                    await news.wait()
        finally:
            with self._news:
                self._wakers.discard(wake)

    # -- called by the engine -------------------------------------------------------------------------

    def push(self, id: int, at_s: float, last: bool) -> None:
        """The next token, on the engine's thread."""
        self._came.append((id, at_s, last))
        self._tell()

    def complete(self, prompt: int, result: Result, reason: Reason) -> Completion:
        """All that came, now that it is over."""
        ids, times = tuple(self.token_ids), tuple(at for _, at, _ in self._came)
        return Completion(self.id, prompt, ids, reason, times, result.latency_s, result.on_time, self._tokenizer)

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody listens
                wake()

    def _token(self, pieces: Pieces, at: int) -> Token:
        id, at_s, last = self._came[at]
        return Token(at, id, pieces.add(id, last), at_s)
