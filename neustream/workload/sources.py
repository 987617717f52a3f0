"""What requests ask for: texts drawn at random, prefixes that they share, sessions of turns.

All draws are of seeds, so that a simulator, a service and an HTTP server get the same requests. The
requests of a source are made when they are looked at: a million long prompts take no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from neustream.workload.asks import NO_LIMITS, Ask, Limits
from neustream.workload.lengths import Floats, Integers, Lengths
from neustream.workload.texts import Texts, shared

PREFIX, QUESTION, TURN = 1, 2, 3
"""Parts of seeds: one for each kind of text."""


@dataclass(frozen=True)
class Asked:
    """What all requests of a load have in common.

    Attributes:
        requests: how many; seed: of all that is drawn; texts: how prompts are made.
        arrivals: when each comes, shape (requests,); None: as there are places.
        limits: what each is promised.
        streams: sessions that go on at once, 0 for all.
        number: of the load among several, which is in the ids; None: there is one.
    """

    requests: int
    seed: int
    texts: Texts
    arrivals: Floats | None = None
    limits: Limits = NO_LIMITS
    streams: int = 0
    number: int | None = None

    @property
    def stage(self) -> int:
        """The number, as a part of seeds."""
        return self.number or 0

    def ask(self, at: int, prompt: str, tokens: int | None, output: int | None, **more: Any) -> Ask:
        """The request at a place in the order."""
        when = None if self.arrivals is None else float(self.arrivals[at])
        name = self.name(at)
        return Ask(name, when, prompt, tokens, output, limits=self.limits, **more)

    def name(self, at: int | str) -> str:
        """The id of a request, or of a session."""
        return str(at) if self.number is None else f"{self.number}-{at}"


class Dataset(Protocol):
    """Makes requests."""

    def asks(self, asked: Asked) -> Sequence[Ask]:
        """The requests of a load, in the order in which they come; a file may have fewer.

        Raises:
            ConfigError: there are none.
        """
        ...


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
    """A `Dataset` that reports describe."""

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
class _Drawn:
    """What was drawn for the requests of a load, shape (requests,); `picked` (requests, 2).

    `before`: tokens that were said before a turn. `picked`: which kind of prefix, and which of it;
    -1 for none. `block`: how many requests there are between two turns of a session.
    """

    inputs: Integers
    outputs: Integers | None
    before: Integers
    picked: Integers
    sessions: Integers
    turns: Integers
    block: int


@dataclass(frozen=True)
class RandomTexts(Source):
    """Each prompt is another text. Turns of a session follow each other, after `think` milliseconds."""

    inputs: Lengths
    outputs: Lengths | None
    prefixes: tuple[Prefixes, ...] = ()
    turns: int = 1
    first_inputs: Lengths | None = None
    first_outputs: Lengths | None = None
    think: Lengths | None = None

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rng = np.random.default_rng([asked.seed, asked.stage])
        inputs = self.inputs.draw(rng, asked.requests)
        outputs = None if self.outputs is None else self.outputs.draw(rng, asked.requests)
        block = max(1, asked.streams or -(-asked.requests // self.turns))
        sessions, turns = self._order(asked.requests, block)
        first = turns == 0
        if self.turns > 1 and self.first_inputs is not None:
            inputs = np.where(first, self.first_inputs.draw(rng, asked.requests), inputs)
        if self.turns > 1 and self.first_outputs is not None:
            other = self.first_outputs.draw(rng, asked.requests)
            outputs = other if outputs is None else np.where(first, other, outputs)
        picked = self._picked(rng, asked.requests)
        inputs_ = inputs + np.where(first, self._prefix_tokens(picked), 0)
        before = self._before(inputs_, outputs, turns, block)
        drawn = _Drawn(inputs, outputs, before, picked, sessions, turns, block)
        return Asks(asked.requests, lambda at: self._ask(asked, at, drawn))

    def _order(self, requests: int, block: int) -> tuple[Integers, Integers]:
        """Session and turn of each request: `block` sessions at once."""
        at = np.arange(requests)
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

    def _prefix_tokens(self, picked: Integers) -> Integers:
        tokens = np.array([*(each.tokens for each in self.prefixes), 0])  # -1 picks the last
        return tokens[picked[:, 0]]

    def _before(self, inputs: Integers, outputs: Integers | None, turns: Integers, block: int) -> Integers:
        """Tokens that stand before each turn: what was asked and answered in those before it."""
        found = np.zeros(len(inputs), dtype=np.int64)
        said = inputs if outputs is None else inputs + outputs
        for turn in range(1, self.turns):
            at = np.flatnonzero(turns == turn)
            found[at] = found[at - block] + said[at - block]
        return found

    def _ask(self, asked: Asked, at: int, drawn: _Drawn) -> Ask:
        length, turn = int(drawn.inputs[at]), int(drawn.turns[at])
        text = asked.texts.text(length, asked.seed, TURN, asked.stage, at)
        length += int(drawn.before[at])
        kind, which = int(drawn.picked[at][0]), int(drawn.picked[at][1])
        if kind >= 0 and turn == 0:
            tokens = self.prefixes[kind].tokens
            text = shared(asked.texts, tokens, asked.seed, PREFIX, kind, which) + text
            length += tokens
        output = None if drawn.outputs is None else int(drawn.outputs[at])
        more: dict[str, Any] = {}
        if self.turns > 1:
            more["session"] = asked.name(f"s{drawn.sessions[at]}")
        if turn:
            more["follows"] = asked.name(at - drawn.block)
            more["think_s"] = self._think(asked, at)
        known = not turn or drawn.outputs is not None
        return asked.ask(at, text, length if known else None, output, **more)

    def _think(self, asked: Asked, at: int) -> float:
        if self.think is None:
            return 0.0
        rng = np.random.default_rng([asked.seed, asked.stage, at])
        return float(self.think.draw(rng, 1)[0]) / 1000  # drawn in milliseconds

    def __str__(self) -> str:
        parts = [
            f"random texts of {self.inputs} tokens",
            f"{self.outputs or 'as many as it likes'} out",
        ]
        for each in self.prefixes:
            kinds = f"{each.count} shared prefixes of {each.tokens}" if each.tokens else "no prefix"
            share = each.weight / sum(other.weight for other in self.prefixes)
            parts.append(kinds if len(self.prefixes) == 1 else f"{kinds} ({share:.0%})")
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
                "prefix_len": self._prefix_lengths(),
                "num_groups": count,
                "num_users_per_group": 1,
                "num_prefixes": count,
            }
        if self.turns > 1:
            told["multi_turn"] = {"enabled": True, "max_turns": sequence(Lengths.fixed(self.turns))}
        return told

    def _prefix_lengths(self) -> dict[str, Any]:
        tokens = [each.tokens for each in self.prefixes]
        if len(set(tokens)) == 1:
            return sequence(Lengths.fixed(tokens[0]))
        weights = [each.weight for each in self.prefixes]
        mean = float(np.average(tokens, weights=weights))
        return {"distribution": "other", "value": mean, "min": min(tokens), "max": max(tokens)}


def sequence(lengths: Lengths) -> dict[str, Any]:
    """A distribution as `SequenceLength` of a report has it."""
    kinds = {"fixed": "fixed", "normal": "gaussian", "uniform": "uniform"}
    told: dict[str, Any] = {"distribution": kinds.get(lengths.kind, "other"), "value": lengths.mean}
    if lengths.kind == "fixed":
        return told | {"value": int(lengths.mean)}
    if lengths.most < 2**31:
        told |= {"min": lengths.least, "max": max(1, lengths.most)}
    return told | ({"std_dev": lengths.std} if lengths.kind != "uniform" else {})
