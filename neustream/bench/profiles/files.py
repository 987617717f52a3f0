"""Prompts from a local file: ShareGPT's conversations, or a column of texts."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neustream.bench.profiles.lengths import Lengths
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.sources import Asked, Asks, Source, sequence
from neustream.bench.profiles.words import local_path
from neustream.errors import ConfigError, shown, told
from neustream.workload.asks import Ask
from neustream.workload.texts import Texts

COLUMNS = ("prompt", "instruction", "question", "input", "context", "content", "text")
"""Names of a column with prompts, the first that is there."""
Range = tuple[int, int]


@dataclass(frozen=True)
class PromptFile(Source):
    """Prompts of a file, over and over if there are fewer than are asked for.

    Attributes:
        inputs, outputs: lengths outside of which a prompt is left out, None for no bounds.
        output_tokens: how many are asked for; None: as many as the file's answer has.
        shuffled: in a drawn order.
    """

    path: Path
    inputs: Range | None = None
    outputs: Range | None = None
    output_tokens: int | None = None
    shuffled: bool = False

    @classmethod
    def local(cls, key: str, path: str, **more: Any) -> PromptFile:
        """The source of a path in a profile; Unrunnable if there is no such file."""
        found = local_path(path)
        if found is None or not found.is_file():
            raise Unrunnable(
                f"{key}: {shown(path)} is no local file, and nothing is loaded from a hub"
            )
        return cls(found, **more)

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rows = _rows(self, asked.texts)
        order = np.arange(len(rows))
        if self.shuffled:
            order = np.random.default_rng(asked.seed).permutation(order)

        def make(at: int) -> Ask:
            prompt, tokens, output = rows[int(order[at % len(order)])]
            return asked.ask(at, prompt, tokens, output)

        return Asks(asked.requests, make)

    def __str__(self) -> str:
        output = (
            "as many out as answers have"
            if self.output_tokens is None
            else f"{self.output_tokens} out"
        )
        bounds = "" if self.inputs is None else f" of {self.inputs[0]} to {self.inputs[1]} tokens"
        return f"prompts{bounds} of {self.path}, {output}"

    @property
    def scenario(self) -> dict[str, Any]:
        least, most = self.inputs or (1, 1024)
        told_: dict[str, Any] = {
            "source": "sampled",
            "input_seq_len": {"distribution": "other", "value": (least + most) / 2},
        }
        if self.inputs is not None:
            told_["input_seq_len"] |= {"min": least, "max": most}
        if self.output_tokens is not None:
            told_["output_seq_len"] = sequence(Lengths.fixed(self.output_tokens))
        return told_


Row = tuple[str, int, int | None]
"""A prompt, its length, and how many tokens are asked for."""


@functools.lru_cache(maxsize=2)
def _rows(source: PromptFile, texts: Texts) -> Sequence[Row]:
    kept = []
    for prompt, answer in _pairs(source.path):
        length = texts.count(prompt)
        output = source.output_tokens
        if output is None and answer is not None:
            output = max(1, texts.count(answer))
        if _within(length, source.inputs) and _within(output, source.outputs):
            kept.append((prompt, length, output))
    if not kept:
        raise ConfigError(f"{source.path}: no prompt of the lengths that are asked for")
    return kept


def _within(length: int | None, bounds: Range | None) -> bool:
    return bounds is None or length is None or bounds[0] <= length <= bounds[1]


def _pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Prompts, and answers where the file has some."""
    try:
        records = list(_records(path))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path}: {told(error)}") from None
    for record in records:
        found = _conversation(record) if isinstance(record, dict) else None
        if found is None and isinstance(record, dict):
            found = _column(record)
        if isinstance(record, str) and record.strip():
            found = record, None
        if found is not None and found[0]:
            yield found


def _records(path: Path) -> Iterable[Any]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    text = path.read_text("utf-8")
    if path.suffix == ".txt":
        return text.splitlines()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    content = json.loads(text)
    return content if isinstance(content, list) else [content]


def _conversation(record: dict[str, Any]) -> tuple[str, str | None] | None:
    """The first two turns."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    said = [
        turn.get("value") if isinstance(turn, dict) else None for turn in itertools.islice(turns, 2)
    ]
    prompt, answer = said
    return (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def _column(record: dict[str, Any]) -> tuple[str, str | None] | None:
    prompt = next((record[name] for name in COLUMNS if isinstance(record.get(name), str)), None)
    return None if prompt is None else (prompt, None)
