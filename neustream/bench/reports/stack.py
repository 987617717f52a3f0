"""Who served, as the user tells it for the reports."""

from __future__ import annotations

from pathlib import Path

from neustream.bench.reports.checking import read_yaml
from neustream.bench.reports.scenario import Component
from neustream.errors import ConfigError
from pydantic import TypeAdapter, ValidationError


def read_stack(path: Path | None) -> list[Component]:
    """The components in a file, none without one.

    Raises:
        ConfigError: they are not as `scenario.stack` of a report has them.
    """
    if path is None:
        return []
    content = read_yaml(path)
    if isinstance(content, dict) and "stack" in content:
        content = content["stack"]
    try:
        return TypeAdapter(list[Component]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {key or 'the file'}: {first['msg']}") from None
