"""How the file of an experiment is read.

Unknown keys, wrong types and impossible values are ConfigErrors that name the file, the key, the
value, and for a misspelt key the nearest valid one. Paths in a file are relative to that file;
paths given by `--set` are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from neustream.config.messages import explain, keys_at
from neustream.config.overrides import anchored, check_dropped, override
from neustream.config.schema import KINDS, SWEEPABLE, Experiment, kind_of
from neustream.config.yaml_file import Place, read_document
from neustream.errors import ConfigError

ASIDE = "x-"
"""What keys at the top begin with that hold nothing but anchors."""

PATHS = ("profiles", "workload.trace", "workload.tokenizer")
"""Keys whose values are paths."""


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read `path` and apply `overrides` of the form `dotted.key=value`.

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
    for key in PATHS:
        values = anchored(values, key, path.parent)
    changed: list[Place] = []
    for text in overrides:
        values, place = override(values, text, {"sweeps": SWEEPABLE}, free=["backend"])
        keys = [key for kind in KINDS for key in keys_at(kind, place[:-1])]
        check_dropped(values, place, keys, f"--set {text}")
        changed.append(place)
        for key in PATHS:
            if tuple(key.split("."))[: len(place)] == place:
                values = anchored(values, key, Path.cwd())
    kind = kind_of(values)
    if kind is None:
        raise ConfigError(f"{path}: give stages (a pipeline) or llm (a language model)")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = {place: line for place, line in document.lines.items() if place not in changed}
        raise ConfigError(f"{path}: {explain(error, kind, lines, changed)}") from None
