"""Prompts of a file: ShareGPT's conversations, or a column of texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neustream.errors import ConfigError
from neustream.workload.asks import Ask
from neustream.workload.cells import MOST_TOKENS, WrongValue, shown, whole
from neustream.workload.lengths import Lengths
from neustream.workload.records import Fault, lines, open_records
from neustream.workload.row import Notes
from neustream.workload.sources import Asked, Asks, Source, sequence
from neustream.workload.texts import Texts

COLUMNS = ("prompt", "instruction", "question", "input", "context", "content", "text")
"""Names of a column with prompts, the first that is there."""
Range = tuple[int, int]
UNSAID = 256
"""Tokens that vLLM asks for where a line does not say."""
TOKENS = whole(1, MOST_TOKENS)(Notes())
LEAST, MOST_PROMPT, MOST_TOTAL = 4, 1024, 2048
"""Conversations with shorter parts, longer prompts, or longer sums are left out, as vLLM does."""


@dataclass(frozen=True)
class PromptFile(Source):
    """Prompts of a file, over and over if there are fewer than are asked for, unless `once`.

    Attributes:
        inputs, outputs: lengths outside of which a prompt is left out, None for no bounds;
            `most`: the same of their sum.
        output_tokens: how many are asked for; None: as many as the file's answer has, or says.
        default: the same where it says nothing; None: as many as the model likes.
        shuffled: in a drawn order.
        strict: whether each record must have a prompt; else those without are left out.
    """

    path: Path
    inputs: Range | None = None
    outputs: Range | None = None
    output_tokens: int | None = None
    shuffled: bool = False
    once: bool = False
    default: int | None = None
    most: int | None = None
    strict: bool = False

    @classmethod
    def sharegpt(cls, path: Path, output: int | None = None, **more: Any) -> PromptFile:
        """Conversations as vLLM takes them; `output`: tokens in place of the answers'."""
        outputs = (LEAST, MOST_TOTAL) if output is None else None
        return cls(path, (LEAST, MOST_PROMPT), outputs, output, most=MOST_TOTAL, **more)

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rows = _rows(self, asked.texts)
        order = np.arange(len(rows))
        if self.shuffled:
            order = np.random.default_rng(asked.seed).permutation(order)

        def make(at: int) -> Ask:
            prompt, tokens, output = rows[int(order[at % len(order)])]
            return asked.ask(at, prompt, tokens, output)

        return Asks(min(asked.requests, len(rows)) if self.once else asked.requests, make)

    def takes(self, prompt: int, output: int | None) -> bool:
        """Whether a prompt of so many tokens, with so many asked for, is within the bounds."""
        whole = self.most is None or prompt + (output or 0) <= self.most
        return whole and _within(prompt, self.inputs) and _within(output, self.outputs)

    def __str__(self) -> str:
        output = "as many out as answers have" if self.output_tokens is None else f"{self.output_tokens} out"
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
    try:
        kept = list(_kept(source, texts))
    except Fault as fault:
        where = f", line {fault.line}" if fault.line else ""
        why = " ".join(str(fault).splitlines())
        raise ConfigError(f"{source.path}{where}: {why}") from None
    if not kept:
        raise ConfigError(f"{source.path}: no prompt of a length that is used")
    return kept


def _kept(source: PromptFile, texts: Texts) -> Iterator[Row]:
    for line, record in _records(source.path):
        prompt, answer, said = _prompt(record, texts)
        if not prompt:
            if source.strict and not isinstance(record.get("conversations"), list):
                raise Fault("no prompt; allowed: conversations, or prompt: a text", line)
            continue
        try:
            given = TOKENS(said) if said not in (None, "") else answer
        except WrongValue as wrong:
            why = f"output_tokens {shown(wrong.value)}; allowed: {wrong.allowed}"
            raise Fault(why, line) from None
        length, output = texts.count(prompt), source.output_tokens or given or source.default
        if source.takes(length, output):
            yield prompt, length, output


def _within(length: int | None, bounds: Range | None) -> bool:
    return bounds is None or length is None or bounds[0] <= length <= bounds[1]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records by the lines where they begin; of a .txt each line is a prompt."""
    if path.suffix == ".txt":
        for number, text in lines(path):
            if text.strip():
                yield number, {"prompt": text.rstrip("\r\n")}
        return
    records = open_records(path)
    columns = ["conversations", "output_tokens", *COLUMNS]
    for cells in records.take(columns, lambda name: None):
        yield records.line, dict(zip(columns, cells, strict=True))


def _prompt(record: dict[str, Any], texts: Texts) -> tuple[str, int | None, Any]:
    """The prompt ("" if there is none), the tokens of its answer, and what is said of these."""
    turns = record.get("conversations")
    if isinstance(turns, list):
        values = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        said = [value for value in values if isinstance(value, str)]
        return (said[0], max(1, texts.count(said[1])), None) if len(said) == 2 else ("", None, None)
    found = next((record[name] for name in COLUMNS if record.get(name)), "")
    return (found if isinstance(found, str) else ""), None, record.get("output_tokens")
