"""Prefill and decode as stream modules: texts that grow by a token a step, batched as they come."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sampling import Draw, Sampling, choose
from neustream.backends.transformers.slots import Row
from neustream.core.types import Job
from neustream.engine.executor import StreamModule
from neustream.errors import StageFailed

Update = Mapping[str, Any]
WASTE = 1.5
SHORT = 16
"""A row joins a forward call of longer rows, padded to them, if they have at most so many times or tokens more."""

LIVE = ("waiting", "running")


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call of the model is asked: token ids of the prompt, and how to choose the next ones.

    `end`: outputs after which it ends as if the model had said so (a workload's own lengths).
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    end: int | None = None


class Text:
    """One call of the model for one job: its tokens so far, and its random stream.

    It lives in `job.state`, apart from the keys and values in a slot: those can be computed anew
    from the tokens, by which they and all later tokens come out the same.
    """

    __slots__ = ("ask", "draw", "prompt", "tokens")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.prompt = len(ask.prompt)
        self.tokens = list(ask.prompt)
        self.draw = Draw(ask.sampling) if ask.sampling.temperature > 0 else None

    def add(self, token: int, eos: Collection[int]) -> bool:
        """Take in the next token; whether the text has ended with it."""
        self.tokens.append(token)
        sampling = self.ask.sampling
        if len(self.tokens) - self.prompt == self.ask.end:
            return True
        return token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)


class _Held:
    """A job's slot, how many of its tokens are in it, and when it was last used."""

    __slots__ = ("cached", "slot", "used")

    def __init__(self, slot: int) -> None:
        self.slot, self.cached, self.used = slot, 0, 0


