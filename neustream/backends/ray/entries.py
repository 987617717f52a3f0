"""Requests at an instance, as its instance keeps them."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neustream.backends.ray.wire import ITEM, PRINT, Guess, News
from neustream.core.events import Update
from neustream.service.answer import Answer
from neustream.service.mount import Mount, Reader
from neustream.service.requests import Moved

TOLD = ("cached", "finish_reason")
"""What fronts read of outputs beside the item: tokens that a prefix cache had, why a text ended."""


@dataclass(eq=False)
class Entry:
    """A request that is here, or has just left.

    Attributes:
        answer: the service's; reader: reads its outputs. items: what came of them, as updates for
            the head; sent: how many went out; heard: how many the head has for certain.
        told: whether the head knows that it is here: what came before goes along with that.
        left: it, once it waits to be passed on; why: why it cannot be. left_at: since when.
        guess: what it was taken for, if nobody looked at it before it came.
        quiet: the head wants to hear no more of it.
        asked: a hash of what was asked. away: its next stage, if that is served elsewhere.
        orphan: its head is gone, and the next one has not asked for it; over: how it ended then.
    """

    id: str
    term: int
    answer: Answer[Any] | None = None
    reader: Reader | None = None
    items: list[Update] = field(default_factory=list)
    sent: int = 0
    heard: int = 0
    told: bool = True
    began: bool = False
    left: Moved | None = None
    left_at: float = 0.0
    why: str = ""
    guess: Guess | None = None
    quiet: bool = False
    asked: bytes = b""
    away: str = ""
    orphan: bool = False
    over: News | None = None

    def catch_up(self, answer: Answer[Any]) -> None:
        """Read all outputs of an answer, from the first one on: readers have a memory."""
        if not answer.streams:
            return
        outputs = answer.outputs
        if self.reader is None:
            self.reader = answer.reader()
            for output in outputs[: len(self.items)]:
                self.reader(output)
        for output in outputs[len(self.items) :]:
            told = {name: output.update[name] for name in TOLD if name in output.update}
            self.items.append({ITEM: self.reader(output), PRINT: _print(output.update), **told})


class Entries:
    """The requests of an instance, by id. `gone`: called with the id of one that is not here any more."""

    def __init__(self, gone: Callable[[str], None]) -> None:
        self.lock = threading.RLock()
        self._gone = gone
        self._by_id: dict[str, Entry] = {}

    def get(self, id: str) -> Entry | None:
        """A request of whatever term."""
        with self.lock:
            return self._by_id.get(id)

    def of(self, id: str, term: int) -> Entry | None:
        """The request of a term, if it is here."""
        entry = self.get(id)
        return entry if entry is not None and entry.term == term else None

    def all(self) -> list[Entry]:
        """All of them."""
        with self.lock:
            return list(self._by_id.values())

    def add(self, entry: Entry) -> Entry | None:
        """One more; or the one that has its id already, and nothing is changed."""
        with self.lock:
            before = self._by_id.setdefault(entry.id, entry)
        return None if before is entry else before

    def remove(self, entry: Entry) -> None:
        """It is not here any more."""
        with self.lock:
            if self._by_id.get(entry.id) is entry:
                del self._by_id[entry.id]
        self._gone(entry.id)


def _print(update: Update) -> bytes:
    """A hash of the words and whole numbers in an output: what is the same when it is made again."""
    plain = sorted((k, v) for k, v in update.items() if isinstance(v, str | int | bool))
    return hashlib.blake2b(pickle.dumps(plain, protocol=5), digest_size=8).digest()


def asked_print(payload: bytes) -> bytes:
    """A hash of what a caller asked."""
    return hashlib.blake2b(payload, digest_size=16).digest()


def graphs_of(mount: Mount) -> Sequence[Any]:
    """The graphs that a mount's requests go through, as far as they are known."""
    known = getattr(mount, "graphs", None)
    if known is not None:
        return tuple(known)
    graph = getattr(mount, "graph", None)
    return () if graph is None else (graph,)
