"""Models that PEFT has wrapped: the stock model in them, with its adapters in its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neustream.errors import BackendError, RequestError, told

if TYPE_CHECKING:
    from neustream.backends.transformers.adapters import Adapters

WRAPPED = "peft.peft_model.PeftModel"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files with an adapter's weights."""


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
            raise BackendError(f"adapter {name!r} {_before_prompts(config)}")
    return model.get_base_model()


def _before_prompts(config: Any) -> str:
    how = "puts tokens or keys of its own before each prompt: served are adapters in layers, as LoRA's"
    return f"is of {type(config).__name__}, which {how}"


def with_adapters(stock: Any, folders: Mapping[str, Path]) -> tuple[Any, dict[str, str]]:
    """A model with adapters that PEFT saved, by their names; none is active. And why some cannot be loaded.

    In PEFT an adapter is called `inner_name` of its name. BackendError if PEFT is not here.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BackendError("adapters need peft: pip install peft") from error
    wrapped, failed = stock, {}
    for name, folder in folders.items():
        try:
            wrapped = _with_adapter(wrapped, inner_name(name), folder)
        except Exception as error:  # noqa: BLE001  whatever PEFT has against a folder
            failed[name] = f"adapter {name!r} cannot be loaded from {str(folder)!r}: {told(error)}"
    if not is_wrapped(wrapped):
        return stock, failed
    wrapped.base_model.disable_adapter_layers()
    return wrapped.eval().requires_grad_(False), failed


def to_choose(adapters: Adapters | None, names: Iterable[str], failed: dict[str, str]) -> dict[str, str]:
    """What PEFT calls adapters that requests can choose, by their names; `failed` gets why others cannot be."""
    found: dict[str, str] = {}
    for name in names:
        if name in failed:
            continue
        assert adapters is not None
        try:
            adapters.chosen(inner := inner_name(name))
            found[name] = inner
        except RequestError as error:
            failed[name] = str(error).replace(inner_name(name), name)
    return found


def inner_name(name: str) -> str:
    """What PEFT is told that an adapter is called: modules can have no names with dots, nor all others."""
    return ":" + name.replace(".", ":")


def _with_adapter(model: Any, name: str, folder: Path) -> Any:
    """A model with one adapter more; as it was, if that raises."""
    import peft

    if not folder.is_dir():
        raise BackendError("there is no such folder")
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise BackendError(f"no weights are there: expected {' or '.join(WEIGHTS)}")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise BackendError(f"it {_before_prompts(config)}")
    peft.load_peft_weights(str(folder), device="cpu")  # raises before the model has layers of it
    wrapped = model
    try:
        if not is_wrapped(model):
            wrapped = peft.PeftModel(model, config, adapter_name=name)
        loaded = wrapped.load_adapter(str(folder), adapter_name=name)
        _check_weights(name, loaded.missing_keys, loaded.unexpected_keys)
    except Exception:
        if is_wrapped(wrapped) and name in wrapped.peft_config:
            wrapped.delete_adapter(name)
        if is_wrapped(wrapped) and not wrapped.peft_config:
            wrapped.unload()
        raise
    return wrapped


def _check_weights(name: str, lacking: Iterable[str], unknown: Iterable[str]) -> None:
    """BackendError for weights that an adapter in a folder lacks, or that the model has not: PEFT passes over both."""
    for what, keys in (("lacks", [key for key in lacking if name in key.split(".")]), ("has", list(unknown))):
        if keys:
            raise BackendError(f"it is of another model: it {what} {keys[0]}, of {len(keys)} such weights")
