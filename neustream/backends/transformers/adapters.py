"""Adapters that requests choose: PEFT's layers compute rows of one batch with an adapter each.

PEFT tells rows apart by the first dimension of what a layer is given. Where the tokens of a call lie one
behind the other in one lane, each of them is handed over as a row. Layers do so for the time of a
call, in its thread only: the model is not switched.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from neustream.backends.torch import lacks_memory
from neustream.backends.transformers.lent import Lent, lent
from neustream.backends.transformers.own import Own
from neustream.backends.transformers.packed import Packed
from neustream.backends.transformers.proof import CLOSE, CLOSE_HALF, as_it_was
from neustream.backends.transformers.slots import Call, Row
from neustream.errors import RequestError, nearest, shown, told

if TYPE_CHECKING:
    from neustream.backends.transformers.model import LanguageModel

log = logging.getLogger("neustream")

BASE = "__base__"
"""What PEFT calls the model without adapters."""
SAMPLE = (1, 4, 7, 10, 13)
"""The text that each adapter is tried with."""


@dataclass(frozen=True, slots=True)
class Named:
    """The adapters of a call's rows: one for all, of each lane, or of each token of one lane.

    `wanted`: of the tokens of which logits are wanted, where tokens are named.
    """

    one: str | None = None
    lanes: Sequence[str] = ()
    tokens: Sequence[str] = ()
    wanted: Sequence[str] = ()

    def computed(self, layer: Any, x: torch.Tensor, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """What a layer makes of `x` [lanes, ...], or [1, tokens, ...] where tokens are named."""
        if self.one is not None or self.lanes:
            names = [self.one] * len(x) if self.one is not None else self.lanes
            return _mixed(layer, x, names, args, kwargs)
        names = next((some for some in (self.tokens, self.wanted) if len(some) == x.shape[1]), ())
        if len(x) != 1 or not names:
            raise ValueError(f"{type(layer).__name__} is given {list(x.shape)}, which are not the tokens of a lane")
        return _mixed(layer, x.transpose(0, 1), names, args, kwargs).transpose(0, 1)


def _mixed(layer: Any, x: torch.Tensor, names: Sequence[Any], args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    known = layer._get_available_adapters()
    adapters = [name if name in known else BASE for name in names]
    found: torch.Tensor = layer._mixed_batch_forward(x, *args, adapter_names=adapters, **kwargs)
    return found


class _Here(threading.local):
    named: Named | None = None


_here = _Here()


class Chosen(Lent):
    """A layer of PEFT that computes rows with the adapters that they name."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _here.named is None:
            found: torch.Tensor = self.stock(x, *args, **kwargs)
            return found
        return _here.named.computed(self.layer, x, args, kwargs)


