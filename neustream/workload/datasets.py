"""What requests ask for: drawn, or of a file. When they come and what they are promised is put on later.

All draws are of seeds, so that a simulator, a service and an HTTP server get the same requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neustream.errors import ConfigError
from neustream.workload.asks import Ask, ImageAsk
from neustream.workload.cells import MOST_TOKENS, WrongValue, shown, whole
from neustream.workload.records import Fault, open_records
from neustream.workload.row import Notes
from neustream.workload.texts import Texts

Integers = NDArray[np.int64]
PREFIX, OWN = 1, 2
"""Parts of seeds: texts that are shared, and texts of one request."""
MOST_PROMPT, MOST_TOTAL, LEAST = 1024, 2048, 4
"""Conversations with longer prompts, longer sums, or shorter parts are left out, as vLLM does."""


TOKENS = whole(1, MOST_TOKENS)(Notes())


class Dataset(Protocol):
    """Makes requests."""

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        """So many of them, in the order in which they come; a file may have fewer, if it says so.

        Raises:
            ConfigError: there are none.
        """
        ...


def around(mean: int, ratio: float, number: int, rng: np.random.Generator) -> Integers:
    """Lengths from `mean * (1 - ratio)` to `mean * (1 + ratio)`, each as often; at least 1."""
    low, high = int(mean * (1 - ratio)), int(np.ceil(mean * (1 + ratio)))
    return np.maximum(1, rng.integers(low, high, number, endpoint=True))


def normal(mean: float, std: float, least: int, most: int, number: int, seed: int) -> Integers:
    """Normally drawn lengths; those outside of `least` and `most` are drawn again."""
    rng = np.random.default_rng(seed)
    found = np.empty(0, np.int64)
    while len(found) < number:
        drawn = np.rint(rng.normal(mean, std, 2 * number)).astype(np.int64)
        found = np.concatenate([found, drawn[(drawn >= least) & (drawn <= most)]])
    return found[:number]


@dataclass(frozen=True)
class Random:
    """Each prompt another text; `prefix` tokens before it are the same in all.

    Lengths are within `input_ratio` and `output_ratio` of `input` and `output`.
    """

    input: int = 1024
    output: int = 128
    input_ratio: float = 0.0
    output_ratio: float = 0.0
    prefix: int = 0

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        rng = np.random.default_rng(seed)
        inputs = around(self.input, self.input_ratio, number, rng)
        outputs = around(self.output, self.output_ratio, number, rng)
        shared = texts.text(self.prefix, seed, PREFIX) if self.prefix else ""
        return [
            Ask(
                str(at),
                prompt=shared + texts.text(int(length), seed, OWN, at),
                input_tokens=self.prefix + int(length),
                output_tokens=int(output),
            )
            for at, (length, output) in enumerate(zip(inputs, outputs, strict=True))
        ]


@dataclass(frozen=True)
class PrefixRepetition:
    """`prefixes` beginnings, each of as many prompts as the others, in a drawn order."""

    prefix: int = 256
    suffix: int = 256
    prefixes: int = 10
    output: int = 128

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        order = np.random.default_rng(seed).permutation(number) % self.prefixes
        shared = [texts.text(self.prefix, seed, PREFIX, each) for each in range(self.prefixes)]
        return [
            Ask(
                str(at),
                prompt=shared[which] + texts.text(self.suffix, seed, OWN, at),
                input_tokens=self.prefix + self.suffix,
                output_tokens=self.output,
                prefix=(int(which),),
            )
            for at, which in enumerate(order)
        ]


@dataclass(frozen=True)
class Sessions:
    """Conversations of `turns` turns. Those of a group (one of `groups`) have the same system prompt.

    The first turns of all come first, then the second ones; `think_s` pass between turns.
    """

    groups: int = 4
    system: int = 256
    question: int = 64
    output: int = 64
    turns: int = 4
    think_s: float = 1.0

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        sessions = -(-number // self.turns)
        shared = [texts.text(self.system, seed, PREFIX, each) for each in range(self.groups)]
        return [self._ask(at, sessions, shared, seed, texts) for at in range(number)]

    def _ask(self, at: int, sessions: int, shared: Sequence[str], seed: int, texts: Texts) -> Ask:
        turn, session = divmod(at, sessions)
        group = session % self.groups
        own = texts.text(self.question, seed, OWN, at)
        before = self.system + turn * (self.question + self.output)
        return Ask(
            str(at),
            prompt=own if turn else shared[group] + own,
            input_tokens=before + self.question,
            output_tokens=self.output,
            session=str(session),
            follows=str(at - sessions) if turn else "",
            think_s=self.think_s if turn else 0.0,
            prefix=(group,),
        )


@dataclass(frozen=True)
class PromptFile:
    """Prompts of a file: ShareGPT's conversations, or lines with `prompt` (and `output_tokens`).

    They come in a drawn order, over and over if there are fewer than asked for, unless `once`.
    `output`: tokens asked for in place of what the file says; `default`: where it says nothing.
    """

    path: Path
    output: int | None = None
    once: bool = False
    shuffle: bool = True
    default: int = 256

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        found = list(self._read(texts))
        if not found:
            raise ConfigError(f"{self.path}: no prompt of a length that is used")
        order = np.arange(len(found))
        if self.shuffle:
            order = np.random.default_rng(seed).permutation(len(found))
        count = min(number, len(found)) if self.once else number
        return [dataclasses.replace(found[order[at % len(found)]], id=str(at)) for at in range(count)]

    def _read(self, texts: Texts) -> Iterator[Ask]:
        try:
            records = open_records(self.path)
            columns = ["conversations", "prompt", "output_tokens"]
            for turns, prompt, output in records.take(columns, lambda name: None):
                if isinstance(turns, list):
                    found = self._conversation(turns, texts)
                else:
                    found = self._prompt(prompt, output, records.line, texts)
                if found is not None:
                    yield found
        except Fault as fault:
            where = f", line {fault.line}" if fault.line else ""
            raise ConfigError(f"{self.path}{where}: {' '.join(str(fault).splitlines())}") from None

    def _prompt(self, prompt: Any, output: Any, line: int, texts: Texts) -> Ask:
        if not isinstance(prompt, str) or not prompt:
            raise Fault("no prompt; allowed: conversations, or prompt: a text", line)
        try:
            said = TOKENS(output) if output not in (None, "") else None
        except WrongValue as wrong:
            why = f"output_tokens {shown(wrong.value)}; allowed: {wrong.allowed}"
            raise Fault(why, line) from None
        asked = self.output or said or self.default
        return Ask("", prompt=prompt, input_tokens=texts.count(prompt), output_tokens=asked)

    def _conversation(self, turns: list[Any], texts: Texts) -> Ask | None:
        values = [each.get("value") for each in turns[:2] if isinstance(each, dict)]
        said = [each for each in values if isinstance(each, str)]
        if len(said) < 2:
            return None
        prompt, answer = (texts.count(each) for each in said)
        output = self.output or answer
        if prompt < LEAST or output < LEAST or prompt > MOST_PROMPT or prompt + output > MOST_TOTAL:
            return None
        return Ask("", prompt=said[0], input_tokens=prompt, output_tokens=output)


@dataclass(frozen=True)
class Images:
    """Images of drawn sizes and steps; each size and number of steps has a weight.

    A size of None is whatever the server makes by itself.
    """

    sizes: tuple[tuple[int | None, int | None, float], ...] = ((None, None, 1.0),)
    steps: tuple[tuple[int, float], ...] = ((20, 1.0),)
    number: int = 1

    def asks(self, number: int, seed: int, texts: Texts) -> list[Ask]:
        rng = np.random.default_rng(seed)
        sizes = rng.choice(len(self.sizes), number, p=_shares([each[2] for each in self.sizes]))
        steps = rng.choice(len(self.steps), number, p=_shares([each[1] for each in self.steps]))
        found = []
        for at, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            width, height, _ = self.sizes[size]
            image = ImageAsk(width, height, self.steps[step][0], number=self.number)
            prompt = texts.text(12, seed, OWN, at).strip()
            found.append(Ask(str(at), prompt=prompt, image=image))
        return found


def _shares(weights: Sequence[float]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.array(weights, np.float64) / sum(weights)
    return found
