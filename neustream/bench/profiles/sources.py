"""What requests ask for: texts drawn at random, prefixes that they share, sessions of turns, files.

A source makes the asks of one load. They are made when they are looked at, so that a load of a
million long prompts takes no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from neustream.bench.profiles.lengths import Floats, Integers, Lengths
from neustream.bench.profiles.words import shared
from neustream.workload.asks import Ask, Limits
from neustream.workload.texts import Texts

PREFIX, QUESTION, TURN = 1, 2, 3
"""Parts of seeds: one for each kind of text."""
POOL = 4096
"""Different texts of a load; of more requests, each begins with a number of its own."""


@dataclass(frozen=True)
class Asked:
    """What all asks of a load have in common.

    Attributes:
        number: of the load among its stages; seed: of all that is drawn.
        arrivals: when each comes, shape (requests,); None: as there are places.
        texts: how prompts are made; limits: what each is promised.
        streams: sessions that go on at once, 0 for all.
    """

    number: int
    seed: int
    requests: int
    arrivals: Floats | None
    texts: Texts
    limits: Limits
    streams: int = 0

    def ask(self, at: int, prompt: str, tokens: int | None, output: int | None, **more: Any) -> Ask:
        """The request at a place in the order."""
        when = None if self.arrivals is None else float(self.arrivals[at])
        name = self.name(at)
        return Ask(name, when, prompt, tokens, output, limits=self.limits, **more)

    def name(self, at: int) -> str:
        return f"{self.number}-{at}"


class Asks(Sequence[Ask]):
    """Asks that are made when they are looked at; two looks find the same."""

    def __init__(self, number: int, make: Callable[[int], Ask]) -> None:
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, at: int) -> Ask: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Ask]: ...
    def __getitem__(self, at: int | slice) -> Ask | Sequence[Ask]:
        if isinstance(at, slice):
            return [self._make(each) for each in range(self._number)[at]]
        if not -self._number <= at < self._number:
            raise IndexError(at)
        return self._make(at % self._number)


class Source(ABC):
    """Where the requests of a profile come from."""

    @abstractmethod
    def asks(self, asked: Asked) -> Sequence[Ask]:
        """The requests of a load, in the order in which they come."""

    @abstractmethod
    def __str__(self) -> str:
        """In a line of the plan."""

    @property
    @abstractmethod
    def scenario(self) -> dict[str, Any]:
        """As `scenario.load.standardized` of a report has it: source, lengths, prefix, turns."""


@dataclass(frozen=True)
class Prefixes:
    """Beginnings that prompts share: `count` different ones of a length."""

    count: int
    tokens: int
    weight: int = 1


@dataclass(frozen=True)
class RandomTexts(Source):
    """Each prompt is another text. Turns of a session follow each other, after `think` seconds."""

    inputs: Lengths
    outputs: Lengths | None
    prefixes: tuple[Prefixes, ...] = ()
    turns: int = 1
    first_inputs: Lengths | None = None
    first_outputs: Lengths | None = None
    think: Lengths | None = None

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rng = np.random.default_rng([asked.seed, asked.number])
        inputs = self.inputs.draw(rng, asked.requests)
        outputs = None if self.outputs is None else self.outputs.draw(rng, asked.requests)
        sessions, turns = self._order(asked)
        first = turns == 0
        if self.turns > 1 and self.first_inputs is not None:
            inputs = np.where(first, self.first_inputs.draw(rng, asked.requests), inputs)
        if self.turns > 1 and self.first_outputs is not None:
            other = self.first_outputs.draw(rng, asked.requests)
            outputs = other if outputs is None else np.where(first, other, outputs)
        picked = self._picked(rng, asked.requests)
        return Asks(
            asked.requests,
            lambda at: self._ask(asked, at, inputs, outputs, picked, sessions, turns),
        )

    def _order(self, asked: Asked) -> tuple[Integers, Integers]:
        """Session and turn of each request: as many sessions at once as there are streams."""
        at = np.arange(asked.requests)
        block = max(1, asked.streams or -(-asked.requests // self.turns))
        inside = at % (block * self.turns)
        return (at // (block * self.turns)) * block + inside % block, inside // block

    def _picked(self, rng: np.random.Generator, number: int) -> Integers:
        """The prefix of each request, -1 for none; shape (number, 2): of which kind, and which."""
        if not self.prefixes:
            return np.full((number, 2), -1)
        weights = np.array([each.weight for each in self.prefixes], dtype=np.float64)
        kinds = rng.choice(len(weights), number, p=weights / weights.sum())
        counts = np.array([each.count for each in self.prefixes])
        return np.stack([kinds, rng.integers(0, counts[kinds])], axis=1)

    def _ask(
        self,
        asked: Asked,
        at: int,
        inputs: Integers,
        outputs: Integers | None,
        picked: Integers,
        sessions: Integers,
        turns: Integers,
    ) -> Ask:
        length, turn = int(inputs[at]), int(turns[at])
        text = asked.texts.text(length, asked.seed, TURN, asked.number, at % POOL)
        text = text if at < POOL else f"{at}{text}"
        kind, which = int(picked[at][0]), int(picked[at][1])
        if kind >= 0 and turn == 0:
            tokens = self.prefixes[kind].tokens
            text = shared(asked.texts, tokens, asked.seed, PREFIX, kind, which) + text
            length += tokens
        output = None if outputs is None else int(outputs[at])
        more: dict[str, Any] = {}
        if self.turns > 1:
            more["session"] = f"{asked.number}-s{sessions[at]}"
        if turn:
            block = max(1, asked.streams or -(-asked.requests // self.turns))
            more["follows"] = asked.name(at - block)
            more["think_s"] = self._think(asked, at)
        return asked.ask(at, text, length, output, **more)

    def _think(self, asked: Asked, at: int) -> float:
        if self.think is None:
            return 0.0
        rng = np.random.default_rng([asked.seed, asked.number, at])
        return float(self.think.draw(rng, 1)[0]) / 1000  # drawn in milliseconds

    def __str__(self) -> str:
        parts = [
            f"random texts of {self.inputs} tokens",
            f"{self.outputs or 'as many as it likes'} out",
        ]
        for each in self.prefixes:
            parts.append(f"{each.count} shared prefixes of {each.tokens}")
        if self.turns > 1:
            parts.append(f"sessions of {self.turns} turns")
        return ", ".join(parts)

    @property
    def scenario(self) -> dict[str, Any]:
        told = {"source": "random", "input_seq_len": sequence(self.inputs)}
        if self.outputs is not None:
            told["output_seq_len"] = sequence(self.outputs)
        if self.prefixes:
            count = sum(each.count for each in self.prefixes)
            told["prefix"] = {
                "prefix_len": sequence(Lengths.fixed(self.prefixes[0].tokens)),
                "num_groups": count,
                "num_users_per_group": 1,
                "num_prefixes": count,
            }
        if self.turns > 1:
            told["multi_turn"] = {"enabled": True, "max_turns": sequence(Lengths.fixed(self.turns))}
        return told


def sequence(lengths: Lengths) -> dict[str, Any]:
    """A distribution as `SequenceLength` of a report has it."""
    kinds = {"fixed": "fixed", "normal": "gaussian", "uniform": "uniform"}
    told: dict[str, Any] = {"distribution": kinds.get(lengths.kind, "other"), "value": lengths.mean}
    if lengths.kind == "fixed":
        return told | {"value": int(lengths.mean)}
    if lengths.most < 2**31:
        told |= {"min": lengths.least, "max": max(1, lengths.most)}
    return told | ({"std_dev": lengths.std} if lengths.kind != "uniform" else {})
