"""The sizes of diffusers pipelines: of a config's components, or of a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from neustream.backends import torch as shared
from neustream.backends.diffusers.from_config import Options, byte_tokenizer, letter_tokenizer
from neustream.backends.options import options_of
from neustream.backends.sizes import Part, Sizes
from neustream.errors import BackendError

TOKENIZERS = {"bytes": byte_tokenizer, "letters": letter_tokenizer}


def sizes_of(raw: Mapping[str, Any]) -> Sizes:
    """The networks of the pipeline that a `backend` section describes."""
    options = options_of(Options, raw)
    dtype = shared.dtype_of(options.dtype)
    if options.checkpoint is None:
        networks = list(_of_components(options.components))
    else:
        networks = list(_of_checkpoint(Path(options.checkpoint)))
    name = (options.pipeline or str(options.checkpoint or "")).rpartition(":")[2]
    parts = [_part(name, network, dtype) for name, network in networks]
    return Sizes(name, options.dtype, parts)


def _part(name: str, network: torch.nn.Module, dtype: torch.dtype) -> Part:
    count = sum(weight.numel() for weight in network.parameters())
    return Part(name, type(network).__name__, count, count * dtype.itemsize)


def _of_components(components: Mapping[str, Any]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Networks by name, without memory for their weights."""
    for name, part in components.items():
        if not isinstance(part, Mapping):
            continue
        arguments = {key: value for key, value in part.items() if key != "class"}
        tokenizer = components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and tokenizer in TOKENIZERS:
            arguments = {**_vocabulary(TOKENIZERS[tokenizer]()), **arguments}
        network = _network(name, str(part.get("class")), arguments)
        if network is not None:
            yield name, network


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """What a text encoder gets of its tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **{name: id for name, id in ids.items() if id is not None}}


def _network(name: str, kind: str, arguments: Mapping[str, Any]) -> torch.nn.Module | None:
    """A network of either library; None for a part that has no weights."""
    cls = getattr(diffusers, kind, None)
    if cls is not None and not issubclass(cls, torch.nn.Module):
        return None
    with torch.device("meta"):
        if cls is not None:
            return cls(**arguments)
        cls = getattr(transformers, kind, None)
        if cls is None:
            raise BackendError(f"backend.components.{name}: neither diffusers nor transformers has a class {kind!r}")
        return cls(cls.config_class(**arguments))


def _of_checkpoint(folder: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """The networks that a folder saved by diffusers names."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise BackendError(f"backend.checkpoint {str(folder)!r}: no folder with a model_index.json")
    for name, part in json.loads(index.read_text("utf-8")).items():
        config = folder / name / "config.json"
        if not isinstance(part, list) or not config.is_file():
            continue
        said = json.loads(config.read_text("utf-8"))
        arguments = {key: value for key, value in said.items() if not key.startswith("_")}
        network = _network(name, str(part[1]), arguments)
        if network is not None:
            yield name, network
