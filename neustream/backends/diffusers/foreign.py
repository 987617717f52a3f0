"""What users put into models, and what of it cannot be shared by requests that take turns."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

KNOWN = frozenset(("torch", "diffusers", "transformers", "accelerate", "peft"))
"""Libraries whose hooks and wrappers keep nothing from one call to the next, unless they say so."""
USUAL = frozenset(
    (
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "AttnProcessor",
        "AttnProcessor2_0",
        "CogVideoXAttnProcessor2_0",
        "FluxAttnProcessor",
        "FluxAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SlicedAttnProcessor",
        "WanAttnProcessor",
        "WanAttnProcessor2_0",
        "XFormersAttnProcessor",
    )
)
"""Attention processors of diffusers that keep rows apart, as the tests show."""


def origin(value: Any) -> str:
    """The library that an object, a class or a function is of."""
    while isinstance(value, partial):
        value = value.func
    where = getattr(value, "__module__", None) or type(value).__module__
    return str(where).partition(".")[0]


def processor_of(module: torch.nn.Module) -> Any:
    """The attention processor of a module; None if it has none."""
    own = module.__dict__.get("processor")
    return module._modules.get("processor") if own is None else own


def processors_of(model: torch.nn.Module) -> set[type]:
    """The classes of a model's attention processors."""
    found = (processor_of(module) for module in model.modules())
    return {type(processor) for processor in found if processor is not None}


def is_usual(processor: type) -> bool:
    """Whether a class of attention processors keeps rows apart, as the tests show."""
    return processor.__name__ in USUAL and is_stock(processor)


def is_stock(processor: type) -> bool:
    """Whether a class of attention processors comes with a model of diffusers, and its call too."""
    call: Any = processor.__dict__.get("__call__", processor.__call__)
    where = getattr(call, "__globals__", {}).get("__name__", "")
    return all(one.startswith("diffusers.models.") for one in (processor.__module__, where))


def is_attention_torchs() -> bool:
    """Whether nobody put another function in place of torch's attention."""
    return origin(torch.nn.functional.scaled_dot_product_attention) == "torch"


def global_hooks() -> list[Any]:
    """Hooks of all modules that there are, which may change their results."""
    known: Any = torch.nn.modules.module
    found = (known._global_forward_hooks, known._global_forward_pre_hooks)
    return [hook for hooks in found if hooks for hook in hooks.values() if not looks_only(hook)]


def offloaded(model: torch.nn.Module) -> bool:
    """Whether its weights are somewhere else at each call."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def has_own_parts(model: torch.nn.Module) -> bool:
    """Whether any of its modules is of a class of somebody's own."""
    return any(origin(kind) not in KNOWN for kind in {type(module) for module in model.modules()})


def states_of(name: str, model: torch.nn.Module) -> Iterator[str]:
    """Why calls of a model may depend on calls before them, by what in it."""
    for hook in global_hooks():
        yield f"torch has a hook for all modules that may change their results ({_name(hook)})"
    if getattr(model, "is_cache_enabled", False):
        yield f"{name} has a cache of past steps enabled: disable_cache() first"
    for path, module in model.named_modules(prefix=name):
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if hook._is_stateful or origin(type(hook)) not in KNOWN:
                yield f"{path} has a {type(hook).__name__}, which keeps something of past steps: remove it first"
        if why := _forward(module, hooked=registry is not None):
            yield f"{path}.forward is not its class's own ({why})"
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for one in hooks.values():
                if not looks_only(one):
                    yield f"{path} has a hook that may change its results ({_name(one)})"


def _forward(module: torch.nn.Module, *, hooked: bool) -> str:
    """What runs in place of the forward of a module's class; empty: nothing does."""
    if why := _patched(type(module)):
        return why
    own = module.__dict__.get("forward")
    if own is None or hooked or isinstance(module, OptimizedModule):
        return ""
    own = _compiled_of(own)
    if is_own(own, module.__dict__):
        return ""
    offloads = "_hf_hook" in module.__dict__ and origin(type(module._hf_hook)) == "accelerate"
    return "" if offloads else _name(own)


def _compiled_of(function: Any) -> Any:
    """What `torch.compile` made a function of; others as they are."""
    function = getattr(function, "_torchdynamo_orig_callable", function)
    if getattr(function, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        return function.__wrapped__
    return function


def is_own(forward: Any, attributes: dict[str, Any]) -> bool:
    """Whether a function is the forward of the class of the module with these attributes."""
    module: Any = getattr(forward, "__self__", None)
    if getattr(module, "__dict__", None) is not attributes:
        return False
    return bool(forward.__func__ is type(module).forward)


def _patched(kind: type) -> str:
    """What somebody put in place of a class's forward."""
    for cls in kind.__mro__:
        forward = cls.__dict__.get("forward")
        if forward is None:
            continue
        module = getattr(forward, "__globals__", {}).get("__name__", cls.__module__)
        fits = module.partition(".")[0] in KNOWN or module == cls.__module__
        return "" if fits else _name(forward)
    return ""


def looks_only(hook: Any) -> bool:
    """Whether a hook never returns anything, or is of a library that is known."""
    if origin(hook) in KNOWN:
        return True
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if code is None:
        return False
    before: dis.Instruction | None = None
    for step in dis.get_instructions(code):
        nothing = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        if step.opname == "RETURN_VALUE" and not nothing:
            return False
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        before = step
    return True


def _name(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = "" if code is None else f", {code.co_filename}:{code.co_firstlineno}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} of {getattr(function, '__module__', None) or type(function).__module__}{where}"
