"""What calls of a pipeline read beside their arguments: its models, their adapters, processors and hooks.

All requests share it, so nobody may change it while one of them is open. It is noted once and
compared before each batch. Comparing is mostly one comparison of dicts a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from neustream.backends.diffusers.foreign import global_hooks, is_own, looks_only, offloaded, origin, processor_of
from neustream.backends.diffusers.weights import Weights
from neustream.backends.settings import Settings
from neustream.errors import shown

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PRIVATE = frozenset(("_active_adapter", "_disable_adapters", "_attention_backend", "_parallel_config"))
"""Attributes that are not public, and decide over results."""
OF_TEXTS = frozenset(("forward", "training", "scaling", "merged_adapters")) | PRIVATE
"""What is compared of models of transformers, beside their settings: they note how long texts were."""
SIMPLE = (bool, int, float, str, tuple, type(None))
LARGEST = 64
"""Containers with more items are no settings."""
NOWHERE: tuple[Mapping[str, Any], str] = ({}, "")
DEPTH = 2
"""How deep objects that processors hold are looked at."""


class Kept:
    """The attributes of one object as they were.

    Args:
        name: what messages call it.
        now: its `__dict__`.
        private: whether attributes that begin with _ count too.
        only: the names that count; None: all.
        moves: whether its weights are replaced all the time.
    """

    __slots__ = ("_moves", "_only", "_private", "before", "inside", "name", "now")

    def __init__(
        self,
        name: str,
        now: dict[str, Any],
        *,
        private: bool = False,
        only: frozenset[str] | None = None,
        moves: bool = False,
    ) -> None:
        self.name = name
        self.now = now
        self._private = private
        self._only = only
        self._moves = moves
        self._note()

    def _note(self) -> None:
        self.before = dict(self.now)
        self.inside = {key: value.copy() for key, value in self.now.items() if self._holds(key, value)}

    def _holds(self, key: str, value: Any) -> bool:
        """Whether what a container holds counts, beside which one it is."""
        if key == "_parameters":
            return not self._moves
        if key == "_buffers":
            return not self._moves and self._only is None  # models of texts replace theirs themselves
        if key in ("_modules", "_internal_dict", *HOOKS):
            return True
        return isinstance(value, dict | list | set) and self._counts(key) and len(value) <= LARGEST

    def _counts(self, key: str) -> bool:
        if self._only is not None:
            return key in self._only
        return self._private or not key.startswith("_") or key in PRIVATE

    def changed(self) -> str:
        """The first attribute that is another one now; what does not count is noted as it is."""
        found = self._replaced() or self._refilled()
        if not found:
            self._note()
        return found

    def _replaced(self) -> str:
        """The first attribute that counts and has another value."""
        for key in self.before.keys() | self.now.keys():
            old, new = self.before.get(key), self.now.get(key)
            if old is not new and self._decides(key, old, new) and not _same(old, new):
                return f"{self.name}.{key} was {shown(old)} and is {shown(new)}"
        return ""

    def _decides(self, key: str, old: Any, new: Any) -> bool:
        """Whether results depend on which of two values an attribute has."""
        if key == "forward" and old is None and is_own(new, self.now):
            return False
        return self._counts(key) and (self._private or _setting(old) or _setting(new))

    def _refilled(self) -> str:
        """The first container that counts and holds something else."""
        for key, kept in self.inside.items():
            held: Any = self.now.get(key)
            if _same(held, kept):
                continue
            if key not in HOOKS or not all(map(looks_only, held.values())):
                return f"{self.name}.{key} was {_names(kept)} and is {_names(held)}"
        return ""


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  tensors that are not the same
        return False


def _setting(value: Any) -> bool:
    """Whether an attribute decides over results; tensors and objects of other kinds are remembered values."""
    return isinstance(value, SIMPLE) or (callable(value) and not isinstance(value, torch.nn.Module))


def _names(held: Any) -> str:
    return shown(list(held) if isinstance(held, Mapping) and len(held) > 8 else held)


class State:
    """What calls of `pipe` read, as it was when this was made.

    Args:
        models: of the pipeline and of those inside it, by name; asked again at each comparison.
        scaling: whether a call that scales adapters is under way, which scales them back.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        models: Callable[[DiffusionPipeline], Iterable[tuple[str, torch.nn.Module]]],
        scaling: Callable[[], bool],
    ) -> None:
        self._pipe = pipe
        self._models = models
        self._scaling = scaling
        self._firsts = {id(model): _first(model) for _, model in models(pipe)}
        self._places = self._places_now()
        self._kept: list[Kept] = []
        self._weights: list[Weights] = []
        self._settings: list[tuple[Settings, list[Any]]] = []
        for name, model in models(pipe):
            self._note(name, model)
        self._now = [kept.now for kept in self._kept]
        self._before = [kept.before for kept in self._kept]
        self._link()
        self._code = _code(model for _, model in models(pipe))
        self._functions = [getattr(owner, name) for owner, name in self._code]
        self._hooks = global_hooks()

    def _note(self, name: str, model: torch.nn.Module) -> None:
        only, moves = OF_TEXTS if isinstance(model, PreTrainedModel) else None, _moves(model)
        if only is not None:
            self._kept.append(Kept(f"{name}.config", model.config.__dict__, private=True))
            settings = Settings(model, name)
            self._settings.append((settings, settings.now()))
        for path, module in model.named_modules(prefix=name):
            self._kept.append(Kept(path, module.__dict__, only=only, moves=moves))
            processor = processor_of(module)
            if processor is not None and not isinstance(processor, torch.nn.Module):
                self._kept += _objects(f"{path}.processor", processor, DEPTH)
        if not offloaded(model):
            self._weights.append(Weights(model, casts=moves))

    def _link(self) -> None:
        self._before = [kept.before for kept in self._kept]
        pairs = [(kept.now.get(key), held) for kept in self._kept for key, held in kept.inside.items()]
        self._empty = [now for now, before in pairs if not now and not before]
        full = [(now, before) for now, before in pairs if now or before]
        self._held, self._holding = [now for now, _ in full], [before for _, before in full]

    def changed(self, *, sampled: bool = False) -> str:
        """What is not what it was; empty: nothing.

        `sampled`: look into the weights, too; this waits for the device.
        """
        whose = type(self._pipe).__name__
        then = "close the service first, then serve the pipeline again"
        now = self._places_now()
        for name, before in self._places.items():
            if now.get(name) != before:
                gone = name not in now or now[name][0] != before[0]
                what = "replaced or removed" if gone else "moved or changed"
                detail = "" if name not in now else f": {before[1:]} before, {now[name][1:]} now"
                return f"{name} of {whose} was {what} while it is served{detail}; {then}"
        why = next(filter(None, (one.written(sampled=sampled) for one in self._weights)), "") or self._attributes()
        return why and f"{whose} was changed while it is served: {why}; {then}, or change it back"

    def _places_now(self) -> dict[str, tuple[Any, ...]]:
        """Which models there are, where they are, their adapters."""
        found = {}
        for name, model in self._models(self._pipe):
            parameters, first = self._firsts.get(id(model), NOWHERE)
            weight = parameters.get(first)
            hooked = "_hf_hook" in model.__dict__ or weight is None  # offloaded models move all the time
            casts = getattr(getattr(model, "config", None), "force_upcast", False)
            place = None if hooked or weight is None else (str(weight.device), None if casts else weight.dtype)
            adapters: Any = None
            if getattr(model, "_hf_peft_config_loaded", False):
                adapters = (tuple(model.peft_config), tuple(model.active_adapters()))
            found[name] = (id(model), place, adapters)
        return found

    def _attributes(self) -> str:
        for (owner, name), before in zip(self._code, self._functions, strict=True):
            if getattr(owner, name) is not before:
                return f"the {name.strip('_')} of {owner.__name__} was replaced"
        if global_hooks() != self._hooks:
            return "torch has other hooks for all modules"
        for settings, noted in self._settings:
            if settings.now() != noted:
                return settings.told(noted)
        if not self._unequal():
            return ""
        for kept in self._kept:
            if why := kept.changed():
                return "" if self._scaling() and "scaling" in why else why
        self._link()
        return ""

    def _unequal(self) -> bool:
        try:
            return any(self._empty) or self._now != self._before or self._held != self._holding
        except Exception:  # noqa: BLE001  tensors that are not the same
            return True


