"""Prompts with beginnings that a group shares, and conversations of several turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neustream.workload.asks import Ask
from neustream.workload.lengths import Integers, Lengths
from neustream.workload.sources import (
    PREFIX,
    QUESTION,
    TURN,
    Asked,
    Asks,
    Source,
    sequence,
)
from neustream.workload.texts import shared


@dataclass(frozen=True)
class SharedPrefix(Source):
    """Groups of prompts with the same beginning, asked in a drawn order, over and over.

    multi_turn: each prompt is a session, whose turns ask the same again behind all that was said.
    per_group: prompts of a group; None: as many as are asked for, once each.
    """

    groups: int
    per_group: int | None
    system: Lengths
    question: Lengths
    output: Lengths
    multi_turn: bool = False

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rng = np.random.default_rng(asked.seed)  # the same prompts in every load
        per_group = self.per_group or -(-asked.requests // self.groups)
        prompts = self.groups * per_group
        system = self.system.draw(rng, self.groups)
        question, output = self.question.draw(rng, prompts), self.output.draw(rng, prompts)
        order = rng.permutation(prompts)
        return Asks(asked.requests, lambda at: self._ask(asked, at, order, (system, question, output)))

    def _ask(self, asked: Asked, at: int, order: Integers, lengths: tuple[Integers, Integers, Integers]) -> Ask:
        system, question, output = lengths
        turn, place = divmod(at, len(order))
        prompt = int(order[place])
        group = prompt // (len(order) // self.groups)
        own, out = int(question[prompt]), max(1, int(output[prompt]))
        text = asked.texts.text(own, asked.seed, QUESTION, prompt)
        length = own + int(system[group])
        if not self.multi_turn or turn == 0:
            text = shared(asked.texts, int(system[group]), asked.seed, PREFIX, group) + text
        more: dict[str, Any] = {}
        if self.multi_turn:
            more["session"] = asked.name(f"s{place}")
            length += turn * (own + out)
        if self.multi_turn and turn:
            more["follows"] = asked.name(at - len(order))
        return asked.ask(at, text, length, out, **more)

    def __str__(self) -> str:
        kind = "sessions that go on" if self.multi_turn else "prompts"
        each = self.per_group or "all"
        return (
            f"{self.groups} shared prefixes of {self.system} tokens, {each} {kind} each, "
            f"questions of {self.question}, {self.output} out"
        )

    @property
    def scenario(self) -> dict[str, Any]:
        both = Lengths.fixed(self.system.mean + self.question.mean)
        told: dict[str, Any] = {
            "source": "random",
            "input_seq_len": sequence(both),
            "output_seq_len": sequence(self.output),
            "prefix": {
                "prefix_len": sequence(self.system),
                "num_groups": self.groups,
                "num_users_per_group": self.per_group or 1,
                "num_prefixes": self.groups,
            },
        }
        return told | ({"multi_turn": {"enabled": True}} if self.multi_turn else {})


@dataclass(frozen=True)
class Conversations(Source):
    """Conversations whose turns are asked round about, each after what was said in it before.

    One that is over begins anew, as does one that would become longer than `most_tokens`.
    """

    number: int
    shared_tokens: int
    system: Lengths
    turns: Lengths
    inputs: Lengths
    outputs: Lengths
    think: Lengths
    most_tokens: int

    def asks(self, asked: Asked) -> Sequence[Ask]:
        rng = np.random.default_rng(asked.seed)  # the same conversations in every load
        turns = np.maximum(1, self.turns.draw(rng, self.number))
        system = self.system.draw(rng, self.number)
        rounds = -(-asked.requests // self.number)
        shape = (rounds, self.number)
        drawn = [each.draw(rng, rounds * self.number) for each in (self.inputs, self.outputs, self.think)]
        inputs, outputs, think = (each.reshape(shape) for each in drawn)
        outputs = np.maximum(1, outputs)
        fresh, before = self._fresh(turns, self.shared_tokens + system, inputs + outputs)
        lengths = (system, inputs, outputs, think)
        return Asks(asked.requests, lambda at: self._ask(asked, at, fresh, before, lengths))

    def _fresh(self, turns: Integers, system: Integers, lengths: Integers) -> tuple[Integers, Integers]:
        """Which conversation of its place each turn is of, from 0, and the tokens before the turn.

        Both of shape (rounds, places).
        """
        count, turn = np.zeros(len(turns), dtype=np.int64), np.zeros(len(turns), dtype=np.int64)
        tokens, found, before = system.copy(), np.zeros_like(lengths), np.zeros_like(lengths)
        for at, row in enumerate(lengths):
            over = (turn >= turns) | ((turn > 0) & (tokens + row > self.most_tokens))
            count, turn = count + over, np.where(over, 0, turn)
            before[at] = np.where(over, system, tokens)
            tokens = before[at] + row
            turn += 1
            found[at] = count
        return found, before

    def _ask(
        self,
        asked: Asked,
        at: int,
        fresh: Integers,
        before: Integers,
        lengths: tuple[Integers, Integers, Integers, Integers],
    ) -> Ask:
        system, inputs, outputs, think = lengths
        turn, place = divmod(at, self.number)
        length = int(inputs[turn][place])
        text = asked.texts.text(length, asked.seed, TURN, asked.stage, at)
        length += int(before[turn][place])
        last = int(fresh[turn - 1][place]) if turn else -1
        more: dict[str, Any] = {"session": asked.name(f"s{place}-{fresh[turn][place]}")}
        if last == fresh[turn][place]:
            more |= {
                "follows": asked.name(at - self.number),
                "think_s": float(think[turn - 1][place]),
            }
        else:
            own = shared(asked.texts, int(system[place]), asked.seed, QUESTION, place)
            text = shared(asked.texts, self.shared_tokens, asked.seed, PREFIX, asked.stage) + own + text
        return asked.ask(at, text, length, int(outputs[turn][place]), **more)

    def __str__(self) -> str:
        think = f", {self.think} s between turns" if self.think.most else ""
        return (
            f"{self.number} conversations of {self.turns} turns, {self.inputs} tokens in and "
            f"{self.outputs} out a turn, system prompts of {self.shared_tokens} shared "
            f"and {self.system} of their own{think}"
        )

    @property
    def scenario(self) -> dict[str, Any]:
        return {
            "source": "random",
            "input_seq_len": sequence(self.inputs),
            "output_seq_len": sequence(self.outputs),
            "prefix": {
                "prefix_len": sequence(Lengths.fixed(self.shared_tokens)),
                "num_groups": 1,
                "num_users_per_group": self.number,
                "num_prefixes": 1,
            },
            "multi_turn": {"enabled": True, "max_turns": sequence(self.turns)},
        }
