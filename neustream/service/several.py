"""Several sequences of one prompt: requests of their own, of which the first computes the prompt for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from neustream.core.events import Emitted
from neustream.errors import RequestCancelled, RequestError, shown
from neustream.service.answer import Answer
from neustream.service.mount import Reader

T = TypeVar("T")
SEEDS = 2**63


def sequences(ids: Sequence[str], seed: Any) -> Iterator[dict[str, Any]]:
    """What requests of one prompt are told beside it: number k (from 0) has the seed `seed + k`."""
    yield {"id": ids[0], "seed": seed}  # it is refused, if that is none
    for number, id in enumerate(ids[1:], start=1):
        yield {"id": id, "seed": None if seed is None else (seed + number) % SEEDS, "like": ids[0]}


def ids_of(id: str, count: Any, most: int) -> list[str]:
    """The ids of so many sequences of request `id`; RequestError for a count that is none."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise RequestError(f"n must be a whole number from 1 to {most}, got {shown(count)}")
    return [f"{id}/{number}" for number in range(count)]


def ask(submit: Callable[..., Answer[Any]], id: str, ids: Sequence[str], seed: Any) -> Several[Any]:
    """Ask for the sequences of request `id`; if one is refused, none is served, and its error is raised."""
    each: list[Answer[Any]] = []
    try:
        for own in sequences(ids, seed):
            each.append(submit(**own))
    except BaseException:
        for answer in each:
            answer.cancel()
        raise
    return Several(id, each)


class Several(Answer[tuple[T, ...]]):
    """What comes of several sequences of one prompt: a tuple, in their order.

    An iteration gives pairs of a sequence's number (from 0) and an output, as they come. If one
    sequence comes to nothing, the others are given up, and all of them raise what it raises.

    Attributes:
        each: the answers of the sequences, which can be read and cancelled by themselves.
    """

    def __init__(self, id: str, each: Sequence[Answer[T]]) -> None:
        streams = all(answer.streams for answer in each)
        super().__init__(id, each[0].model, lambda _: self._cancel(), self._merged if streams else None)
        self.each = tuple(each)
        self._left = len(self.each)
        self._error: BaseException | None = None
        for answer in self.each:
            answer.follow(self.push)
        for answer in self.each:
            Future.add_done_callback(answer, self._one_is_over)  # on the thread that ends it

    def _cancel(self) -> None:
        for answer in self.each:
            answer.cancel()

    def _merged(self) -> Reader:
        readers = {answer.id: (number, answer.reader()) for number, answer in enumerate(self.each)}

        def read(output: Emitted) -> tuple[int, Any]:
            number, item_of = readers[output.id]
            return number, item_of(output)

        return read

    def _one_is_over(self, one: Future[T]) -> None:
        error: BaseException | None = None
        if one.cancelled():
            told = f"request {self.id!r}: its sequence {one.id!r} was cancelled"  # type: ignore[attr-defined]
            error = RequestCancelled(told, reason="one of its sequences was cancelled", code="cancelled")
        else:
            error = one.exception()
        with self._news:
            self._left -= 1
            over, first = self._left == 0, error is not None and self._error is None
            self._error = self._error or error
        if first:
            self._cancel()
        if over:
            self._settle_all()

    def _settle_all(self) -> None:
        ends = [answer.ended for answer in self.each if answer.ended is not None]
        if len(ends) == len(self.each):
            last = max(ends, key=lambda ended: ended.latency_s)
            self.ended = replace(last, id=self.id, on_time=all(ended.on_time for ended in ends))
        if not self.set_running_or_notify_cancel():
            return  # its caller cancelled it
        if self._error is not None:
            self.set_exception(self._error)
        else:
            self.set_result(tuple([answer.result() for answer in self.each]))
