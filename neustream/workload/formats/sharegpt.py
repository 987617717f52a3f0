"""ShareGPT: conversations without arrivals, whose lengths a tokenizer tells.

A request is the first turn of a person and the answer to it, as in vLLM's benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from neustream.errors import ConfigError
from neustream.workload.cells import shown
from neustream.workload.formats.columns import Column, Format
from neustream.workload.records import Fault, Records
from neustream.workload.row import Notes, Row
from neustream.workload.texts import read_tokenizer

PEOPLE = ("human", "user")
MODELS = ("gpt", "assistant", "chatgpt", "bing", "bard")
BATCH = 256
"""Conversations that are tokenized together."""


def _rows(records: Records, notes: Notes, tokenizer: Path | None) -> Iterator[Row]:
    if tokenizer is None:
        raise Fault("sharegpt has texts and no lengths: name a tokenizer (a tokenizer.json)")
    lengths = _tokenizer(tokenizer)
    waiting: list[tuple[int, str | None, tuple[str, str]]] = []
    for session, conversation in records.take(["id", "conversations"], lambda name: notes.unused.add(shown(name))):
        pair = _first_exchange(conversation, records.line)
        if pair is None:
            notes.skipped["no turn of a person with an answer"] += 1
            continue
        waiting.append((records.line, session if isinstance(session, str) else None, pair))
        if len(waiting) == BATCH:
            yield from _counted(waiting, lengths, notes)
            waiting.clear()
    yield from _counted(waiting, lengths, notes)


def _first_exchange(conversation: Any, line: int) -> tuple[str, str] | None:
    """What the first person said, and what the model answered."""
    if not isinstance(conversation, list):
        raise Fault(f"column 'conversations' is {shown(conversation)}; allowed: a list of turns", line)
    for turn, answer in pairwise(conversation):
        if _speaker(turn, line) in PEOPLE and _speaker(answer, line) in MODELS:
            return turn["value"], answer["value"]
    return None


def _speaker(turn: Any, line: int) -> str:
    allowed = 'objects as in {"from": "human", "value": "Hello"}'
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not isinstance(turn.get("from"), str):
        raise Fault(f"a turn of 'conversations' is {shown(turn)}; allowed: {allowed}", line)
    return str(turn["from"])


Lengths = Callable[[list[str]], list[int]]


def _counted(waiting: list[tuple[int, str | None, tuple[str, str]]], lengths: Lengths, notes: Notes) -> Iterator[Row]:
    texts = [text for _, _, pair in waiting for text in pair]
    counts = lengths(texts)
    for (line, session, _), prompt, output in zip(waiting, counts[::2], counts[1::2], strict=True):
        if prompt and output:
            yield Row(prompt_tokens=prompt, output_tokens=output, session=session, line=line)
        else:
            notes.skipped["no prompt tokens" if not prompt else "no output tokens"] += 1


def _tokenizer(path: Path) -> Lengths:
    """How many tokens texts have; special tokens are not counted."""
    try:
        tokenizer = read_tokenizer(path)
    except ConfigError as error:
        raise Fault(str(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def lengths(texts: list[str]) -> list[int]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(one.ids) for one in encoded]

    return lengths


def _never(notes: Notes) -> Callable[[Any], Any]:
    raise AssertionError("conversations are read by _rows")


SHAREGPT = Format(
    "sharegpt",
    "ShareGPT: conversations without arrivals; needs a tokenizer",
    [Column("conversations", "params", _never)],
    own=_rows,
)
