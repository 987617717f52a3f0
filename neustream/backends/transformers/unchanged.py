"""Notices that a model which is served was changed: another mode, other modules, weights or adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.modules.module as torch_modules
from transformers import PreTrainedModel

from neustream.backends.settings import Settings, computes_anew
from neustream.backends.torch import Samples
from neustream.backends.transformers.functions import Functions
from neustream.backends.transformers.lent import own_forward
from neustream.backends.transformers.packed import implementation
from neustream.backends.transformers.proof_own import Way
from neustream.errors import NeustreamError, RequestError, StageFailed

ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""What layers of PEFT say of their adapters."""
PLAIN = (torch.Tensor, torch.nn.Parameter)
TEXT = (1, 4, 7, 10)
"""What a model with other hooks is asked, to see whether they change anything."""
Facts = dict[str, list[Any]]


class Unchanged:
    """What a model was when serving began, and whether it still is that.

    Everything that is compared is looked up in a few microseconds a layer, without a call. Only a
    model whose hooks are others than before is called, with a short text: hooks may watch, and must
    not change what it computes.

    Args:
        way: how its requests are computed, as it was found when it was tried.
    """

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        self._model, self.way = model, way
        self._takes = inspect.signature(model.forward).parameters
        named = list(model.named_modules())
        self._look_at_modules([module for _, module in named])
        kept = _kept_buffers(named)
        self._buffers = [(buffers, key) for _, buffers, key in kept]
        weights = _weights(model)
        there = [(name, weight) for name, weight in weights if _has_place(weight)]
        tracked = [(name, weight) for name, weight in weights if not weight.is_inference()]
        self._there: list[torch.Tensor] = [weight for _, weight in there]
        self._tracked: list[torch.Tensor] = [weight for _, weight in tracked]
        self._names = _names(named) | {"places": [name for name, _ in there], "versions": [name for name, _ in tracked]}
        self._names["parameters"] += [name for name, _, _ in kept]
        self._names["code"] = [kind.__name__ for kind in self._kinds]
        self._names["classes"] = self._names["mode"]
        self._functions = Functions(self._kinds)
        self._names["functions"] = self._functions.names
        self._samples = Samples(self._there)
        self._values = self._samples.read()
        self._looked = False
        self._hooked = self._watchers()
        self._settings = Settings(model)
        before = self._settings.now()
        self._logits = self._answer()
        self._settings.settle(before)
        self._facts = self._now()

    def _look_at_modules(self, modules: Sequence[torch.nn.Module]) -> None:
        """Keep the dicts in which modules hold what may be changed."""
        self._modules = list(modules)
        self._attributes = [module.__dict__ for module in modules]
        self._children = [module._modules for module in modules]
        self._parameters = [module._parameters for module in modules]
        self._hooks = [hooks for one in modules for hooks in (one._forward_pre_hooks, one._forward_hooks)]
        self._hooks += [torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks]
        self._adapted = [module for module in modules if _is_adapted(module)]
        self._kinds = list(dict.fromkeys([type(module) for module in modules]))

    @property
    def watched(self) -> bool:
        """Whether modules have hooks."""
        return any(self._hooks)

    def check(self) -> None:
        """RequestError if the model was changed; from any thread, without a look at the device."""
        self._check(RequestError)

    @torch.inference_mode()
    def look(self) -> None:
        """Begin `check_step` while a device still computes what it was told last: that is as things are now.

        StageFailed if the model was changed.
        """
        self._check(StageFailed)
        self._samples.ask()
        self._looked = True

    @torch.inference_mode()
    def check_step(self) -> None:
        """StageFailed if the model was changed, or its weights are others; on the device's thread."""
        looked, self._looked = self._looked, False
        if not looked:
            self._check(StageFailed)
        if self._samples.read() != self._values:
            raise self.error(StageFailed, "its weights were written to")
        hooks = self._watchers()
        if hooks == self._hooked:
            return
        try:
            same = torch.equal(self._answer(), self._logits)
        finally:
            self._check(StageFailed)  # it may have been changed meanwhile: then that is the reason
        if not same:
            raise self.error(StageFailed, "it has other hooks, which change what it computes")
        self._hooked = hooks

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether it is of this model, which is what it was; where nobody is served."""
        if model is not self._model:
            return False
        try:
            self.check_step()
        except StageFailed:
            return False
        return True

    def error(self, kind: type[NeustreamError], what: str) -> NeustreamError:
        """That the model was changed, and how."""
        return kind(
            f"{type(self._model).__name__} was changed while it is served: {what}; close the service first, then "
            "serve it again"
        )

    # -- inside -----------------------------------------------------------------------------------

    def _check(self, kind: type[NeustreamError]) -> None:
        now = self._now()
        if now == self._facts:
            return
        for what, say in SAY.items():
            if now[what] != self._facts[what]:
                raise self.error(kind, say(self._which(what, now[what]), now[what]))
        raise self.error(kind, self._settings.told(self._facts["settings"]))

    def _which(self, what: str, now: Sequence[Any]) -> str:
        """The name of the first that is another."""
        names = self._names.get(what, [])
        pairs = zip(names, self._facts[what], now, strict=False)
        return next((name or "the model" for name, before, after in pairs if before != after), "one")

    def _now(self) -> Facts:
        parameters = chain.from_iterable([some.values() for some in self._parameters])
        buffers = [some.get(key) for some, key in self._buffers]
        return {
            "mode": [own["training"] for own in self._attributes],
            "modules": list(map(id, chain.from_iterable([some.values() for some in self._children]))),
            "forward": [own_forward(own) for own in self._attributes],
            "compiled": [own.get("_compiled_call_impl") for own in self._attributes],
            "parameters": list(map(id, chain(parameters, buffers))),
            "adapters": [[_copied(getattr(one, key, None)) for key in ADAPTER] for one in self._adapted],
            "places": [weight.data_ptr() for weight in self._there],
            "versions": [weight._version for weight in self._tracked],
            "attention": [implementation(self._model.config.get_text_config(decoder=True))],
            "classes": list(map(type, self._modules)),
            "code": [kind.forward for kind in self._kinds],
            "functions": list(map(id, self._functions.now())),
            "settings": self._settings.now(),
        }

    def _watchers(self) -> list[Any]:
        """Hooks of all modules."""
        return [hook for hooks in self._hooks if hooks for hook in hooks.values()]

    @torch.inference_mode()
    def _answer(self) -> torch.Tensor:
        """What the model says to a short text."""
        size = self._model.config.get_text_config(decoder=True).vocab_size
        ids = torch.tensor([[token % size for token in TEXT]], device=self._model.device)
        known = {
            "position_ids": torch.arange(len(TEXT), device=ids.device)[None],
            "decoder_input_ids": ids,
            "use_cache": False,
        }
        more = {name: value for name, value in known.items() if name in self._takes}
        logits: torch.Tensor = self._model(input_ids=ids, **more).logits
        return logits.nan_to_num()


def _mode(name: str, now: Sequence[Any]) -> str:
    return f"{name} is in training mode" if any(now) else f"{name} is in eval mode"


def _attention(name: str, now: Sequence[Any]) -> str:
    return f"its attention is {now[0]!r} now"


SAY: dict[str, Callable[[str, Sequence[Any]], str]] = {
    "mode": _mode,
    "modules": lambda name, now: f"{name} was replaced, added or removed",
    "forward": lambda name, now: f"{name} has another forward",
    "compiled": lambda name, now: f"{name} is compiled otherwise",
    "parameters": lambda name, now: f"{name} was replaced",
    "adapters": lambda name, now: f"{name} has other adapters, or they are switched otherwise",
    "places": lambda name, now: f"{name} was moved or replaced",
    "versions": lambda name, now: f"{name} was written to",
    "attention": _attention,
    "classes": lambda name, now: f"{name} is of another class",
    "code": lambda name, now: f"{name} has another forward",
    "functions": lambda name, now: f"{name} was replaced",
}
"""How each kind of change is told, in the order in which they are looked for."""


def _is_adapted(module: torch.nn.Module) -> bool:
    """Whether it is a layer of PEFT."""
    return hasattr(module, "merged_adapters") or hasattr(module, "_disable_adapters")


def _has_place(weight: torch.Tensor) -> bool:
    """Whether a weight has an address of its own."""
    return type(weight) in PLAIN and not weight.is_meta


def _weights(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, but for tables that modules compute anew."""
    anew = {id(table) for module in model.modules() if computes_anew(module) for table in module._buffers.values()}
    tables = [(name, table) for name, table in model.named_buffers() if id(table) not in anew]
    return [*model.named_parameters(), *tables]


def _names(named: Sequence[tuple[str, torch.nn.Module]]) -> dict[str, list[str]]:
    """What is compared of modules, by kind of change: the name of each, in order."""
    modules = [name for name, _ in named]
    return {
        "mode": modules,
        "forward": modules,
        "compiled": modules,
        "modules": [f"{name}.{key}" for name, module in named for key in module._modules],
        "parameters": [f"{name}.{key}" for name, module in named for key in module._parameters],
        "adapters": [name for name, module in named if _is_adapted(module)],
    }


def _kept_buffers(
    named: Sequence[tuple[str, torch.nn.Module]],
) -> list[tuple[str, dict[str, Any], str]]:
    """Buffers that belong to the weights, those that are saved: their names, and where they are."""
    return [
        (f"{name}.{key}", module._buffers, key)
        for name, module in named
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]


def _copied(value: Any) -> Any:
    """A value that stays as it is: lists and mappings are copied."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else value
