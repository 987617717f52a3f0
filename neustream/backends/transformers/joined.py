"""Caches of several requests side by side, so that their decodes share a call of the stock model.

Keys and values are padded on the left to the longest, as the stock library pads batches; states have
no length and are put side by side as they are. The company stays together while its members do, so
that nothing is copied from step to step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.utils import ModelOutput

from neustream.errors import BackendError

if TYPE_CHECKING:
    from neustream.backends.transformers.own import Own, State

TOKENS = ("keys", "values", "indexer_keys")
"""What layers call tensors with a place for each token, [1, ..., tokens, width]."""
STATES = ("conv_states", "recurrent_states")
"""What they call dicts of tensors whose shape is the same for all texts, [1, ...]."""
LENGTH = "cumulative_length"
"""What they call the number of tokens that they saw."""
POSITIONS, MASK = "position_ids", "attention_mask"


class NotAlike(BackendError):
    """Requests whose caches cannot be put side by side, and why."""


class Company:
    """Requests whose caches are side by side.

    Raises:
        NotAlike: they cannot be.
    """

    def __init__(self, own: Own, members: Sequence[State]) -> None:
        self._own, self.members = own, list(members)
        self._lengths = [len(state.tokens) for state in members]
        self._kwargs, self._name = _shared(members)
        caches = [state.kwargs[self._name] for state in members]
        layers = zip(*[self.layers_of(cache) for cache in caches], strict=True)
        self._cache = copy.copy(caches[0])
        self._cache.layers = [_joined(some) for some in layers]

    @staticmethod
    def layers_of(cache: Any) -> Sequence[Any]:
        """The layers of a stock cache; NotAlike: it is another kind of cache."""
        if type(cache) is not DynamicCache:
            raise NotAlike(f"its cache is a {type(cache).__name__}")
        layers: Sequence[Any] = cache.layers
        return layers

    def is_of(self, states: Sequence[State]) -> bool:
        """Whether these, in any order, are its members."""
        return len(states) == len(self.members) and {*map(id, states)} == {*map(id, self.members)}

    def step(self, states: Sequence[State], tokens: Sequence[int]) -> None:
        """One more token of each member."""
        given = dict(zip(map(id, states), tokens, strict=True))
        nothing = ModelOutput()
        for at, state in enumerate(self.members):
            token = given[id(state)]
            state.kwargs = self._own.updated(state.kwargs, nothing, 1)
            state.ids = torch.cat([state.ids, state.ids.new_tensor([[token]])], 1)
            state.tokens.append(token)
            state.behind = None
            self._lengths[at] += 1
        ids = torch.cat([state.ids[:, -1:] for state in self.members])
        kwargs = {**self._kwargs, self._name: self._cache, MASK: self._mask(ids.device)}
        if self.members[0].kwargs.get(POSITIONS) is not None:
            places = [state.kwargs[POSITIONS][..., -1:] for state in self.members]
            kwargs[POSITIONS] = torch.cat(places, dim=places[0].dim() - 2)
        inputs = self._own.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        out = self._own.model(**inputs, return_dict=True)
        for state, logits in zip(self.members, out.logits[:, -1].float(), strict=True):
            state.behind = logits

    def part(self) -> None:
        """Give each member its own cache back."""
        for at, state in enumerate(self.members):
            own = copy.copy(self._cache)
            own.layers = [_parted(layer, at, self._lengths[at]) for layer in self._cache.layers]
            state.kwargs[self._name] = own
            state.out = ModelOutput()

    def _mask(self, device: torch.device) -> torch.Tensor | None:
        """Which of the places of the longest each member has, [members, places]; None: all have all."""
        longest = max(self._lengths)
        if min(self._lengths) == longest:
            return None
        pads = torch.tensor([longest - length for length in self._lengths], device=device)
        return (torch.arange(longest, device=device) >= pads[:, None]).long()


def kept_of_tokens(state: State) -> int:
    """The bytes that a request's caches take for its tokens; 0: none that are known here."""
    layers = [layer for name in state.cached for layer in getattr(state.kwargs[name], "layers", ())]
    kept = [getattr(layer, name, None) for layer in layers for name in TOKENS]
    return sum(each.nbytes for each in kept if isinstance(each, torch.Tensor))


def _shared(members: Sequence[State]) -> tuple[dict[str, Any], str]:
    """What calls of all members are given alike, and the name of their cache."""
    names = members[0].cached
    if len(names) != 1:
        raise NotAlike(f"it has {len(names)} caches")
    own = {names[0], POSITIONS, MASK}
    shared = {name: value for name, value in members[0].kwargs.items() if name not in own}
    for name, value in shared.items():
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise NotAlike(f"its calls take {name} of each request")
        if any(state.kwargs.get(name) != value for state in members):
            raise NotAlike(f"its calls take another {name} for some requests")
    return shared, names[0]


def _joined(layers: Sequence[Any]) -> Any:
    """One layer of what several requests' have, [requests, ...]."""
    joined = copy.copy(layers[0])
    for name in vars(layers[0]):
        joined.__dict__[name] = _one_of(name, layers)
    return joined


def _one_of(name: str, layers: Sequence[Any]) -> Any:
    """What a joined layer has as `name`; NotAlike where the layers' own cannot be one."""
    values: list[Any] = [getattr(layer, name, None) for layer in layers]
    first = values[0]
    if name in TOKENS and isinstance(first, torch.Tensor):
        return _padded(values)
    if name in STATES and isinstance(first, dict):
        return {key: _beside([each[key] for each in values]) for key in first}
    if name == LENGTH:
        return max(values)
    if not all(_same(first, other) for other in values):
        kind = type(layers[0]).__name__
        raise NotAlike(f"a layer of its cache, {kind}, has another {name} for some requests")
    return dict(first) if isinstance(first, dict) else first


def _padded(tensors: Sequence[Any]) -> torch.Tensor:
    longest = max(each.shape[-2] for each in tensors)
    return torch.cat([torch.nn.functional.pad(each, (0, 0, longest - each.shape[-2], 0)) for each in tensors])


def _beside(tensors: Sequence[Any]) -> torch.Tensor | None:
    there = [each for each in tensors if each is not None]
    if not there:
        return None
    if len(there) < len(tensors):
        raise NotAlike("some requests have states that others have not")
    if len({each.shape for each in there}) > 1:
        raise NotAlike("its states have other shapes for some requests")
    return torch.cat(there)


def _parted(layer: Any, at: int, length: int) -> Any:
    """One request's part of a joined layer, whose text has so many tokens."""
    own = copy.copy(layer)
    window = getattr(layer, "sliding_window", None)
    kept = length if window is None else min(length, window - 1)
    for name, value in vars(layer).items():
        if name in TOKENS and isinstance(value, torch.Tensor):
            own.__dict__[name] = value[at : at + 1, ..., max(value.shape[-2] - kept, 0) :, :].clone()
        elif name in STATES and isinstance(value, dict):
            own.__dict__[name] = {key: None if x is None else x[at : at + 1].clone() for key, x in value.items()}
        elif name == LENGTH:
            own.__dict__[name] = length
        elif isinstance(value, dict):
            own.__dict__[name] = dict(value)
    return own


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike: bool = one.shape == other.shape and torch.equal(one, other)
        return alike
    return one is other or bool(one == other)
