"""Prefill and decode as stream modules: texts that grow by a token a step, batched as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from neustream.backends.torch import OUT_OF_MEMORY, free_cached
from neustream.backends.transformers.carried import KeysAndValues, carried
from neustream.backends.transformers.choosing import choose, without
from neustream.backends.transformers.fixed import rows_of
from neustream.backends.transformers.lacking import Lacking, pieces
from neustream.backends.transformers.likelihoods import Likelihood, likelihoods, scored
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.prefixes import Prefixes
from neustream.backends.transformers.seats import Held, Seats
from neustream.backends.transformers.slots import Row, Slots
from neustream.backends.transformers.streams import Streams
from neustream.backends.transformers.text import SEEN, Ask, Text, seen
from neustream.core.batch import StepInput
from neustream.engine.executor import StreamModule
from neustream.errors import StageFailed, told

Update = Mapping[str, Any]


class _Turn:
    """What one step does of a text: it computes its tokens up to `end`, by `rows` one after the other."""

    __slots__ = ("end", "known", "like", "rows", "text")

    rows: list[Row]
    """In the text's slot; none: there is nothing to compute yet."""

    def __init__(self, text: Text, end: int, known: int, like: str | None) -> None:
        self.text = text
        self.end = end
        self.like = like  # a request that may have begun alike
        self.known = known  # tokens that the scheduler takes for computed

    @property
    def complete(self) -> bool:
        """Whether the next token comes out of it."""
        return self.end == len(self.text)

    @property
    def logprobs(self) -> int | None:
        """So many likeliest tokens are told of beside the next one; None: nothing is."""
        return self.text.ask.sampling.logprobs if self.complete else None