class Adapters:
    """The adapters of a model, as requests may choose them.

    Attributes:
        names: that can be chosen.
        apart: why rows of a call may not have different ones; empty: they may.
        active: what requests get that choose none; None: several together.
        why: why adapters cannot be chosen, by name; "" is for all.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._layers = [module for module in model.model.modules() if _is_layer(module)]
        self.active = _active(self._layers)
        self.apart = _alone(model)
        self._close = CLOSE.get(model.model.dtype, CLOSE_HALF)
        known = {name for layer in self._layers for name in layer._get_available_adapters()}
        self.why = _reasons(self._layers, sorted(known), self.active)
        self.names = [name for name in (*sorted(known), BASE) if not {"", name} & self.why.keys()]

    def prove(self, model: LanguageModel) -> None:
        """Try each on the model itself: those with which it does not say what it says once switched are none.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no memory for these trials.
        """
        with as_it_was(model.model):
            for name in list(self.names):
                if why := self._tried(model, name):
                    self.why[name] = why
                    self.names.remove(name)

    def chosen(self, name: Any) -> str | None:
        """An adapter that a request asks for; None: what it gets anyway. RequestError for one that cannot be had."""
        if name is None:
            return None
        if not isinstance(name, str):
            raise RequestError(f"adapter is the name of one, got {shown(name)}")
        if why := self.why.get("") or self.why.get(name):
            raise RequestError(f"adapter={shown(name)}: {why}")
        if name not in self.names:
            raise RequestError(f"adapter={shown(name)}: {nearest(name, self.names)}")
        return None if name == self.active else name

    def groups(self, rows: Mapping[str, Row]) -> list[dict[str, Row]]:
        """Requests that may share calls."""
        if not self.apart:
            return [dict(rows)]
        parts: dict[str | None, dict[str, Row]] = {}
        for id, row in rows.items():
            parts.setdefault(row.adapter, {})[id] = row
        return list(parts.values())

    @contextlib.contextmanager
    def alike(self, rows: Sequence[Row]) -> Iterator[None]:
        """Let calls compute with the adapter that all these rows have; nothing to do where they differ."""
        adapters = {row.adapter for row in rows}
        one = adapters.pop()
        with self.one(None if adapters else one):
            yield

    @contextlib.contextmanager
    def one(self, name: str | None) -> Iterator[None]:
        """Let calls compute with one adapter, whatever they are given; nothing to do for None."""
        with self._used(None if name is None else Named(one=name)):
            yield

    @contextlib.contextmanager
    def mixed(self, call: Packed | Call) -> Iterator[None]:
        """Let a call compute each of its rows with its own adapter; nothing to do where all have the same."""
        rows = call.rows
        if all(row.adapter == rows[0].adapter for row in rows):
            yield
            return
        with self._used(self._tokens(call) if isinstance(call, Packed) else self._lanes(call)):
            yield

    # -- inside -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _used(self, named: Named | None) -> Iterator[None]:
        if named is None:
            yield
            return
        before = _here.named
        with lent(self._layers, Chosen):
            _here.named = named
            try:
                yield
            finally:
                _here.named = before

    def _name(self, row: Row) -> str:
        assert self.active is not None
        return row.adapter or self.active

    def _tokens(self, call: Packed) -> Named:
        tokens = [self._name(row) for row in call.ordered for _ in row.tokens]
        return Named(tokens=tokens, wanted=[self._name(row) for row in call.rows])

    def _lanes(self, call: Call) -> Named:
        lanes = [BASE] * len(call.ids)
        for row, lane, _ in call.places():
            lanes[lane] = self._name(row)
        return Named(lanes=lanes)

    @torch.inference_mode()
    def _tried(self, model: LanguageModel, name: str) -> str:
        """Why an adapter cannot be chosen; empty: with it, alone and in company, it is as if it were active."""
        text = [token % model.known for token in SAMPLE]
        row = Row(0, 0, text, adapter=name)
        with self._switched(name):
            wanted = self._plain(model, row)
        try:
            alone = model.forward([row])[0]
            model.cache.scrub(0)
            if not _same(alone, wanted, self._close):
                return "PEFT gives it other logits as one of a batch than as the active one"
        except Exception as error:  # of a layer that cannot mix
            if lacks_memory(error):
                raise
            model.cache.scrub(0)
            return f"PEFT cannot choose it for a request: {told(error)}"
        if not self.apart and model.slots > 1:
            self._keep_apart(model, name, self._mix(model, row, [wanted, self._plain(model, row)]))
        return ""

    def _keep_apart(self, model: LanguageModel, name: str, why: str) -> None:
        """From now on each call has one adapter, if there is a reason; the log says which."""
        self.apart = why
        if why:
            log.warning("%s: requests with different adapters share no calls: with %r %s", model.name, name, why)

    def _plain(self, model: LanguageModel, row: Row) -> torch.Tensor:
        logits = model.forward([replace(row, adapter=None)])[0]
        model.cache.scrub(0)
        return logits

    def _mix(self, model: LanguageModel, row: Row, wanted: Sequence[torch.Tensor]) -> str:
        """Why a row, and one that chooses nothing, may not be in one call, as a prompt or a decode; empty: they may."""
        at = len(row.tokens) - 1
        head, last = replace(row, tokens=row.tokens[:at]), replace(row, start=at, tokens=row.tokens[at:])
        try:
            prompts = model.forward([row, replace(row, slot=1, adapter=None)])
            model.forward([head, replace(head, slot=1, adapter=None)])
            after = model.forward([last, replace(last, slot=1, adapter=None)])
        except Exception as error:  # of a layer that cannot mix
            if lacks_memory(error):
                raise
            return f"the call fails: {told(error)}"
        finally:
            for slot in (0, 1):
                model.cache.scrub(slot)
        pairs = [*zip(prompts, wanted, strict=True), *zip(after, wanted, strict=True)]
        same = all(_same(found, alone, self._close) for found, alone in pairs)
        return "" if same else "logits are not those of a call alone"

    @contextlib.contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        """The model with one adapter alone, as PEFT switches it."""
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        try:
            for layer in self._layers:
                layer._active_adapter, layer._disable_adapters = [name], name == BASE
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled


def adapters_of(model: LanguageModel) -> Adapters | None:
    """The adapters of a model; None: it has none."""
    if not any(_is_layer(module) for module in model.model.modules()):
        return None
    return Adapters(model)


def _alone(model: LanguageModel) -> str:
    """Why each call of a model has one adapter anyway; empty: that is to be tried."""
    if model.fixed is not None:
        return "calls have fixed shapes"
    return "each request has a cache of its own" if isinstance(model.cache, Own) else ""


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether it is a layer of PEFT with adapters in it."""
    return hasattr(module, "_active_adapter") and hasattr(module, "_get_available_adapters")


def _active(layers: Sequence[Any]) -> str | None:
    """The one adapter that is active in all layers; None: they have several, or not the same."""
    found = {BASE if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    names = {one if isinstance(one, str) else one[0] if len(one) == 1 else None for one in found}
    return names.pop() if len(names) == 1 else None


def _reasons(layers: Sequence[Any], known: Sequence[str], active: str | None) -> dict[str, str]:
    """Why adapters cannot be chosen, by their names; "" is for all."""
    if active is None:
        return {"": f"several adapters are active together, of {', '.join(known)}: leave one active"}
    merged = {name for layer in layers for name in getattr(layer, "merged_adapters", ())}
    if merged:
        return {"": f"{', '.join(sorted(merged))} is merged into the weights: unmerge it (`unmerge_adapter`)"}
    if lacking := [layer for layer in layers if not hasattr(layer, "_mixed_batch_forward")]:
        return {"": f"PEFT cannot tell rows of a batch apart in a {type(lacking[0]).__name__}: switch the model"}
    dora = {name for layer in layers for name, used in getattr(layer, "use_dora", {}).items() if used}
    return dict.fromkeys(dora, "PEFT mixes no adapters with DoRA in a batch: switch the model")


def _same(found: torch.Tensor, wanted: torch.Tensor, close: float) -> bool:
    return float((found - wanted).abs().max()) <= close * max(float(wanted.abs().max()), 1e-6)
