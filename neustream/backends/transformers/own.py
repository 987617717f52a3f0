"""Texts with caches of their own: what the stock library keeps of one request, whatever that is.

For models whose requests cannot share slots: state spaces, positions that the model counts itself,
encoders, no cache at all. Each request is computed as `generate` computes it, from inputs that
`generate` itself prepared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel

from neustream.backends.transformers.joined import Company, NotAlike
from neustream.backends.transformers.slots import Row
from neustream.errors import BackendError

PLAIN: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "pad_token_id": 0}
"""How `generate` is asked to prepare a request: the tokens are chosen elsewhere."""


class State:
    """What is kept of one request behind its last call.

    Attributes:
        tokens: all that are computed, those of the prompt first; `first` of them in one call.
        ids: what `generate` calls its input ids, [1, n]; of models with an encoder those of the decoder.
        kwargs: what `generate` hands from call to call, the cache among them.
        behind: logits [vocabulary] behind the last token; None: a call failed on the way.
    """

    __slots__ = ("behind", "first", "ids", "kwargs", "out", "tokens")

    def __init__(self, tokens: Sequence[int], ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.tokens, self.first = list(tokens), len(tokens)
        self.ids, self.kwargs = ids, kwargs
        self.out: Any = None
        self.behind: torch.Tensor | None = None

    def twin(self) -> State:
        """A copy that shares nothing."""
        twin = State(self.tokens, self.ids.clone(), copy.deepcopy(self.kwargs))
        twin.first, twin.out, twin.behind = self.first, copy.deepcopy(self.out), self.behind
        twin.kwargs |= {name: twin.out[name] for name in self.cached if name in twin.out}
        return twin

    @property
    def cached(self) -> list[str]:
        """The names under which `kwargs` has caches."""
        return [name for name, value in self.kwargs.items() if isinstance(value, Cache)]


class Own:
    """The requests of one model, each with a cache of its own: `slots` of up to `length` tokens.

    Args:
        joins: decodes share a call, where their caches can be put side by side.
    """

    def __init__(self, model: PreTrainedModel, slots: int, length: int, joins: bool = False) -> None:
        self.model, self.slots, self.length, self.joins = model, slots, length, joins
        self._name = type(model).__name__
        self._states: dict[int, State] = {}
        self._company: Company | None = None
        self._samples: dict[int, State] = {}
        encodes = model.config.is_encoder_decoder
        self.begins: Sequence[int] | None = self.begin([0]).ids[0].tolist() if encodes else None
        """What outputs begin with where an encoder reads the prompt."""

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Compute the rows' tokens; the float32 logits [rows, vocabulary] behind each row's last."""
        if any(row.sight is not None for row in rows):
            raise BackendError(f"images are for models in slots, and requests of {self._name} have their own caches")
        known = [self._known(row) for row in rows]
        wanted = [at for at, (row, state) in enumerate(zip(rows, known, strict=True)) if _decodes(row, state)]
        if self.joins and len(wanted) > 1:
            self._together([known[at] for at in wanted], [rows[at].tokens[0] for at in wanted])
        found = [self._computed(row, state) for row, state in zip(rows, known, strict=True)]
        return torch.stack([state.behind for state in found if state.behind is not None])

    def all_logits(self, row: Row) -> torch.Tensor:
        """Compute one row; the logits [tokens, vocabulary] behind each of its tokens."""
        state = self._known(row)
        if state is None or len(state.tokens) != row.start:
            state = self._again(row, state)
        self._leave_company([state])
        logits = self._call(state, row.tokens, every=True) if row.start else self._first(state, every=True)
        self._states[row.slot] = state
        if self.begins is not None or len(logits) < len(row.tokens):
            raise BackendError(f"{self._name} gives no logits of all tokens of a prompt")
        return logits[-len(row.tokens) :].float()

    def begin(self, tokens: Sequence[int]) -> State:
        """A request as `generate` prepares it, before its first call."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        held: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def hold(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            of_generate = ("logits_processor", "stopping_criteria", "generation_config")
            held.append((input_ids, {name: value for name, value in kwargs.items() if name not in of_generate}))
            return input_ids

        how = GenerationConfig(**PLAIN, max_new_tokens=max(1, self.length - len(tokens)))
        if self.model.generation_config.cache_implementation is not None:  # static ones are as long as one text
            how.cache_implementation = "dynamic"
        self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how, custom_generate=hold)
        return State(tokens, *held[0])

    def prefill(self, tokens: Sequence[int]) -> State:
        """A request whose tokens are computed in one call."""
        state = self.begin(tokens)
        self._first(state)
        return state

    def extend(self, state: State, tokens: Sequence[int]) -> State:
        """The request with more tokens, computed in one call."""
        self._call(state, tokens)
        return state

    def replay(self, tokens: Sequence[int], first: int) -> State:
        """A request computed anew: so many tokens in one call, then each by itself."""
        state = self.prefill(tokens[:first])
        for token in tokens[first:]:
            self.extend(state, [token])
        return state

    def stretch(self, state: State, count: int) -> None:
        """Put `count` tokens of noise, as large as what is there, behind a request, without a call.

        NotAlike: its cache is none of keys and values, or of states.
        """
        if count < 1:
            return
        random = torch.Generator(self.model.device).manual_seed(count)
        for name in state.cached:
            for layer in Company.layers_of(state.kwargs[name]):
                _stretch(layer, count, random)
        state.kwargs = self.updated(state.kwargs, state.out, count)
        state.ids = torch.cat([state.ids, state.ids.new_zeros(1, count)], 1)
        state.tokens += [0] * count

    @torch.inference_mode()
    def pretend(self, slot: int, tokens: int) -> None:
        """Fill a slot as if so many tokens had been computed, to time what comes behind."""
        if tokens not in self._samples:
            self._samples[tokens] = self._sample(tokens)
        self._states[slot] = self._samples[tokens].twin()

    def move(self, source: int, target: int, tokens: int) -> None:
        """A request gets another slot."""
        if (state := self._states.pop(source, None)) is not None:
            self._states[target] = state

    def shrink(self) -> None:
        """Nothing to do: nothing is kept of who is gone."""

    def free(self, slot: int) -> None:
        """Forget what is in a slot."""
        self._states.pop(slot, None)

    scrub = free

    def updated(self, kwargs: dict[str, Any], out: Any, count: int) -> dict[str, Any]:
        """What `generate` hands on to a call of `count` more tokens, behind one that gave `out`."""
        more = {} if count == 1 else {"num_new_tokens": count}
        found: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            out, dict(kwargs), is_encoder_decoder=self.model.config.is_encoder_decoder, **more
        )
        return found

    # -- inside -----------------------------------------------------------------------------------

    def _known(self, row: Row) -> State | None:
        """The request in a row's slot, where it has the tokens before the row, or the row's too."""
        state = self._states.get(row.slot)
        if state is None or state.behind is None:
            return None
        if len(state.tokens) == row.start or state.tokens[row.start :] == list(row.tokens):
            return state
        return None

    def _computed(self, row: Row, state: State | None) -> State:
        """The request with the row's tokens computed."""
        if state is not None and len(state.tokens) == row.end and state.behind is not None:
            return state
        if state is None:
            state = self._again(row, self._states.get(row.slot))
        self._leave_company([state])
        if row.start:
            self.extend(state, row.tokens)
        else:
            self._first(state)
        self._states[row.slot] = state
        return state

    def _again(self, row: Row, state: State | None) -> State:
        """The request anew up to where the row begins: after a call that failed, or to go back."""
        if not row.start:
            return self.begin(row.tokens)
        before = [] if state is None else state.tokens[: row.start]
        if state is None or len(before) < row.start:
            raise BackendError(f"slot {row.slot} has {len(before)} tokens, and a call begins at {row.start}")
        return self.replay(before, min(state.first, row.start))

    def _together(self, states: Sequence[State | None], tokens: Sequence[int]) -> None:
        """One more token of each in one call; those whose caches are not alike are left as they are."""
        members = [state for state in states if state is not None]
        try:
            if self._company is None or not self._company.is_of(members):
                self._part()
                self._company = Company(self, members)
            self._company.step(members, tokens)
        except NotAlike:
            return
        except BaseException:
            for state in self._company.members if self._company else members:
                state.behind = None  # its cache may be half written
            self._company = None
            raise

    def _leave_company(self, states: Sequence[State]) -> None:
        """Give members of the company their caches back, if any of `states` is one."""
        if self._company is not None and any(state in self._company.members for state in states):
            self._part()

    def _part(self) -> None:
        if self._company is not None:
            self._company.part()
            self._company = None

    def _first(self, state: State, every: bool = False) -> torch.Tensor:
        inputs = self.model.prepare_inputs_for_generation(
            state.ids, next_sequence_length=None, is_first_iteration=True, **state.kwargs
        )
        return self._run(state, inputs, every)

    def _call(self, state: State, tokens: Sequence[int], every: bool = False) -> torch.Tensor:
        state.behind = None  # until it is done
        count = len(tokens)
        state.kwargs = self.updated(state.kwargs, state.out, count)
        state.ids = torch.cat([state.ids, state.ids.new_tensor([list(tokens)])], 1)
        state.tokens += tokens
        wanted = count if state.kwargs.get("use_cache") else None
        inputs = self.model.prepare_inputs_for_generation(state.ids, next_sequence_length=wanted, **state.kwargs)
        return self._run(state, inputs, every)

    def _run(self, state: State, inputs: dict[str, Any], every: bool) -> torch.Tensor:
        if every and "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0
        out = self.model(**inputs, return_dict=True)
        logits: torch.Tensor = out.logits[0]
        out["logits"] = out.logits[:, -1:]
        state.out, state.behind = out, logits[-1].float()
        return logits

    def _sample(self, tokens: int) -> State:
        """A request of so many tokens: a short one with noise behind it, or where that cannot be, computed."""
        state = self.prefill([0] * min(tokens, 8))
        try:
            self.stretch(state, tokens - len(state.tokens))
        except NotAlike:
            state = self.prefill([0] * tokens)
        return state


def _decodes(row: Row, state: State | None) -> bool:
    """Whether a row is the next token of a request."""
    return state is not None and len(row.tokens) == 1 and 0 < row.start == len(state.tokens)


def _stretch(layer: Any, count: int, random: torch.Generator) -> None:
    """Noise behind a layer's keys and values, and beside them."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.shape[-2]:
        layer.update(_noise(keys, count, random), _noise(values, count, random))
    indexed = getattr(layer, "indexer_keys", None)
    if isinstance(indexed, torch.Tensor):
        layer.update_indexer(_noise(indexed, count, random))
    places = getattr(layer, "indexer_position_ids", None)
    if isinstance(places, torch.Tensor):
        more = torch.arange(1, count + 1, device=places.device)
        layer.indexer_position_ids = torch.cat([places, places[..., -1:] + more], -1)


def _noise(like: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    shape = (*like.shape[:-2], count, like.shape[-1])
    spread = max(float(like.float().std(correction=0).nan_to_num()), 1e-3)
    return (torch.randn(shape, generator=random, device=like.device) * spread).to(like.dtype)
