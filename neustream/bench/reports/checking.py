"""Whether a file is a report, and what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from neustream.bench.reports.observability import Report
from neustream.bench.reports.schema import VERSION, Spread, Statistics
from neustream.errors import BackendError, ConfigError, one_line, shown, told
from pydantic import ValidationError

LARGEST = 64 * 2**20
"""Bytes of a file that is read."""
MOST = 20
"""Problems that are told."""


def read_content(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file with a mapping at the top says; ConfigError as of `read_yaml`."""
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(found).__name__}")
    return found


def read_yaml(path: Path) -> Any:
    """What a YAML or JSON file says.

    Raises:
        ConfigError: it names the file and what is wrong with it.
    """
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: larger than {LARGEST} bytes")
        text = path.read_text("utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {told(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None


class _Loader(yaml.CSafeLoader):
    """Times stay texts, as JSON has them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def report_of(content: dict[str, Any], where: str) -> Report:
    """The report that a content is.

    Raises:
        ConfigError: it names the file `where` and the first things that are wrong with it.
    """
    if found := problems(content):
        raise ConfigError(f"{where}: {'; '.join(found[:3])}")
    return Report.model_validate(content)


def problems(content: dict[str, Any], schema: dict[str, Any] | None = None) -> list[str]:
    """What keeps a content from being a report 0.2.1, a line each.

    schema: a JSON schema that it is held against too.
    """
    version = content.get("version", VERSION)
    if version != VERSION:
        return [f"version {shown(version)}; allowed: the text {VERSION!r}"]
    found = list(_ours(content))
    if schema is not None:
        found += _by_schema(content, schema)
    return list(dict.fromkeys(found))[:MOST]


def _ours(content: dict[str, Any]) -> Iterator[str]:
    try:
        Report.model_validate(content)
    except ValidationError as error:
        for each in error.errors():
            key = ".".join(map(str, each["loc"]))
            yield f"{key}: {each['msg'].removeprefix('Value error, ')}"
    except RecursionError:
        yield "deeper than any report"


def _by_schema(content: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    try:
        import jsonschema
    except ImportError:
        raise BackendError("a schema needs jsonschema: pip install 'neustream[bench]'") from None
    try:
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
        errors = sorted(kind(schema).iter_errors(content), key=lambda each: each.json_path)
    except jsonschema.exceptions.SchemaError as error:
        raise ConfigError(f"the schema is none: {one_line(error)[:200]}") from None
    except Exception as error:  # noqa: BLE001 (references that lead nowhere have types of their own)
        raise ConfigError(f"the schema cannot be used: {told(error)}") from None
    return [f"{each.json_path.removeprefix('$.')}: {each.message[:200]}" for each in errors]


def remarks(content: dict[str, Any]) -> list[str]:
    """What is no error, and lost on readers: percentiles by other names, numbers that are none."""
    return list(_remarks(content, ""))[:MOST]


def _remarks(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        if {"units", "mean"} <= value.keys() and not key.startswith("results.profiling"):
            known = Statistics.model_fields.keys() | Spread.model_fields.keys()
            for name in value.keys() - known:
                yield f"{key}.{name}: readers drop it"
        for name, inner in value.items():
            yield from _remarks(inner, f"{key}.{name}" if key else str(name))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _remarks(inner, f"{key}.{number}")
    if isinstance(value, float) and math.isnan(value):
        yield f"{key}: NaN is no JSON"