class Texts:
    """The stream module of one model: the texts of requests, and what is in its slots.

    A step computes, for each job, the tokens that its slot lacks: a part of the prompt, all tokens of
    a job whose slot was taken, or the one that it got last. Where slots do not suffice, a job that is
    not in the step loses its own.

    Args:
        name: of the node `neustream.graphs.llm(name)`, and of the texts in `job.state`.
        ask: what a request wants of the model, asked at the start of its prefill.
        tokenizer: for stop strings; without one there are none.
        prefixes: where beginnings of texts are kept and found.
        splits: a call that finds no memory is made in smaller ones; else its error is raised.
    """

    def __init__(
        self,
        model: LanguageModel,
        ask: Callable[[StepInput], Ask],
        *,
        name: str = "llm",
        tokenizer: Any = None,
        prefixes: Prefixes | None = None,
        splits: bool = True,
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.name = name
        self.prefill, self.decode = f"{name}.prefill", f"{name}.decode"
        self._ask = ask
        self._seats = Seats(model.cache, prefixes)
        self._streams = Streams(model.eos, model.device, tokenizer, model.begins)
        self._splits, self._lacking = splits, Lacking(model.name)
        self._clock = 0
        self._threads = torch.get_num_threads()
        self._limited: set[int] = set()  # threads that know it

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._seats.held)

    def load(self, device: str) -> None:
        """Nothing to do: the model stays on the device that it is on."""

    @torch.inference_mode()
    def step(self, inputs: Sequence[StepInput]) -> list[Update | StageFailed]:
        """One step: prefills, parts of prefills and decodes, in any mixture.

        StageFailed if somebody changed the model: before it, or while it ran.
        """
        if (me := threading.get_ident()) not in self._limited:  # a new thread would take all cores
            torch.set_num_threads(self._threads)
            self._limited.add(me)
        self._clock += 1
        self._lacking.step()
        if self.prefixes is not None:
            self.prefixes.step()
        results: list[Update | StageFailed] = []
        waves = [inputs[first : first + self.model.slots] for first in range(0, len(inputs), self.model.slots)]
        try:
            for wave in waves:
                results += self._wave(wave, last=wave is waves[-1])
        finally:  # at the end: also what was changed while it ran is noticed
            self.model.check_step()
        self._sure(inputs, results)
        return results

    def release(self, id: str) -> None:
        """Its slot is free: the request is over, or its KV blocks were taken."""
        self._streams.forget(id)
        self._seats.leave(id)

    def put_aside(self, id: str) -> None:
        """Its slot is free, and what was in it is kept in the host's memory: its KV blocks were taken."""
        self._seats.put_aside(id)

    def export(self, given: StepInput, first: int = 0) -> KeysAndValues | None:
        """Keys and values of a request from token `first` on, as plain data; None if no slot has any of its own.

        The text itself is in the request's state. It goes on without them too: they are computed anew.
        While the request runs on here, a later call with `first` at the `last` of the one before
        gives what came since.
        """
        held = self._seats.held.get(given.id)
        if held is None or held.cached <= first or not isinstance(self.model.cache, Slots):
            return None
        return carried(self.model.cache, held.slot, first, held.cached)

    def adopt(self, given: StepInput, piece: KeysAndValues) -> None:
        """Put what another model's texts exported of a request into a slot; the next step goes on from it.

        StageFailed if it does not fit this model, or does not follow on what is there.
        """
        held = self._seats.held.get(given.id)
        there = 0 if held is None else held.cached
        cache, text = self.model.cache, given.state.get(self.name)
        if not isinstance(cache, Slots):
            raise StageFailed(f"{self.model.name} takes no keys and values: its requests have caches of their own")
        piece.check(cache, given.id, self.model.name, there, 0 if text is None else len(text) - 1)
        states = piece.states(cache, self.model.device)
        if held is None:
            held = self._seats.take(given.id, self._clock)
        cache.write(held.slot, piece.first, states)
        held.cached = piece.last
        held.used = self._clock

    def pretend(self, id: str, cached: int) -> None:
        """Mark a slot of `id` as filled with `cached` tokens without computing them: to time decodes."""
        held = self._seats.take(id, self._clock)
        held.cached = cached
        self.model.cache.pretend(held.slot, cached)

    # -- inside ---------------------------------------------------------------------------------------

    def _sure(self, inputs: Sequence[StepInput], results: Sequence[Update | StageFailed]) -> None:
        """Note what is in slots now; prompts and whole texts that are complete are there for others at once."""
        for given, result in zip(inputs, results, strict=True):
            held = self._seats.held.get(given.id)
            if held is None or isinstance(result, StageFailed):
                continue
            text: Text = result[self.name]
            held.sure = (text, held.cached)
            most = given.params.get("max_tokens")
            if self.prefixes is not None and (len(text.outputs) in (1, most) or result.get("ended")):
                self.prefixes.keep(held.slot, text, held.cached)

    def _wave(self, inputs: Sequence[StepInput], last: bool) -> list[Update | StageFailed]:
        """A step of as many requests as there are slots, at most; `last`: nothing is computed behind it."""
        for given in inputs:
            if given.id in self._seats.held:
                self._seats.held[given.id].used = self._clock
        turns = {given.id: self._turn(given) for given in inputs}
        self._seats.close_up(list(turns), self.model.lanes(len(turns)))
        for id, turn in turns.items():
            turn.rows = self._rows(id, turn)
        self._seats.expect(sum([len(row.tokens) for turn in turns.values() for row in turn.rows]))
        results: dict[str, Update | StageFailed] = {}
        results |= {id: {self.name: turn.text} for id, turn in turns.items() if not turn.rows}
        groups = self._groups(turns)
        for group in groups:
            results |= self._call(group, turns, last=last and group is groups[-1])
        return [results[given.id] for given in inputs]

    def _groups(self, turns: Mapping[str, _Turn]) -> list[list[str]]:
        """Who shares a forward call: a text whose prompt is scored has one of its own."""
        last = {id: turn.rows[-1] for id, turn in turns.items() if turn.rows}
        alone = [id for id in last if turns[id].text.unscored]
        shared = {id: row for id, row in last.items() if id not in alone}
        return [*([id] for id in alone), *self._lacking.parted(self.model.together(shared), shared)]

    def _call(
        self, group: Sequence[str], turns: Mapping[str, _Turn], last: bool = False
    ) -> dict[str, Update | StageFailed]:
        """One forward call for the rows of `group`, and the tokens behind them; smaller ones where memory lacks.

        What cannot be smaller is tried twice: what took the memory may have gone.
        """
        tried = 0  # rows that a text had before its last one failed
        while True:
            try:
                return self._called(group, turns, last)
            except OUT_OF_MEMORY as error:
                if not self._splits:
                    raise
                why = told(error)
            # here, where nobody holds the error's frames, nor the tensors of the call in them
            if (halves := self._halves(group, turns, why)) is not None:
                return {id: update for half in halves for id, update in self._call(half, turns).items()}
            if (left := len(turns[group[0]].rows)) == tried:
                return {group[0]: self._failed(group[0], f"out of memory: {why}")}
            tried = left

    def _halves(self, group: Sequence[str], turns: Mapping[str, _Turn], why: str) -> list[Sequence[str]] | None:
        """Smaller calls in place of one that found no memory; None: it cannot be smaller.

        What was kept of earlier texts goes first. Choices that were begun are made anew.
        """
        if self.prefixes is not None:
            self.prefixes.give_up()
        free_cached(self.model.device)
        for id in group:
            self._streams.forget(id)
        self._lacking.found_none(sum([len(turns[id].rows[-1].tokens) for id in group]), why)
        if len(group) > 1:
            middle = len(group) // 2
            return [group[:middle], group[middle:]]
        turn = turns[group[0]]
        longest = max([len(row.tokens) for row in turn.rows])
        if longest == 1 or not self._may_cut(turn):
            return None
        turn.rows = [piece for row in turn.rows for piece in pieces(row, -(-longest // 2))]
        return [group]

    def _may_cut(self, turn: _Turn) -> bool:
        """Whether a text's rows may be computed in any pieces."""
        return not self.model.piecewise and turn.text.ask.sight is None

    def _called(self, group: Sequence[str], turns: Mapping[str, _Turn], last: bool) -> dict[str, Update | StageFailed]:
        """The same. If the model raises, each has a call of its own: one may be at fault."""
        try:
            logits = self._logits(group, turns)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001  of one of these requests
            if len(group) == 1:
                return {group[0]: self._failed(group[0], f"the model raised {told(error)}")}
            return {id: update for one in group for id, update in self._call([one], turns).items()}
        if last:
            self.model.look()
        asked = [self._streams.asked(id, turns[id].text) if turns[id].complete else None for id in group]
        results: dict[str, Update | StageFailed] = {}
        barred = [turns[id].text.barred(self.model.eos) for id in group]
        tokens = choose(without(logits, barred), asked)
        likely = likelihoods(logits, tokens, [turns[id].logprobs for id in group])
        for at, (id, token) in enumerate(zip(group, tokens, strict=True)):
            if isinstance(token, str):
                results[id] = self._failed(id, token)
                continue
            self._seats.held[id].cached = turns[id].end
            results[id] = self._update(id, turns[id], token, likely.get(at))
        return results

    def _logits(self, group: Sequence[str], turns: Mapping[str, _Turn]) -> torch.Tensor:
        """The logits [requests, vocabulary] behind the last token of each; prompts are scored on the way.

        Rows before a last one are gone once they are computed: who calls again goes on from there.
        """
        turn = turns[group[0]]
        if turn.text.unscored:  # it has a call of its own
            while True:
                logits = self.model.all_logits(turn.rows[0])
                turn.text = scored(turn.text, turn.rows[0].start, logits)
                if len(turn.rows) == 1:
                    return logits[-1:]
                del turn.rows[0]
        for id in group:
            rows = turns[id].rows
            while len(rows) > 1:
                self.model.forward(rows[:1])
                del rows[0]
        return self.model.forward([turns[id].rows[0] for id in group])

    def _turn(self, given: StepInput) -> _Turn:
        """The text of a request, and how far this step gets with it."""
        text: Text | None = given.state.get(self.name)
        at_prefill = given.stage == self.prefill
        fresh = at_prefill and not given.outputs
        if text is None or (fresh and text.outputs):
            text = Text(seen(self._ask(given), given.state.get(f"{self.name}.{SEEN}")))  # a call of the model begins
            if given.id in self._seats.held:
                self._seats.leave(given.id)
        end = len(text)
        if at_prefill:
            end = max(1, min(round(given.computed + given.size), end))
        return _Turn(text, end, int(given.computed) if fresh else 0, given.params.get("like"))

    def _rows(self, id: str, turn: _Turn) -> list[Row]:
        """What is computed of a text in this step; none where all that it may compute is there."""
        held = self._seats.held.get(id)
        if held is None:
            held = self._begin(id, turn)
        cut = self.model.piecewise or turn.text.ask.sight is not None
        if cut and not turn.complete:
            turn.end = self._cut(turn)
            if held.cached >= turn.end:
                turn.end = held.cached
                return []
        return self._from(held, turn)

    def _begin(self, id: str, turn: _Turn) -> Held:
        """A slot for a request that has none, with what others have, or left, of its prompt."""
        text, held = turn.text, None
        prompt, count = text.ask.begins, len(text.ask.prompt)
        if (back := self._seats.bring_back(id, self._clock)) is not None:
            return back
        if turn.like is not None and not text.unscored and isinstance(self.model.cache, Slots):
            held = self._seats.fork(id, prompt, self.model.alike(count), self._clock)
        held = held or self._seats.take(id, self._clock)
        held.prompt = prompt
        if not held.cached and self.prefixes is not None and turn.known:
            held.cached = held.shared = self.prefixes.fill(held.slot, text.ask, turn.known)
        return held

    def _cut(self, turn: _Turn) -> int:
        """The last place before the end of the step at which the text may be cut."""
        text, end = turn.text, turn.end
        if self.model.piecewise:
            end = self.model.floor(end, len(text.ask.prompt))
        return end if text.ask.sight is None else text.ask.sight.floor(end)

    def _from(self, held: Held, turn: _Turn) -> list[Row]:
        """The rows from what is cached to the end of the step; the last token is computed in any case."""
        text, prompt, sight = turn.text, len(turn.text.ask.prompt), turn.text.ask.sight
        start = min(held.cached, turn.end - 1)
        if self.model.piecewise and held.cached >= turn.end:
            start = self.model.floor(turn.end - 1, prompt)
        looks = sight if sight is not None and sight.matters(start) else None
        row = Row(held.slot, start, text.tokens(start, turn.end), looks, text.ask.adapter)
        if self.model.piecewise:
            return rows_of(row, prompt)
        return self._lacking.cut([row]) if self._may_cut(turn) else [row]

    def _failed(self, id: str, why: str) -> StageFailed:
        """A request fails, and nothing of it stays behind."""
        held = self._seats.held[id]
        held.sure = None
        self.model.cache.scrub(held.slot)
        self.release(id)
        return StageFailed(f"stage {self.name!r}: {why}")

    def _update(self, id: str, turn: _Turn, token: int, likely: Likelihood | None) -> Update | StageFailed:
        text = turn.text
        if not turn.complete:
            return {self.name: text}
        stream = self._streams.stream(id, text)
        more: dict[str, Any] = {} if likely is None else {"likelihood": likely}
        if text.ask.sampling.prompt_logprobs is not None and not text.outputs:
            more["scores"] = text.scores
        if (shared := self._seats.held[id].shared) and not text.outputs:
            more["cached"] = shared
        text = text.add(token, stream)
        if stopped := self._streams.stopped(id, text):
            more["stopped"] = True
        over = stopped or text.over(self.model.eos)
        if token >= self.model.known and not over:
            return self._failed(id, f"token {token} has no embedding to go on with: there are {self.model.known}")
        return {self.name: text, "token": token, "ended": over, **more}


def modules_of(texts: Texts) -> dict[str, StreamModule]:
    """The module of `neustream.graphs.llm(texts.name)`, by the names of its steps."""
    return dict.fromkeys((texts.prefill, texts.decode, texts.name), texts)