def _code(models: Iterable[torch.nn.Module]) -> list[tuple[Any, str]]:
    """The functions that models run, by whose they are and by name."""
    modules = [module for model in models for module in model.modules()]
    processors = {type(processor) for processor in map(processor_of, modules) if processor is not None}
    found: list[tuple[Any, str]] = [(kind, "forward") for kind in {type(module) for module in modules}]
    found += [(kind, "__call__") for kind in processors]
    return [*found, (torch.nn.functional, "scaled_dot_product_attention")]


def _objects(name: str, value: Any, depth: int) -> Iterator[Kept]:
    """The attributes of a processor, and of the objects that it holds."""
    own = getattr(value, "__dict__", None)
    if not isinstance(own, dict) or isinstance(value, type | torch.nn.Module | torch.Tensor):
        return
    yield Kept(name, own, private=origin(value) != "diffusers")
    for key, inner in own.items() if depth else ():
        if origin(inner) not in ("torch", "builtins"):
            yield from _objects(f"{name}.{key}", inner, depth - 1)


def _moves(model: torch.nn.Module) -> bool:
    """Whether its weights are replaced all the time: offloaded, or cast by stock calls themselves."""
    casts = getattr(getattr(model, "config", None), "force_upcast", False)
    return bool(casts) or offloaded(model)


def _first(model: torch.nn.Module) -> tuple[Mapping[str, Any], str]:
    """Where its first parameter is kept, and its name there; for a model without any, nowhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                return module._parameters, name
    return NOWHERE
