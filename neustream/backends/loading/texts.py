"""Language models of a server's config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from neustream.backends.loading.folders import folder_of
from neustream.core.types import SLO
from neustream.engine.clock import Clock
from neustream.engine.events import Observer
from neustream.errors import ConfigError
from neustream.server.config import ModelConfig
from neustream.server.models import Model, TextModel
from neustream.service.mount import Mount

BYTES_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""The chat template of the tokenizer without files."""


def text_mount(config: ModelConfig, failed: dict[str, str]) -> Mount:
    """A language model; `failed` gets those of its adapters that cannot be loaded."""
    from transformers import AutoConfig

    from neustream.backends.options import options_of
    from neustream.backends.tokenizer import tokenizer_in
    from neustream.backends.torch import device_of, dtype_of
    from neustream.backends.transformers import TextMount
    from neustream.backends.transformers.adapted import with_adapters
    from neustream.backends.transformers.from_config import Options, build, byte_tokenizer
    from neustream.backends.transformers.processors import class_of, processor_for, processor_in

    if config.path is not None:
        folder = folder_of(config.path)
        dtype = dtype_of(config.dtype)
        made = class_of(AutoConfig.from_pretrained(folder, local_files_only=True))
        stock = made.from_pretrained(folder, local_files_only=True, dtype=dtype)
        stock.eval().requires_grad_(False)
    else:
        options = options_of(Options, {"dtype": config.dtype, **(config.backend or {})})
        stock = build(options, device_of(config.device))
    if config.tokenizer == "bytes":
        tokenizer: Any = byte_tokenizer()
        tokenizer.chat_template = BYTES_TEMPLATE
        processor: Any = processor_for(stock, tokenizer)
    elif config.tokenizer is not None:
        processor = tokenizer_in(folder_of(Path(config.tokenizer)))
    elif config.path is not None:
        processor = processor_in(folder_of(config.path), stock)
    else:
        raise ConfigError(f"model {config.name!r}: give tokenizer: a folder, or bytes")
    if config.adapters:
        stock, broken = with_adapters(stock, config.adapters)
        failed |= broken
    return TextMount(stock, processor, **{"progress": False, **config.options})


def text_model(config: ModelConfig, mount: Any, slo: SLO) -> TextModel:
    """What a front has to know of it."""
    model = mount.model
    return TextModel(
        config.name,
        mount.tokenizer,
        model.max_len,
        model.vocabulary,
        slo,
        model.slots,
        config.device,
        temperature=mount.defaults.warm,
        see=mount.reader.chat if mount.reader.sees else None,
        longest=replace(mount.room, defaults=mount.defaults.of_lengths).outputs,
    )


def adapters_of(config: ModelConfig, model: Model, mount: Any, failed: dict[str, str]) -> list[Model]:
    """The adapters of a model as models; those that requests cannot choose move to `failed`."""
    if not isinstance(model, TextModel) or not config.adapters:
        return []
    from neustream.backends.transformers.adapted import to_choose

    inner = to_choose(mount.model.adapters, config.adapters, failed)
    return [replace(model, name=name, adapter=own, base=model.name) for name, own in inner.items()]


def vllm_model(
    config: ModelConfig, policy: dict[str, Any], clock: Clock, observer: Observer, fallback_ttft_ms: float
) -> Model:
    """A language model in an engine of vLLM's own. `policy`: its name and parameters."""
    from neustream.backends.tokenizer import tokenizer_in
    from neustream.backends.vllm.served import engine_of

    assert config.path is not None
    folder = str(folder_of(config.path))
    where = config.tokenizer or folder
    tokenizer = tokenizer_in(folder_of(Path(where)))  # before there is an engine, which would have to be stopped
    own, sizes = engine_of(
        folder,
        config.name,
        policy=policy,
        clock=clock,
        observer=observer,
        options={"dtype": config.dtype, "tokenizer": where, **config.options},
    )
    slo = config.slo.slo(fallback_ttft_ms)
    limits = sizes["max_len"], sizes["vocabulary"], slo, sizes["batch"]
    return TextModel(config.name, tokenizer, *limits, own=own)
