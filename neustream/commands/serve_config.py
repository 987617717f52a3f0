"""What `neustream serve` is told, put together: a file or its stand-in, options, `--set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from neustream.by_name import make_policy
from neustream.commands.keys import keys_in
from neustream.config.messages import explain
from neustream.config.overrides import override
from neustream.config.yaml_file import Document, Place, read_document
from neustream.core.policy import Policy
from neustream.errors import ConfigError, NeustreamError
from neustream.server.config import ModelConfig, ServerConfig

FREE = (("models", "*", "backend"), ("models", "*", "options"))
"""Sections with options of their own, where `null` is a value."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where it says what is served: a file, the folder of a model, or nothing but `--demo`.

    `cache`: the folder in which a demo keeps what it measures; None: the user's.
    """

    config: Path | None
    model: Path | None = None
    demo: bool = False
    tokenizer: str | None = None
    cache: str | None = None


def settings_of(
    source: Source, given: Mapping[str, Any], slo: Mapping[str, float | None], overrides: Sequence[str]
) -> ServerConfig:
    """All of it as a config.

    Args:
        given: options by the dotted key that they stand for; None: not given. They go before the
            file, and `overrides` before them.
        slo: what models promise where the file says nothing of them.

    Raises:
        ConfigError: it names the file, the line or the option, the key and what is allowed.
    """
    document = _document(source)
    values, changed = document.values, list[Place]()
    for key, value in given.items():
        if value is not None:
            place = tuple(key.split("."))
            values = _put(values, place, value)
            changed.append(place)
    for text in overrides:
        values, place = override(values, text, free=FREE)
        changed.append(place)
    values = _with_slo(values, slo)
    lines = {place: line for place, line in document.lines.items() if place not in changed}
    try:
        found = ServerConfig.model_validate(values)
    except ValidationError as error:
        told = explain(error, ServerConfig, lines, changed)
        raise ConfigError(told if source.config is None else f"{source.config}: {told}") from None
    return found if source.config is None else _anchored(found, source.config.parent)


def _document(source: Source) -> Document:
    """The values to begin with; ConfigError unless it is said in one way what is served."""
    if [source.config is not None, source.model is not None, source.demo].count(True) != 1:
        raise ConfigError("give a CONFIG, --model, or --demo")
    if source.tokenizer is not None and source.model is None:
        raise ConfigError("--tokenizer is of --model; a CONFIG says it with each of its models")
    if source.config is not None:
        return read_document(source.config)
    if source.model is None:
        return Document({"models": demo(source.cache)})
    return Document({"models": [_model(source.model, source.tokenizer)]})


def _model(folder: Path, tokenizer: str | None) -> dict[str, Any]:
    known = "".join(c if c.isalnum() or c in "._-" else "-" for c in folder.resolve().name)
    kind = "image" if (folder / "model_index.json").exists() else "text"
    found = {"name": known.strip("._-") or "model", "kind": kind, "path": str(folder)}
    return found if tokenizer is None else {**found, "tokenizer": tokenizer}


def demo(cache: str | None) -> list[dict[str, Any]]:
    """Two tiny models with random weights. `cache`: where they keep what they measure."""
    from neustream.backends.demo import IMAGE, TEXT

    options = {"measure_s": 10.0, "slots": 8, "cache": cache}
    text = {"backend": TEXT, "tokenizer": "bytes", "options": options}
    image = {"backend": IMAGE, "options": {"measure_s": 3.0, "cache": cache}}
    return [{"name": "tiny-text", "kind": "text", **text}, {"name": "tiny-image", "kind": "image", **image}]


def _put(values: Mapping[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """`values` with one more; what is no section is left for the validation to name."""
    if len(place) == 1:
        return {**values, place[0]: value}
    inner = values.get(place[0]) or {}
    if not isinstance(inner, Mapping):
        return dict(values)
    return {**values, place[0]: _put(inner, place[1:], value)}


def _with_slo(values: dict[str, Any], slo: Mapping[str, float | None]) -> dict[str, Any]:
    """Defaults of the promises of all models; images have no tokens, so e2e alone."""
    budgets = {name: ms for name, ms in slo.items() if ms is not None}
    models = values.get("models")
    if not budgets or not isinstance(models, list):
        return values
    return {**values, "models": [_promising(each, budgets) for each in models]}


def _promising(model: Any, budgets: Mapping[str, float]) -> Any:
    if not isinstance(model, dict) or not isinstance(model.get("slo", {}), dict):
        return model
    own = {name: ms for name, ms in budgets.items() if model.get("kind") != "image" or name == "e2e_ms"}
    return {**model, "slo": {**own, **model.get("slo", {})}}


def _anchored(found: ServerConfig, folder: Path) -> ServerConfig:
    """Paths in a config are relative to its folder."""
    http = found.http
    places = {name: folder / path for name in ("uds", "api_key_file") if (path := getattr(http, name)) is not None}
    models = []
    for model in found.models:
        update: dict[str, Any] = {"adapters": {name: folder / path for name, path in model.adapters.items()}}
        if model.path is not None:
            update["path"] = folder / model.path
        if model.tokenizer not in (None, "bytes"):
            update["tokenizer"] = str(folder / str(model.tokenizer))
        models.append(model.model_copy(update=update))
    return found.model_copy(update={"models": models, "http": http.model_copy(update=places)})


def policy_of(settings: ServerConfig) -> Policy:
    """The policy; ConfigError for what is none."""
    named = {"name": settings.policy} if isinstance(settings.policy, str) else dict(settings.policy)
    return make_policy(named.pop("name", "default"), named)


def check_models(settings: ServerConfig) -> None:
    """ConfigError for the first model of which a folder is not there, or whose agent cannot be imported."""
    for model in settings.models:
        if model.kind == "agent":
            _check_agent(model)
        if model.path is not None and not model.path.is_dir():
            raise ConfigError(f"model {model.name!r}: path {str(model.path)!r} is no folder")
        if model.tokenizer not in (None, "bytes") and not Path(str(model.tokenizer)).is_dir():
            raise ConfigError(f"model {model.name!r}: tokenizer {str(model.tokenizer)!r} is no folder")
        for name, path in model.adapters.items():
            if not path.is_dir():
                raise ConfigError(f"model {model.name!r}: adapters.{name} {str(path)!r} is no folder")


def _check_agent(model: ModelConfig) -> None:
    from neustream.backends.loading import mount_of

    try:
        mount_of(model).check(model.name)
    except NeustreamError as error:
        raise ConfigError(f"model {model.name!r}: {error}") from None


def keys_of(path: Path | None, given: Sequence[str]) -> list[str]:
    """All keys: those that are given, and those of a file; ConfigError for what has none."""
    for key in given:
        if not key or key != key.strip() or not key.isprintable():
            raise ConfigError("--api-key: a key is a word of printable characters without blanks around it")
    return [*given, *(() if path is None else keys_in(path))]
