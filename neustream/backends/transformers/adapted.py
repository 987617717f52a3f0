"""Models that PEFT has wrapped: the stock model in them, with its adapters in its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neustream.errors import BackendError, told

WRAPPED = "peft.peft_model.PeftModel"


def is_wrapped(model: Any) -> bool:
    """Whether it is a model of PEFT's; without importing that."""
    return any(f"{cls.__module__}.{cls.__name__}" == WRAPPED for cls in type(model).__mro__)


def stock_of(model: Any) -> Any:
    """The transformers model in one that PEFT has wrapped; others as they are.

    BackendError for adapters that are no layers of it: those put tokens or keys before each prompt.
    """
    if not is_wrapped(model):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise BackendError(
                f"adapter {name!r} is of {type(config).__name__}, which puts tokens or keys of its own before each "
                "prompt: served are adapters in layers, as LoRA's"
            )
    return model.get_base_model()


def with_adapters(stock: Any, folders: Mapping[str, Path]) -> Any:
    """A model with adapters that PEFT saved, by their names; none is active. BackendError for what is none."""
    try:
        import peft
    except ImportError as error:
        raise BackendError("adapters need peft: pip install peft") from error
    wrapped = stock
    for name, folder in folders.items():
        try:
            if is_wrapped(wrapped):
                wrapped.load_adapter(str(folder), adapter_name=name)
            else:
                wrapped = peft.PeftModel.from_pretrained(stock, str(folder), adapter_name=name)
        except Exception as error:  # whatever PEFT has against a folder
            raise BackendError(f"adapter {name!r} cannot be loaded from {str(folder)!r}: {told(error)}") from error
    wrapped.base_model.disable_adapter_layers()
    return wrapped.eval().requires_grad_(False)
