"""How the file of an experiment is read.

Unknown keys, wrong types and impossible values are ConfigErrors that name the file, the key, the
value, and for a misspelt key the nearest valid one. Paths in a file are relative to that file;
paths given by `--set` are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from neustream.config.agent import AgentExperiment
from neustream.config.messages import explain, keys_at
from neustream.config.overrides import anchored, check_dropped, override
from neustream.config.schema import KINDS, SWEEPABLE, Config, Experiment, kind_of
from neustream.config.several import ModelsConfig
from neustream.config.yaml_file import Place, read_document
from neustream.errors import ConfigError, nearest

ASIDE = "x-"
"""What keys at the top begin with that hold nothing but anchors."""

PATHS = (("profiles",), ("workload", "trace"), ("workload", "tokenizer"), ("workload", "lengths"))
"""Keys of a model whose values are paths."""

FILES: tuple[type[Config], ...] = (*KINDS, AgentExperiment, ModelsConfig)
"""The kinds of files."""

BACKENDS = (("backend",), ("models", "*", "backend"))
"""Sections with options of their own, where `null` is a value."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Experiment | ModelsConfig:
    """Read `path`, with one model or several, and apply `overrides`, each `dotted.key=value`.

    `neustream.config.overrides` has their grammar.

    Raises:
        ConfigError: it names the file, the line or the override, the key, the value, and what is
            allowed.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are a list of texts dotted.key=value, got {overrides!r}")
    path = Path(path)
    document = read_document(path)
    values = {key: value for key, value in document.values.items() if not str(key).startswith(ASIDE)}
    for key in _paths(values):
        values = anchored(values, key, path.parent)
    changed: list[Place] = []
    for text in overrides:
        values, place = override(values, text, {"sweeps": _sweepable(values)}, free=BACKENDS)
        keys = [key for kind in FILES for key in keys_at(kind, place[:-1])]
        check_dropped(values, place, keys, f"--set {text}")
        changed.append(place)
        for key in _paths(values):
            if key[: len(place)] == place:
                values = anchored(values, key, Path.cwd())
    kind = _kind_of_file(values)
    if kind is None:
        told = "give stages (a pipeline), llm (a language model), agent (calls) or models (several of them)"
        raise ConfigError(f"{path}: {told}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = {place: line for place, line in document.lines.items() if place not in changed}
        raise ConfigError(f"{path}: {explain(error, kind, lines, changed)}") from None


def _kind_of_file(values: Mapping[str, Any]) -> type[Experiment] | type[ModelsConfig] | None:
    if values.get("models"):
        return ModelsConfig
    return AgentExperiment if values.get("agent") else kind_of(values)


def load_experiment(path: Path | str, overrides: Sequence[str] = (), *, model: str | None = None) -> Experiment:
    """The same for a file with one model, or the one named `model` of a file with several.

    Raises:
        ConfigError: also for a file with several models, if none is named.
    """
    config = load_config(path, overrides)
    if isinstance(config, Experiment):
        if model is not None:
            raise ConfigError(f"{path}: has one model, whose name is not asked for; got {model!r}")
        return config
    names = ", ".join(config.models)
    if model is None:
        raise ConfigError(f"{path}: has several models; choose one by --model: {names}")
    if model not in config.models:
        raise ConfigError(f"{path}: has no model {model!r}; {nearest(model, config.models)}")
    return config.experiment(model)


def experiments_of(config: Config) -> list[Experiment]:
    """The experiments on each of a config's models."""
    if isinstance(config, ModelsConfig):
        return list(config.experiments().values())
    assert isinstance(config, Experiment)
    return [config]


def _models(values: Mapping[str, Any]) -> list[str]:
    models = values.get("models")
    return [str(name) for name in models] if isinstance(models, dict) else []


def _paths(values: Mapping[str, Any]) -> Iterator[Place]:
    """Where there may be paths."""
    yield from PATHS
    tools = values.get("tools")
    for name in tools if isinstance(tools, dict) else ():
        yield "tools", str(name), "latency_s", "samples"
    cluster = values.get("cluster")
    kinds = cluster.get("instances") if isinstance(cluster, dict) else None
    for name, kind in kinds.items() if isinstance(kinds, dict) else ():
        place = ("cluster", "instances", str(name), "profiles")
        several = kind.get("profiles") if isinstance(kind, dict) else None
        yield from ((*place, str(model)) for model in several) if isinstance(several, dict) else (place,)
    for name in _models(values):
        yield from (("models", name, *place) for place in PATHS)


def _sweepable(values: Mapping[str, Any]) -> list[str]:
    """Keys with dots in them that `sweeps` may have."""
    several = [f"models.{name}.{key}" for name in _models(values) for key in SWEEPABLE]
    return [*SWEEPABLE, *several]