class Texts:
    """The texts of jobs on one model, and what is in its slots.

    A step computes, for each job, the tokens that its slot lacks: a part of the prompt, all tokens of
    a job whose slot was taken, or the one that it got last. Where slots do not suffice, a job that is
    not in the step loses its own.

    Args:
        name: of the node `neustream.graphs.llm(name)`, and of the texts in `job.state`.
        ask: what a job wants of the model, asked at the start of its prefill.
    """

    def __init__(self, model: LanguageModel, ask: Callable[[Job], Ask], *, name: str = "llm") -> None:
        self.model = model
        self.name = name
        self.prefill, self.decode = f"{name}.prefill", f"{name}.decode"
        self._ask = ask
        self._held: dict[Job, _Held] = {}
        self._free = list(range(model.slots - 1, -1, -1))  # the lowest last: neighbours are read without a copy
        self._clock = 0
        self._threads = torch.get_num_threads()
        self._limited: set[int] = set()  # threads that know it

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._held)

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> list[Update | StageFailed]:
        """One step: prefills, parts of prefills and decodes, in any mixture."""
        if (me := threading.get_ident()) not in self._limited:  # a new thread would take all cores
            torch.set_num_threads(self._threads)
            self._limited.add(me)
        self._clock += 1
        results: dict[Job, Update | StageFailed] = {}
        for first in range(0, len(jobs), self.model.slots):
            results |= self._wave(jobs[first : first + self.model.slots])
        return [results[job] for job in jobs]

    def release(self, job: Job) -> None:
        """Its slot is free: it is over, or its memory was taken."""
        held = self._held.pop(job, None)
        if held is not None:
            self._free.append(held.slot)
            self._free.sort(reverse=True)

    def pretend(self, job: Job, cached: int) -> None:
        """Give `job` a slot that is said to hold so many tokens, which nobody computed: to time steps."""
        held = self._held[job] = self._take()
        held.cached = cached

    # -- inside ---------------------------------------------------------------------------------------

    def _wave(self, jobs: Sequence[Job]) -> dict[Job, Update | StageFailed]:
        """A step of as many jobs as there are slots, at most."""
        texts = {job: self._text(job) for job in jobs}
        for job in jobs:
            if job in self._held:
                self._held[job].used = self._clock
        self._close_up(jobs)
        ends = {job: self._end(job, text) for job, text in texts.items()}
        rows = {job: self._row(job, text, ends[job]) for job, text in texts.items()}
        results: dict[Job, Update | StageFailed] = {}
        for group in _groups(rows):
            logits = self.model.forward([rows[job] for job in group])
            draws = [texts[job].draw if ends[job] == len(texts[job].tokens) else None for job in group]
            for job, token in zip(group, choose(logits, draws), strict=True):
                self._held[job].cached = ends[job]
                results[job] = self._update(job, texts[job], ends[job], token)
        return results

    def _text(self, job: Job) -> Text:
        """Its text; a new one where a call of the model begins."""
        text: Text | None = job.state.get(self.name)
        at_prefill = job.stage is not None and job.stage.name == self.prefill
        if text is None or (at_prefill and not job.run and not job.progress and len(text.tokens) > text.prompt):
            text = Text(self._ask(job))
            if job in self._held:
                self._held[job].cached = 0
        return text

    def _end(self, job: Job, text: Text) -> int:
        """How many of its tokens are in its slot after this step."""
        if job.stage is not None and job.stage.name == self.prefill:
            return max(1, min(round(job.progress + job.share), len(text.tokens)))
        return len(text.tokens)

    def _row(self, job: Job, text: Text, end: int) -> Row:
        held = self._held.get(job)
        if held is None:
            held = self._held[job] = self._take()
        start = min(held.cached, end - 1)
        return Row(held.slot, start, text.tokens[start:end])

    def _close_up(self, jobs: Sequence[Job]) -> None:
        """Move texts from the highest slots into free ones between the others: neighbours are read without a copy."""
        held = sorted((self._held[job] for job in jobs if job in self._held), key=lambda one: one.slot)
        while held:
            hole = min((slot for slot in self._free if slot > held[0].slot), default=math.inf)
            if hole > held[-1].slot:
                return
            top, at = held.pop(), self._free.index(int(hole))
            self.model.cache.move(top.slot, self._free[at], top.cached)
            self._free[at], top.slot = top.slot, self._free[at]
            self._free.sort(reverse=True)

    def _take(self) -> _Held:
        """A free slot, or that of a job that is over, or of the one that has not used its own for the longest time.

        A job's end is told behind the step that the scheduler starts then, which may need its slot.
        """
        if not self._free:
            self.release(min(self._held, key=lambda job: (job.status in LIVE, self._held[job].used)))
        held = _Held(self._free.pop())
        held.used = self._clock
        return held

    def _update(self, job: Job, text: Text, end: int, token: int | None) -> Update | StageFailed:
        if token is None:
            self.model.cache.scrub(self._held[job].slot)
            self.release(job)
            return StageFailed(f"stage {self.name!r}: the model's logits are NaN or infinite")
        if end < len(text.tokens):
            return {self.name: text}
        return {self.name: text, "token": token, "ended": text.add(token, self.model.eos)}


class TextModule:
    """Steps of some texts; the model is where its owner put it."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def load(self, device: str) -> None:
        """Nothing to do: the model stays on the device that it is on."""

    def step(self, jobs: Sequence[Job]) -> Sequence[Update | StageFailed]:
        results: Sequence[Update | StageFailed] = self._texts.step(jobs)
        return results

    def release(self, job: Job) -> None:
        self._texts.release(job)


class Prefill(TextModule):
    """Computes prompts, whole or in parts; a complete one gets its first token."""


class Decode(TextModule):
    """Adds one token to each text."""


def modules_of(texts: Texts) -> dict[str, StreamModule]:
    """The modules of `neustream.graphs.llm(texts.name)`: prefills, decodes, and both in one step."""
    return {texts.prefill: Prefill(texts), texts.decode: Decode(texts), texts.name: TextModule(texts)}


def _groups(rows: Mapping[Job, Row]) -> list[list[Job]]:
    """Jobs by forward call: decodes together, prompts with others of similar length; by slot within each."""
    groups: list[list[Job]] = []
    width = 0
    for job in sorted(rows, key=lambda job: -len(rows[job].tokens)):
        length = len(rows[job].tokens)
        if not groups or width > max(length * WASTE, length + SHORT) or (length == 1) != (width == 1):
            groups.append([])
            width = length
        groups[-1].append(job)
    for group in groups:
        group.sort(key=lambda job: rows[job].slot)
    return groups
